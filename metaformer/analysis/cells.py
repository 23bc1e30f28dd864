"""Tables: cells of values with their digits and unit, which become Markdown, CSV and LaTeX."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal
from statistics import median
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from metaformer.analysis.count import ROOT

FORMATS = ("md", "csv", "tex")
TEX = {"→": r"$\to$", "±": r"$\pm$", "α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\varepsilon$"}  # noqa: RUF001
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ROOT / "analysis/templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
"""Texts of analysis/templates/, in which counts and measurements are filled."""
NOTHING = "-"
NOT_RUN, NOT_MEASURED = "not run", "not measured"
JUDGED = ("holds", "fails", "undecided", NOT_RUN)

Row = dict[str, Any]
"""Column heading to cell: text, ``None`` where there is nothing to show, or one of the types below."""


def rounded(value: Decimal | float, digits: int) -> Decimal:
    """``value`` with ``digits`` digits after the point; halves are rounded up."""
    return Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)


class Number(NamedTuple):
    value: Decimal | float
    digits: int = 0
    unit: str = ""
    signed: bool = False

    def __str__(self) -> str:
        sign = "+" if self.signed else ""
        return f"{rounded(self.value, self.digits):{sign},f}{self.unit and ' '}{self.unit}"


def as_printed(figure: float) -> Number:
    """A figure of the paper with the printed number of digits: none for 12, one for 3.0."""
    return Number(Decimal(str(figure)), len(str(figure).partition(".")[2]))


class Range(NamedTuple):
    """A value between two bounds: a median with the extremes, or an estimate with its interval."""

    value: float
    low: float
    high: float
    digits: int
    signed: bool = False

    def __str__(self) -> str:
        value, low, high = (Number(bound, self.digits, signed=self.signed) for bound in self[:3])
        return f"{value} ({low} to {high})"


def spread(values: Sequence[float], digits: int) -> Range:
    return Range(median(values), min(values), max(values), digits)


class Mean(NamedTuple):
    """A mean over runs, in percent, with half the width of its interval; ``None`` if there is a single run."""

    value: float
    margin: float | None

    def __str__(self) -> str:
        margin = "" if self.margin is None else f" ± {Number(self.margin, 1)}"
        return f"{Number(self.value, 1)}{margin}"


class Measurement(NamedTuple):
    """A value that must be measured; ``None`` without a record."""

    value: Number | Range | Mean | str | None
    absent: str = NOT_RUN

    def __str__(self) -> str:
        return self.absent if self.value is None else str(self.value)


class Pair(NamedTuple):
    """An accuracy as printed in the paper and as measured here; both ``None`` if the paper prints none."""

    paper: Number | None = None
    here: Measurement | None = None

    def __str__(self) -> str:
        return NOTHING if self.paper is None else f"{self.paper} / {self.here}"


class Verdict(NamedTuple):
    """The outcome of a comparison, with the reason.

    A computed figure is equal, explained or unexplained. A claim is true or false. A statement holds, fails, is
    undecided or is not run.
    """

    kind: str
    reason: str = ""


def places(row: Row) -> list[Measurement]:
    """The cells for values that must be measured."""
    cells = [cell.here if isinstance(cell, Pair) else cell for cell in row.values()]
    return [cell for cell in cells if isinstance(cell, Measurement)]


def state(row: Row) -> str:
    """Whether a row that needs measurements has any: ``measured`` or ``not run``; empty for other rows."""
    found = [place.value is not None for place in places(row)]
    found += [cell.kind != NOT_RUN for cell in row.values() if isinstance(cell, Verdict) and cell.kind in JUDGED]
    return "" if not found else "measured" if any(found) else NOT_RUN


class Table(NamedTuple):
    name: str
    title: str
    rows: list[Row]
    notes: list[str]

    def verdicts(self) -> Counter[str]:
        """The number of verdicts of each kind."""
        return Counter(cell.kind for row in self.rows for cell in row.values() if isinstance(cell, Verdict))

    def summary(self) -> str:
        """One line with the number of rows, of verdicts of each kind, and of present and missing measurements."""
        kinds, computed = self.verdicts(), ("equal", "explained", "unexplained")
        parts = [f"{len(self.rows)} rows"]
        if number := sum(kinds[kind] for kind in computed):
            parts.append(f"{number} cells computed ({', '.join(f'{kinds[kind]} {kind}' for kind in computed)})")
        others = ("true", "false", *JUDGED)
        parts += [f"{kinds[kind]} {kind}" for kind in others if kinds[kind]]
        if values := [place.value for row in self.rows for place in places(row)]:
            missing = values.count(None)
            parts.append(f"{len(values) - missing} measured, {missing} {NOT_RUN}")
        return f"{self.name}: {'; '.join(parts)}"


# Rendering


def render(table: Table, form: str) -> str:
    """The text of a table. The reasons of verdicts become numbered notes; in CSV they stay in the cell."""
    if form == "csv":
        return frame(table.rows, with_reason, separate=True).to_csv(index=False)
    body, notes = with_notes(table)
    if form == "md":
        lines = [f"# {table.title}", "", to_markdown(body), "", *(f"- {note}" for note in notes)]
        return "\n".join(lines).rstrip() + "\n"
    text = body.to_latex(index=False, escape=True, column_format="l" * len(body.columns))
    for letter, command in TEX.items():
        text = text.replace(letter, command)
    return "".join(f"% {line}\n" for line in (table.title, *notes)) + text


def with_notes(table: Table) -> tuple[pd.DataFrame, list[str]]:
    """The texts of the cells, without columns that are empty, and the notes, to which verdicts refer by number."""
    reasons: dict[str, int] = {}

    def with_number(verdict: Verdict) -> str:
        if not verdict.reason:
            return verdict.kind
        return f"{verdict.kind} [{reasons.setdefault(verdict.reason, len(reasons) + 1)}]"

    body = frame(table.rows, with_number)
    notes = [*table.notes, *(f"[{number}] {reason}" for reason, number in reasons.items())]
    return body.loc[:, [column for column in body.columns if not (body[column] == "").all()]], notes


def with_reason(verdict: Verdict) -> str:
    return f"{verdict.kind}: {verdict.reason}" if verdict.reason else verdict.kind


def frame(rows: list[Row], of_verdict: Callable[[Verdict], str], separate: bool = False) -> pd.DataFrame:
    """The texts of rows; with ``separate``, both halves of a pair get a column each."""

    def text(cell: Any) -> str:
        return NOTHING if cell is None else of_verdict(cell) if isinstance(cell, Verdict) else str(cell)

    texts = [{name: text(part) for place in row.items() for name, part in parts(*place, separate)} for row in rows]
    return pd.DataFrame(texts).fillna(NOTHING)


def parts(heading: str, cell: Any, separate: bool) -> Iterator[tuple[str, Any]]:
    """Headings and values of the columns that a cell fills."""
    if isinstance(cell, Pair) and separate:
        yield from ((f"{heading} ({part})", value) for part, value in cell._asdict().items())
    else:
        yield f"{heading} (paper / here)" if isinstance(cell, Pair) else heading, cell


def to_markdown(texts: pd.DataFrame) -> str:
    texts = texts.replace(r"\|", r"\\|", regex=True)  # a bar would end the cell
    return texts.to_markdown(index=False, disable_numparse=True, tablefmt="github")


def markdown(rows: list[Row]) -> str:
    """Rows without title and notes, for a README."""
    return to_markdown(frame(rows, with_reason)) if rows else "Not measured yet."

"""Render tables as Markdown, CSV and LaTeX."""

from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pandas as pd

from metaformer.analysis.cells import NOTHING, Pair, Row, Table, Verdict
from metaformer.analysis.paper import ROOT
from metaformer.errors import InputError

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
    return texts.to_markdown(index=False, disable_numparse=True, tablefmt="github")


def markdown(rows: list[Row]) -> str:
    """Rows without title and notes, for a README."""
    return to_markdown(frame(rows, with_reason)) if rows else "Not measured yet."


def with_section(text: str, name: str, content: str, path: Any) -> str:
    """Put ``content`` between the markers of section ``name`` in ``text``, the text of the file ``path``.

    Raises:
        InputError: the text does not have these markers exactly once.
    """
    begin, end = f"<!-- begin {name}: written by analysis/make_tables.py -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{path} has no section {name!r}: put the lines {begin.strip()} and {end} around its place")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{content}\n{end}{after}"

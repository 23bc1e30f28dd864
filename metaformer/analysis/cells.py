"""Cells of tables: values with their digits and unit, which become text when a table is rendered."""

from collections import Counter
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from statistics import median
from typing import Any, NamedTuple

NOTHING = "-"
NOT_RUN, NOT_MEASURED = "not run", "not measured"

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
        others = ("true", "false", "holds", "fails", "undecided", NOT_RUN)
        parts += [f"{kinds[kind]} {kind}" for kind in others if kinds[kind]]
        if values := [place.value for row in self.rows for place in places(row)]:
            missing = values.count(None)
            parts.append(f"{len(values) - missing} measured, {missing} {NOT_RUN}")
        return f"{self.name}: {'; '.join(parts)}"

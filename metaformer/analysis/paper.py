"""Read the paper's numbers (analysis/paper.yaml) and compare counts with them."""

from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from metaformer.analysis.cells import Number, Row, Table, Verdict, as_printed, rounded
from metaformer.analysis.count import ROOT, cached_count
from metaformer.variants import VARIANTS

UNITS = {"params": 10**6, "frozen": 10**6, "macs": 10**9}
BUILT = ("table2", "table3", "table4", "table5")
"""Tables whose rows are models; Table 1 has no others than Table 2."""


@cache
def paper() -> dict[str, Any]:
    """The content of paper.yaml. The rows of Table 5 get model, group and label from :data:`metaformer.VARIANTS`."""
    content = yaml.safe_load((ROOT / "analysis/paper.yaml").read_text(encoding="utf-8"))
    builds = {variant.row: name for name, variant in VARIANTS.items()}
    for row in content["table5"]["rows"]:
        variant = VARIANTS[builds[row["row"]]]
        row |= {"build": builds[row["row"]], "group": variant.group, "variant": variant.label}
    return content


@cache
def captions() -> dict[str, Any]:
    """The content of captions.yaml."""
    return yaml.safe_load((ROOT / "analysis/captions.yaml").read_text(encoding="utf-8"))


def table_of(name: str, rows: list[Row], *notes: str) -> Table:
    """A table with its title and notes in paper.yaml and captions.yaml, and further notes."""
    printed, own = paper().get(name, {}), captions()["tables"].get(name, {})
    notes = [*(note.format(**paper()["sources"]) for note in own.get("notes", [])), *notes]
    return Table(name, (printed or own)["title"], rows, [*printed.get("notes", []), *notes])


def rows_of(table: str) -> list[dict[str, Any]]:
    return paper()[table]["rows"]


def key_of(model: str) -> str:
    """A model of paper.yaml or of a record without a config's folder and suffix, or timm's tag of the weights."""
    return Path(model).stem if model.endswith(".py") else model.partition(".")[0]


def counted_value(build: str, column: str) -> Decimal:
    """Parameters in millions (``params``, ``frozen``) or MACs in billions (``macs``), exact."""
    counts = cached_count(build)
    number = {"params": counts["learnable"], "frozen": counts["frozen"], "macs": sum(counts["macs"].values())}[column]
    return Decimal(number) / UNITS[column]


def compare(row: Row, column: str) -> Row:
    """A figure as printed and as counted, their difference and verdict; empty if the row does not print one."""
    if column not in row:
        return dict.fromkeys(("paper", "counted", "difference", "verdict"))
    printed = as_printed(row[column])
    value, digits = counted_value(row["build"], column), printed.digits + 2
    explanation = row.get("explained", {}).get(column)
    if rounded(value, printed.digits) == printed.value:
        verdict = Verdict("equal")
    elif explanation and explains(explanation["as"], row["build"], column, value, printed):
        verdict = explained(explanation)
    else:
        verdict = Verdict("unexplained", row.get("open", {}).get(column, ""))
    difference = Number(value - printed.value, digits, signed=True)
    return {"paper": printed, "counted": Number(value, digits), "difference": difference, "verdict": verdict}


def explained(explanation: Row) -> Verdict:
    sources = f" ({', '.join(explanation['source'])})" if "source" in explanation else ""
    return Verdict("explained", explanation["text"] + sources)


def explains(reason: str, build: str, column: str, value: Decimal, printed: Number) -> bool:
    """Whether the arithmetic of an explanation (``as`` in paper.yaml) turns the count into the printed figure."""
    kind, _, argument = reason.partition(" ")
    if kind == "counted":
        return rounded(value, printed.digits) == Decimal(argument)
    if kind == "truncated":
        return int(value * 10**printed.digits) == int(printed.value * 10**printed.digits)
    if kind == "without":
        counts = cached_count(build)
        left_out = counts[argument] if column == "params" else counts["macs"][argument]
        return rounded(value - Decimal(left_out) / UNITS[column], printed.digits) == printed.value
    if kind == "rounded":
        once = Decimal(argument.removeprefix("from "))
        return rounded(value, printed.digits + 1) == once and rounded(once, printed.digits) == printed.value
    raise ValueError(f"paper.yaml explains a figure by {reason!r}, which is no known reason")

"""The paper's Tables 1 to 7 and the claims of its text, compared with counts and measurements."""

from decimal import Decimal
from typing import Any

import yaml

from metaformer.analysis.cells import Number, Pair, Row, Table, Verdict, as_printed, rounded, spread
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured, metric
from metaformer.analysis.paper import ROOT, UNITS, captions, compare, counted_value, explained, paper, rows_of, table_of
from metaformer.variants import VARIANTS


def columns(table: str, row: Row, measured: Measured) -> Row:
    """The cells of a row of the paper by the columns that captions.yaml gives for its table."""
    cells: Row = {}
    for heading, column in captions()["tables"][table]["columns"].items():
        kind, key = column.split()
        if kind == "compared":
            cells[heading] = compare(row, key)
        elif kind == "accuracy":
            cells[heading] = accuracy(table, row, key, measured)
        elif kind == "counted":
            cells[heading] = Number(counted_value(row["build"], key), 1)
        elif kind == "reported":  # of the released weights, by another project
            told = row.get(key)
            cells[heading] = told and Number(told["top1"] if isinstance(told, dict) else told, 2)
        else:
            cells[heading] = str(row[key])
    return cells


def accuracy(table: str, row: Row, column: str, measured: Measured) -> Pair:
    """A printed accuracy beside the measured one, whose name in records paper.yaml gives as ``metrics``."""
    if column not in row:
        return Pair()
    name = paper()[table]["metrics"][column]
    scale = 100 if name.startswith("coco/") else 1
    return Pair(
        as_printed(row[column]), measured.accuracy(row.get("build"), metric(name, scale), row.get("epochs", 300))
    )


def table1(measured: Measured) -> Table:
    rows = []
    for row in rows_of("table1"):
        arguments = VARIANTS[row["build"]].arguments
        same = list(arguments["depths"]) == row["blocks"] and list(arguments["dims"]) == row["dims"]
        rows.append(
            {
                "model": row["model"],
                "blocks": in_words(row["blocks"]),
                "channels": in_words(row["dims"]),
                "blocks and channels (verdict)": Verdict("equal" if same else "unexplained"),
                **columns("table1", row, measured),
                "parameters, exact": Number(cached_count(row["build"])["learnable"]),
            }
        )
    earlier = paper()["table1"]["other_versions"]["v1_or_v2"]
    versions = ", ".join(f"{earlier[row['model'].removeprefix('PoolFormer-')]} G" for row in rows_of("table1"))
    source = ", ".join(earlier["source"])
    return table_of("table1", rows, f"Version 1 or 2 printed {versions}, counted by another script ({source}).")


def by_columns(table: str, measured: Measured) -> Table:
    return table_of(table, [columns(table, row, measured) for row in rows_of(table)])


def table4(measured: Measured) -> Table:
    rows = []
    for row in rows_of("table4"):
        again = spread(row["again"], 2) if "again" in row else None
        rows.append({**columns("table4", row, measured), "trained again in mmseg 1.x": again})
    return table_of("table4", rows)


def table6(measured: Measured) -> Table:
    recipes = [recipe(name) for name in ("s12", "s24", "s36", "m36", "m48")]
    rows = []
    for row in rows_of("table6"):
        printed, setting = row["printed"], row["setting"]
        if setting is None:
            here, same = row["here"], printed in (0, "off")
        else:
            values = [settings[setting] for settings in recipes]
            per_variant = isinstance(printed, list) and "one" not in row
            here = values if per_variant else values[0]
            same = here == printed and (per_variant or all(value == values[0] for value in values))
        if same:
            verdict = Verdict("equal", row.get("note", ""))
        else:
            verdict = explained(row["explained"]) if "explained" in row else Verdict("unexplained")
        cells = {"hyper-parameter": row["name"], "setting": setting, "paper": in_words(printed)}
        rows.append({**cells, "configs": in_words(here), "verdict": verdict})
    return table_of("table6", rows)


def in_words(value: Any) -> str:
    """A setting as the table shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def recipe(size: str) -> Row:
    """The settings of a PoolFormer's config, its peak learning rate, and the arguments of the model."""
    folder = ROOT / "configs/classification"
    own = yaml.safe_load((folder / f"poolformer_{size}.yaml").read_text(encoding="utf-8"))
    settings = {**yaml.safe_load((folder / own["base"]).read_text(encoding="utf-8")), **own}
    settings["peak_lr"] = settings["base_lr"] * settings["global_batch"] / 1024
    return {**VARIANTS[settings["model"]].arguments, **settings}


def claims(measured: Measured) -> Table:
    rows = []
    for row in rows_of("claims"):
        cells = {"where": row["where"], "claim": row["claim"]}
        printed = as_printed(row["printed"])
        for name, counted in (("printed", False), ("counted", True)):
            of, than = (figure(row[side], counted) for side in ("of", "than"))
            value, arithmetic = {
                "less": (100 * (1 - of / than), f"1 - {of:g} / {than:g}"),
                "more": (100 * (of / than - 1), f"{of:g} / {than:g} - 1"),
                "times": (of / than, f"{of:g} / {than:g}"),
                "minus": (of - than, f"{of:g} - {than:g}"),
            }[row["kind"]]
            shown = verdict = None
            if not counted or row["of"][2] in UNITS:
                result = Number(value, printed.digits + 1, "%" if row["kind"] in ("less", "more") else "")
                shown = f"{arithmetic} = {result}"
                verdict = Verdict("true" if rounded(value, printed.digits) == printed.value else "false")
            cells |= {f"{name} figures": shown, f"{name} figures agree": verdict}
        rows.append({**cells, "note": row.get("note", "")})
    return table_of("claims", rows)


def figure(place: tuple[str, str | int, str], counted: bool) -> Decimal:
    """The figure in a table's row and column, as printed, or as counted where it can be."""
    table, name, column = place
    row = next(row for row in rows_of(table) if name in (row.get("row"), row.get("model"), row.get("epochs")))
    if counted and column in UNITS:
        return rounded(counted_value(row["build"], column), 3)
    return Decimal(str(row[column]))

"""The paper's Tables 1 to 7 and the claims of its text, compared with counts and measurements."""

from decimal import Decimal
from pathlib import Path
from typing import Any

from metaformer.analysis.cells import Number, Pair, Row, Table, Verdict, as_printed, rounded, spread
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import ROOT, UNITS, captions, compare, counted_value, explained, paper, rows_of, table_of
from metaformer.training.config import load_config
from metaformer.variants import VARIANTS


def cells(columns: dict[str, str], table: str, row: Row, measured: Measured) -> Row:
    """The cells of a row of a table of the paper, in ``columns`` of captions.yaml, which explains their kinds."""

    def cell(kind: str, key: str, *options: str) -> Any:
        if kind == "text":
            return in_words(row[key])
        if kind == "file":
            return f"`{Path(row[key]).name}{''.join(options)}`"
        if kind == "layout":
            depths, dims = (list(VARIANTS[row["build"]].arguments[name]) for name in ("depths", "dims"))
            return Verdict("equal" if (depths, dims) == (row["blocks"], row["dims"]) else "unexplained")
        if kind == "compared":
            return compare(row, key)
        if kind == "counted":
            digits, *unit = options
            return Number(counted_value(row["build"], key), int(digits), *unit)
        if kind == "exactly":
            return Number(cached_count(row["build"])[key])
        if kind == "reported":
            told = row.get(key)
            return told and Number(told["top1"] if isinstance(told, dict) else told, 2)
        if kind == "spread":
            return spread(row[key], 2) if key in row else None
        if key not in row:  # an accuracy that the paper does not print
            return Pair() if kind == "accuracy" else None
        metric = paper()[table]["metrics"][key]  # its name in records
        printed, here = as_printed(row[key]), measured.accuracy(row["build"], metric, row.get("epochs", 300))
        shown = {"accuracy": Pair(printed, here), "printed": printed._replace(unit="".join(options)), "here": here}
        return shown[kind]

    found = {}
    for heading, column in columns.items():
        value = cell(*column.split())
        parts = {f"{heading} ({part})": of for part, of in value.items()} if isinstance(value, dict) else {}
        found |= parts or {heading: value}
    return found


def by_columns(table: str, measured: Measured) -> Table:
    columns = captions()["tables"][table]["columns"]
    return table_of(table, [cells(columns, table, row, measured) for row in rows_of(table)])


def table6(measured: Measured) -> Table:
    recipes = [recipe(name) for name in ("s12", "s24", "s36", "m36", "m48")]
    rows = []
    for row in rows_of("table6"):
        printed, setting, explanation = row["printed"], row["setting"], row.get("explained")
        values = [settings[setting] if setting else row["here"] for settings in recipes]
        here = values[0] if all(value == values[0] for value in values) else values
        off = setting is None and printed in (0, "off")
        if off or values in (printed, [printed] * len(recipes)):  # one for each model, or for all
            verdict = Verdict("equal", row.get("note", ""))
        else:
            verdict = explained(explanation) if explanation and here == explanation["as"] else Verdict("unexplained")
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
    settings = load_config([f"{ROOT}/configs/classification/poolformer_{size}.yaml"]).model_dump(mode="json")
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

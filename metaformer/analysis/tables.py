"""The paper's Tables 1 to 7 and the claims of its text, compared with counts and measurements."""

from decimal import Decimal
from typing import Any

import yaml

from metaformer.analysis.cells import Number, Pair, Row, Table, Verdict, as_printed, rounded, spread
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured, Metric, metric, top1
from metaformer.analysis.paper import ROOT, UNITS, compared, counted_value, explained, paper, rows_of
from metaformer.variants import VARIANTS

DETECTION = {
    "AP": "coco/bbox_mAP",
    "AP50": "coco/bbox_mAP_50",
    "AP75": "coco/bbox_mAP_75",
    "APS": "coco/bbox_mAP_s",
    "APM": "coco/bbox_mAP_m",
    "APL": "coco/bbox_mAP_l",
    "mask_AP": "coco/segm_mAP",
    "mask_AP50": "coco/segm_mAP_50",
    "mask_AP75": "coco/segm_mAP_75",
}
"""Columns of Table 3 and mmdet's names of these metrics, which are fractions."""


def table_of(name: str, rows: list[Row], *notes: str) -> Table:
    """A table of the paper with its title and notes, and further notes."""
    return Table(name, paper()[name]["title"], rows, [*paper()[name].get("notes", []), *notes])


def accuracy(row: Row, column: str, measured: Measured, metric: Metric, epochs: int = 300) -> Pair:
    if column not in row:
        return Pair()
    return Pair(as_printed(row[column]), measured.accuracy(row.get("build"), metric, epochs))


def macs(row: Row) -> Number:
    return Number(counted_value(row["build"], "macs"), 1)


def in_others(row: Row, *keys: str) -> Number | None:
    """An accuracy of the released weights that another project reports."""
    for key in keys:
        row = row.get(key, {})
    return Number(row, 2) if row else None


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
                **compared(row, "params", "macs"),
                "parameters, exact": Number(cached_count(row["build"])["learnable"]),
            }
        )
    earlier = paper()["table1"]["other_versions"]["v1_or_v2"]
    versions = ", ".join(f"{earlier[row['model'].removeprefix('PoolFormer-')]} G" for row in rows_of("table1"))
    return table_of(
        "table1",
        rows,
        "MACs at 224 pixels, by fvcore, as in version 3 of the paper.",
        f"Version 1 or 2 printed {versions}, counted by another script ({', '.join(earlier['source'])}).",
    )


def table2(measured: Measured) -> Table:
    rows = [
        {
            "model": row["model"],
            "token mixer": row["mixer"],
            "image": str(row["image"]),
            **compared(row, "params", "macs"),
            "top-1, %": accuracy(row, "top1", measured, top1),
            "released weights in timm": in_others(row, "timm", "top1"),
            "in mmpretrain": in_others(row, "mmpretrain"),
        }
        for row in rows_of("table2")
    ]
    quoted = " and ".join(paper()["sources"][source] for source in ("TIMM", "MMPRETRAIN"))
    return table_of("table2", rows, f"Released weights as evaluated by others: {quoted}.")


def table3(measured: Measured) -> Table:
    rows = [
        {
            "head": row["head"],
            "backbone": row["backbone"],
            **compared(row, "params"),
            "MACs, G (counted)": macs(row),
            **{
                f"{column.replace('_', ' ')}, %": accuracy(row, column, measured, metric(key, 100))
                for column, key in DETECTION.items()
            },
        }
        for row in rows_of("table3")
    ]
    how = (
        "MACs at 800 x 1280 pixels by fvcore, Mask R-CNN's second stage on 1000 boxes and 100 masks without RoIAlign; "
        "the paper gives none."
    )
    return table_of("table3", rows, how)


def table4(measured: Measured) -> Table:
    rows = [
        {
            "backbone": row["model"],
            **compared(row, "params"),
            "MACs, G (counted)": macs(row),
            "mIoU, %": accuracy(row, "mIoU", measured, metric("mIoU")),
            "released weights in mmseg": in_others(row, "mmseg"),
            "trained again in mmseg 1.x": spread(row["again"], 2) if "again" in row else None,
        }
        for row in rows_of("table4")
    ]
    return table_of(
        "table4",
        rows,
        "MACs at 512 x 512 pixels by fvcore; the paper gives none.",
        f"Released weights as evaluated by others: {paper()['sources']['MMSEG']}, pull request 1537.",
        "Trained again in mmseg 1.x: median (lowest to highest) of five runs by others, in its pull request 2191.",
    )


def table5(measured: Measured) -> Table:
    rows = [
        {
            "ablation": row["group"],
            "variant": row["variant"],
            "model": row["build"],
            **compared(row, "params", "frozen", "macs"),
            "top-1, %": accuracy(row, "top1", measured, top1),
        }
        for row in rows_of("table5")
    ]
    return table_of("table5", rows)


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
    note = "configs: configs/classification/poolformer_*.yaml; lists are for S12, S24, S36, M36 and M48."
    return table_of("table6", rows, note)


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


def table7(measured: Measured) -> Table:
    rows = [
        {"epochs": str(row["epochs"]), "top-1, %": accuracy(row, "top1", measured, top1, row["epochs"])}
        for row in rows_of("table7")
    ]
    return table_of("table7", rows)


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
    note = "Counted figures are rounded to thousandths of a million parameters and of a billion MACs."
    return table_of("claims", rows, note)


def figure(place: tuple[str, str | int, str], counted: bool) -> Decimal:
    """The figure in a table's row and column, as printed, or as counted where it can be."""
    table, name, column = place
    row = next(row for row in rows_of(table) if name in (row.get("id"), row.get("model"), row.get("epochs")))
    if counted and column in UNITS:
        return rounded(counted_value(row["build"], column), 3)
    return Decimal(str(row[column]))

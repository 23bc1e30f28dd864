"""Every file that is generated from data, and what is to be in it: tables, README sections, recipes of Table 5."""

from pathlib import Path

from metaformer.analysis.cells import Number, Row, Table
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured, metric, top1
from metaformer.analysis.paper import BUILT, ROOT, as_printed, counted_value, rows_of
from metaformer.analysis.render import markdown, render, with_section
from metaformer.analysis.speed import beside_timm, cost, loader, speed
from metaformer.analysis.studies import conclusions, fault_rows, faults, proxy, verdicts
from metaformer.analysis.tables import (
    DETECTION,
    accuracy,
    claims,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
)
from metaformer.training.config import settings_table
from metaformer.variants import ABLATIONS, ablation_config

TABLES = {
    make.__name__: make
    for make in (
        *(table1, table2, table3, table4, table5, table6, table7),
        *(claims, cost, speed, loader, proxy, conclusions, faults),
    )
}
"""Each makes a :class:`Table` of what was :class:`Measured`; its name is that of the files."""

AVERAGE_PRECISION = (("box AP", "AP"), ("mask AP", "mask_AP"))


def builds_of(tables: list[str]) -> list[str]:
    """The models that these tables count, each once."""
    counted = {name: (name,) for name in BUILT} | {"claims": ("table2", "table5")}
    rows = [row for name in tables for table in counted.get(name, ()) for row in rows_of(table)]
    return list(dict.fromkeys(row["build"] for row in rows if "build" in row))


def outputs(tables: dict[str, Table], formats: list[str], measured: Measured) -> dict[Path, str]:
    """Path and text of every file that the tables make."""
    folder = ROOT / "analysis/tables"
    files = {folder / f"{name}.{form}": render(table, form) for name, table in tables.items() for form in formats}
    for (readme, section), content in sections(tables, measured).items():
        path = ROOT / readme
        text = files.get(path) or path.read_text(encoding="utf-8")
        files[path] = with_section(text, section, content, path)
    if "table5" in tables:
        for row in rows_of("table5"):
            if row["build"] in ABLATIONS:
                path = ROOT / f"configs/ablations/{row['build']}.yaml"
                files[path] = ablation_config(row["build"], row["top1"])
    return files


def sections(tables: dict[str, Table], measured: Measured) -> dict[tuple[str, str], str]:
    """(README file, name of the section) to its text, for the sections that the tables at hand fill."""
    makers = {
        "table2": ("README.md", "imagenet", imagenet),
        "table3": ("detection/README.md", "coco", coco),
        "table4": ("segmentation/README.md", "ade20k", ade20k),
        "table5": ("classification/README.md", "ablation", ablation),
        "table6": ("classification/README.md", "settings", lambda measured: settings_table()),
        "speed": ("README.md", "speed", benchmarks),
        "conclusions": ("README.md", "conclusions", verdicts),
        "faults": ("README.md", "faults", lambda measured: markdown(fault_rows(measured))),
    }
    found = {(readme, name): make(measured) for table, (readme, name, make) in makers.items() if table in tables}
    if tables.keys() == TABLES.keys():
        found["analysis/README.md", "summary"] = "\n".join(f"- {table.summary()}" for table in tables.values())
    return found


def imagenet(measured: Measured) -> str:
    rows = []
    for row in rows_of("table2"):
        if row["mixer"] == "pooling":
            exact = Number(cached_count(row["build"])["learnable"])
            first = {"config (`configs/classification/`)": f"`{row['build']}.yaml`", "parameters": exact}
            rows.append({**first, "MACs": counted(row, "macs", 2), **top1_of(row, measured, " (Table 2)")})
    return markdown(rows)


def ablation(measured: Measured) -> str:
    return markdown(
        [
            {
                "Table 5": row["variant"],
                "model": f"`{row['build']}`",
                "parameters": counted(row, "params", 2),
                "MACs": counted(row, "macs", 2),
                **top1_of(row, measured),
            }
            for row in rows_of("table5")
        ]
    )


def top1_of(row: Row, measured: Measured, table: str = "") -> Row:
    printed = as_printed(row["top1"], "%")
    return {f"top-1 in the paper{table}": printed, "measured here": measured.accuracy(row["build"], top1)}


def coco(measured: Measured) -> str:
    rows = []
    for row in rows_of("table3"):
        pairs = {name: accuracy(row, of, measured, metric(DETECTION[of], 100)) for name, of in AVERAGE_PRECISION}
        rows.append(
            {
                **config_of(row),
                **{f"{name} in the paper": pair.paper for name, pair in pairs.items()},
                **{f"{name} measured here": pair.here for name, pair in pairs.items()},
            }
        )
    return markdown(rows)


def ade20k(measured: Measured) -> str:
    rows = []
    for row in rows_of("table4"):
        pair = accuracy(row, "mIoU", measured, metric("mIoU"))
        rows.append({**config_of(row), "mIoU in the paper": pair.paper, "measured here": pair.here})
    return markdown(rows)


def config_of(row: Row) -> Row:
    path = Path(row["build"])
    return {f"config (`{path.parent}/`)": f"`{path.name}`", "parameters": counted(row, "params", 1)}


def counted(row: Row, column: str, digits: int) -> Number:
    return Number(counted_value(row["build"], column), digits, {"params": "M", "macs": "G"}[column])


def benchmarks(measured: Measured) -> str:
    return markdown([row for record in measured.records["benchmark"] for row in beside_timm(record)])

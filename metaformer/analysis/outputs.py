"""Every file that is generated from data, and what is to be in it: tables, README sections, recipes of Table 5."""

from pathlib import Path

from metaformer.analysis.cells import Number, Row, Table
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured, metric, top1
from metaformer.analysis.paper import BUILT, ROOT, as_printed, counted_value, rows_of
from metaformer.analysis.render import markdown, render, with_section
from metaformer.analysis.speed import beside_timm, cost, loader, speed
from metaformer.analysis.studies import conclusions, fault_rows, faults, proxy, verdicts
from metaformer.analysis.tables import DETECTION, claims, table1, table2, table3, table4, table5, table6, table7
from metaformer.variants import ABLATIONS, ablation_config

TABLES = {
    make.__name__: make
    for make in (
        *(table1, table2, table3, table4, table5, table6, table7),
        *(claims, cost, speed, loader, proxy, conclusions, faults),
    )
}
"""Each makes a :class:`Table` of what was :class:`Measured`; its name is that of the files."""


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
        "speed": ("README.md", "speed", benchmarks),
        "conclusions": ("README.md", "conclusions", verdicts),
        "faults": ("README.md", "faults", lambda measured: markdown(fault_rows(measured))),
    }
    found = {(readme, name): make(measured) for table, (readme, name, make) in makers.items() if table in tables}
    if tables.keys() == TABLES.keys():
        found["analysis/README.md", "summary"] = "\n".join(f"- {table.summary()}" for table in tables.values())
    return found


def counts(row: Row, digits: int) -> Row:
    return {
        "parameters": Number(counted_value(row["build"], "params"), digits, "M"),
        "MACs": Number(counted_value(row["build"], "macs"), digits, "G"),
    }


def imagenet(measured: Measured) -> str:
    return markdown(
        [
            {
                "config (`configs/classification/`)": f"`{row['build']}.yaml`",
                **counts(row, 2),
                "parameters": Number(cached_count(row["build"])["learnable"]),
                "top-1 in the paper (Table 2)": as_printed(row["top1"], "%"),
                "measured here": measured.accuracy(row["build"], top1),
            }
            for row in rows_of("table2")
            if row["mixer"] == "pooling"
        ]
    )


def ablation(measured: Measured) -> str:
    return markdown(
        [
            {
                "Table 5": row["variant"],
                "model": f"`{row['build']}`",
                **counts(row, 2),
                "top-1 in the paper": as_printed(row["top1"], "%"),
                "measured here": measured.accuracy(row["build"], top1),
            }
            for row in rows_of("table5")
        ]
    )


def coco(measured: Measured) -> str:
    rows = []
    for row in rows_of("table3"):
        cells = {
            "config (`configs/detection/`)": f"`{Path(row['build']).name}`",
            "parameters": counts(row, 1)["parameters"],
        }
        kinds = {"box AP": "AP", "mask AP": "mask_AP"}
        for name, column in kinds.items():
            cells[f"{name} in the paper"] = as_printed(row[column]) if column in row else None
        for name, column in kinds.items():
            here = measured.accuracy(row["build"], metric(DETECTION[column], 100))
            cells[f"{name} measured here"] = here if column in row else None
        rows.append(cells)
    return markdown(rows)


def ade20k(measured: Measured) -> str:
    return markdown(
        [
            {
                "config (`configs/segmentation/`)": f"`{Path(row['build']).name}`",
                "parameters": counts(row, 1)["parameters"],
                "mIoU in the paper": as_printed(row["mIoU"]),
                "measured here": measured.accuracy(row["build"], metric("mIoU")),
            }
            for row in rows_of("table4")
        ]
    )


def benchmarks(measured: Measured) -> str:
    return markdown([row for record in measured.records["benchmark"] for row in beside_timm(record)])

"""Generate all files that are made from data: tables, the report, README sections, recipes and the metafile."""

from pathlib import Path

from metaformer.analysis.cells import Table
from metaformer.analysis.measured import Measured
from metaformer.analysis.metafile import metafile
from metaformer.analysis.paper import BUILT, ROOT, rows_of
from metaformer.analysis.readme import sections
from metaformer.analysis.render import render, with_section
from metaformer.analysis.report import report
from metaformer.analysis.speed import cost, fastest, loader, parity, speed
from metaformer.analysis.studies import conclusions, faults, proxy
from metaformer.analysis.tables import claims, table1, table2, table3, table4, table5, table6, table7
from metaformer.variants import ABLATIONS, ablation_config

TABLES = {
    make.__name__: make
    for make in (
        *(table1, table2, table3, table4, table5, table6, table7),
        *(claims, cost, speed, fastest, loader, proxy, conclusions, faults, parity),
    )
}
"""Functions from :class:`Measured` to :class:`Table`, by the name of the table and its files."""


def builds_of(tables: list[str]) -> list[str]:
    """The models whose parameters and MACs appear in these tables."""
    counted = {name: (name,) for name in BUILT} | {"claims": ("table2", "table5")}
    rows = [row for name in tables for table in counted.get(name, ()) for row in rows_of(table)]
    return list(dict.fromkeys(row["build"] for row in rows))


def outputs(tables: dict[str, Table], formats: list[str], measured: Measured) -> dict[Path, str]:
    """Path and text of every generated file."""
    folder = ROOT / "analysis/tables"
    files = {folder / f"{name}.{form}": render(table, form) for name, table in tables.items() for form in formats}
    complete = tables.keys() == TABLES.keys()
    for (readme, section), content in sections(tables, measured, complete).items():
        path = ROOT / readme
        text = files.get(path) or path.read_text(encoding="utf-8")
        files[path] = with_section(text, section, content, path)
    if "table5" in tables:
        for row in rows_of("table5"):
            if row["build"] in ABLATIONS:
                path = ROOT / f"configs/ablations/{row['build']}.yaml"
                files[path] = ablation_config(row["build"], row["top1"])
    if complete:
        files[ROOT / "configs/classification/metafile.yml"] = metafile()
        files[ROOT / "analysis/report.html"] = report(tables, measured)
    return files

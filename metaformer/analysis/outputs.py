"""Generate all files that are made from data: tables, the report, README sections, recipes and the metafile."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from metaformer.analysis.cells import Table
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import ROOT, paper, rows_of
from metaformer.analysis.readme import sections
from metaformer.analysis.render import TEMPLATES, render, with_section
from metaformer.analysis.report import report
from metaformer.analysis.speed import cost, fastest, loader, parity, speed
from metaformer.analysis.studies import conclusions, faults, proxy
from metaformer.analysis.tables import by_columns, claims, table6
from metaformer.variants import ABLATIONS, RELEASES, VARIANTS

TABLES: dict[str, Callable[[Measured], Table]] = {
    **{f"table{number}": partial(by_columns, f"table{number}") for number in range(1, 8)},
    "table6": table6,
    **{make.__name__: make for make in (claims, cost, speed, fastest, loader, proxy, conclusions, faults, parity)},
}
"""Functions from :class:`Measured` to :class:`Table`, by the name of the table and its files."""


def outputs(tables: dict[str, Table], formats: list[str], measured: Measured) -> dict[Path, str]:
    """Path and text of every generated file."""
    folder = ROOT / "analysis/tables"
    files = {folder / f"{name}.{form}": render(table, form) for name, table in tables.items() for form in formats}
    complete = tables.keys() == TABLES.keys()
    for (readme, section), content in sections(tables, measured, complete).items():
        path = ROOT / readme
        text = files.get(path) or path.read_text(encoding="utf-8")
        files[path] = with_section(text, section, content, path)
    recipe = TEMPLATES.get_template("ablation.yaml")
    if "table5" in tables:
        for row in rows_of("table5"):
            if row["build"] in ABLATIONS:
                path = ROOT / f"configs/ablations/{row['build']}.yaml"
                files[path] = recipe.render(row=row, variant=VARIANTS[row["build"]]) + "\n"
    if complete:
        files[ROOT / "configs/classification/metafile.yml"] = metafile()
        files[ROOT / "analysis/report.html"] = report(tables, measured)
    return files


def metafile() -> str:
    """The models of Table 2 and of the ablation as OpenMMLab lists its own."""
    rows = [(2, row) for row in rows_of("table2") if row["build"] in VARIANTS]
    rows += [(5, row) for row in rows_of("table5") if row["build"] in ABLATIONS]
    models = [(table, row, cached_count(row["build"]), VARIANTS[row["build"]]) for table, row in rows]
    return TEMPLATES.get_template("metafile.yml").render(models=models, paper=paper()["paper"], releases=RELEASES)

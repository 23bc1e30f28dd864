"""Generate all files that are made from data: tables, the report, README sections, recipes and the metafile."""

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from metaformer.analysis.cells import TEMPLATES, Number, Pair, Table, markdown, render, state, with_notes
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import ROOT, captions, paper, rows_of
from metaformer.analysis.speed import beside_timm, cost, fastest, loader, parity, speed
from metaformer.analysis.studies import conclusions, cost_of, faults, missing_of, proxy
from metaformer.analysis.tables import by_columns, cells, claims, table6
from metaformer.errors import InputError
from metaformer.records.schema import Parity
from metaformer.records.statistics import Results
from metaformer.training.config import settings_table
from metaformer.variants import ABLATIONS, LABELS, RELEASES, ROWS, VARIANTS

NUMBERED = [f"table{number}" for number in range(1, 8)]
TABLES: dict[str, Callable[[Measured], Table]] = {
    **{name: partial(by_columns, name) for name in NUMBERED},
    "table6": table6,
    **{make.__name__: make for make in (claims, cost, speed, fastest, loader, proxy, conclusions, faults, parity)},
}
"""Functions from :class:`Measured` to :class:`Table`, by the name of the table and its files."""
WIDTH, HEIGHT = 200, 100
"""Size of a panel of curves in the units of its SVG."""
SECTIONS = TEMPLATES.get_template("sections.md").module


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


def with_section(text: str, name: str, content: str, path: Any) -> str:
    """Put ``content`` between the markers of section ``name`` in ``text``, the text of the file ``path``.

    Raises:
        InputError: the text does not have these markers exactly once.
    """
    begin, end = f"<!-- begin {name}: written by analysis/make_tables.py -->\n", f"<!-- end {name} -->"
    section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(section.findall(text)) != 1:
        raise InputError(f"{path} has no section {name!r}: put the lines {begin.strip()} and {end} around its place")
    return section.sub(lambda _: f"{begin}{content}\n{end}", text)


def metafile() -> str:
    """The models of Table 2 and of the ablation as OpenMMLab lists its own."""
    rows = [(2, row) for row in rows_of("table2") if row["build"] in VARIANTS]
    rows += [(5, row) for row in rows_of("table5") if row["build"] in ABLATIONS]
    models = [(table, row, cached_count(row["build"]), VARIANTS[row["build"]]) for table, row in rows]
    return TEMPLATES.get_template("metafile.yml").render(models=models, paper=paper()["paper"], releases=RELEASES)


# Sections of README files


def sections(tables: dict[str, Table], measured: Measured, complete: bool) -> dict[tuple[str, str], str]:
    """Texts of the README sections that depend on the given tables, by (README file, name of the section).

    Args:
        complete: whether ``tables`` are all tables, which the summaries need.
    """
    found = {}
    for name, section in captions()["sections"].items():
        table = section["table"]
        if table in tables:
            rows = [row for row in rows_of(table) if row.get("mixer") == section.get("mixer", row.get("mixer"))]
            shown = [cells(section["columns"], table, row, measured) for row in rows]
            found[section["file"], name] = markdown(shown)
    if "table6" in tables:
        found["classification/README.md", "settings"] = settings_table()
    if "speed" in tables:
        found["README.md", "speed"] = speed_in_short(measured)
    if "conclusions" in tables:
        found["README.md", "conclusions"] = conclusions_in_short(tables, measured)
    if "faults" in tables:
        totals = [row for row in tables["faults"].rows if row["fault"] == "all"]
        found["README.md", "faults"] = SECTIONS.faults(totals).strip()
    if complete:
        found["README.md", "status"] = status(tables, measured)
        found["analysis/README.md", "summary"] = "\n".join(f"- {table.summary()}" for table in tables.values())
    return found


def status(tables: dict[str, Table], measured: Measured) -> str:
    """The state of the reproduction in six list items."""
    counts = sum((tables[name].verdicts() for name in NUMBERED[:5]), Counter())
    pairs = [cell for name in NUMBERED for row in tables[name].rows for cell in row.values() if isinstance(cell, Pair)]
    accuracies = [pair.here.value for pair in pairs if pair.paper]
    asked = tables["conclusions"].rows
    return SECTIONS.status(
        counts=counts,
        recipe=tables["table6"].verdicts(),
        parity=list(map(official_code, measured.records["parity"][-1:])),
        done=len(accuracies) - accuracies.count(None),
        planned=len(accuracies),
        decided=len({each["statement"] for each in asked if each["verdict"].kind in ("holds", "fails")}),
        asked=len({each["statement"] for each in asked}),
        partial={name: of for name, results in measured.studies.items() if (of := missing_of(results))[0]},
        devices={device for _, device, _, _ in beside_timm(measured)},
    ).strip()


def official_code(record: Parity) -> dict[str, Any]:
    models = {of.part for of in record.compared} - {"recipe"}
    run = max((run for run in record.trajectories if run.dtype == "float64"), key=lambda run: max(run.weights))
    largest = max(of.difference for of in record.compared if of.part in models)
    return {"models": len(models), "largest": largest, "weights": run.weights}


def speed_in_short(measured: Measured) -> str:
    """Ranges of the speed relative to timm's class over all measured batches, sizes, precisions and layouts."""
    place = ["model", "device", "task"]
    lines = []
    for of, ratios in pd.DataFrame(beside_timm(measured), columns=[*place, "ratio"]).groupby(place)["ratio"]:
        slowest, fastest = Number(min(ratios), 2), Number(max(ratios), 2)
        numbers = {"settings": len(ratios), "slowest setting": slowest, "fastest setting": fastest}
        lines.append(dict(zip(place, of, strict=True)) | numbers)
    return markdown(lines)


def conclusions_in_short(tables: dict[str, Table], measured: Measured) -> str:
    """The cost of each study, how many statements hold in it, and those that Holm's correction decides."""
    studies = []
    for name, results in measured.studies.items():
        asked = [row for row in tables["conclusions"].rows if row["study"] == name]
        kinds = Counter(each["verdict"].kind for each in asked), Counter(each["after Holm"] for each in asked)
        decided = [each for each in asked if each["after Holm"] in ("holds", "fails")]
        studies.append((name, cost_of(name, results), *kinds, decided))
    return SECTIONS.conclusions(studies).strip()


# The report


def report(tables: dict[str, Table], measured: Measured) -> str:
    """The page, complete without network: styles, script and figures are in it."""
    page = TEMPLATES.get_template("report.html").render(
        tables=[(table, *with_notes(table), list(map(state, table.rows))) for table in tables.values()],
        figures=[
            (b64encode(path.read_bytes()).decode(), caption)
            for name, caption in captions()["figures"].items()
            if (path := ROOT / f"analysis/figures/{name}.svg").exists()
        ],
        studies=[curves(name, results) for name, results in measured.studies.items()],
        width=WIDTH,
        height=HEIGHT,
    )
    return page + "\n"


def curves(name: str, results: Results) -> dict[str, Any]:
    """Panels of top-1 over the epochs, one for each row, with the baseline's runs in each."""
    values = [epoch.top1 for record in results.records for epoch in record.curve] or [0.0]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.floor(max(values) / 10 + 1)
    last = max(len(record.curve) for record in results.records)

    def lines(row: str) -> Iterator[str]:
        for record in results.records:
            if record.settings.row == row and record.curve:
                yield " ".join(
                    f"{i * WIDTH / max(last - 1, 1):.1f},{(high - epoch.top1) / (high - low) * HEIGHT:.1f}"
                    for i, epoch in enumerate(record.curve)
                )

    panels = [
        {
            "label": f"{row}: {LABELS[row]}",
            "lines": list(lines(row)),
            "baseline": list(lines("baseline")),
            "top1": ", ".join(str(Number(top1, 1)) for top1 in runs["top1"]),
            "diverged": runs["diverged"].sum(),
        }
        for row in ROWS
        if len(runs := results.runs[results.runs["row"] == row].sort_values("seed"))
    ]
    return {"name": name, "title": results.study.title, "low": low, "high": high, "last": last, "panels": panels}

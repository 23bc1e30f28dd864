"""The sections of the README files that are generated from data."""

from collections import Counter
from typing import Any

import pandas as pd

from metaformer.analysis.cells import Number, Pair, Table
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import captions, rows_of
from metaformer.analysis.render import TEMPLATES, markdown
from metaformer.analysis.speed import beside_timm
from metaformer.analysis.studies import cost_of, fault_rows, judged, missing_of
from metaformer.analysis.tables import cells
from metaformer.records.schema import Parity
from metaformer.training.config import settings_table

SECTIONS = TEMPLATES.get_template("sections.md").module


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
    makers = {
        "table6": ("classification/README.md", "settings", lambda measured: settings_table()),
        "speed": ("README.md", "speed", speed),
        "conclusions": ("README.md", "conclusions", conclusions),
        "faults": ("README.md", "faults", faults),
    }
    found |= {(readme, name): make(measured) for table, (readme, name, make) in makers.items() if table in tables}
    if complete:
        found["README.md", "status"] = status(tables, measured)
        found["analysis/README.md", "summary"] = "\n".join(f"- {table.summary()}" for table in tables.values())
    return found


def status(tables: dict[str, Table], measured: Measured) -> str:
    """The state of the reproduction in six list items."""
    counts = sum((tables[name].verdicts() for name in NUMBERED[:5]), Counter())
    pairs = [cell for name in NUMBERED for row in tables[name].rows for cell in row.values() if isinstance(cell, Pair)]
    accuracies = [pair.here.value for pair in pairs if pair.paper]
    asked = list(judged(measured))
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


NUMBERED = [f"table{number}" for number in range(1, 8)]


def speed(measured: Measured) -> str:
    """Ranges of the speed relative to timm's class over all measured batches, sizes, precisions and layouts."""
    place = ["model", "device", "task"]
    ratios = pd.DataFrame(beside_timm(measured), columns=[*place, "ratio"]).groupby(place)["ratio"]
    lines = [
        {
            **dict(zip(place, of, strict=True)),
            "settings": Number(len(values)),
            "slowest setting": Number(min(values), 2),
            "fastest setting": Number(max(values), 2),
        }
        for of, values in ratios
    ]
    return markdown(lines)


def conclusions(measured: Measured) -> str:
    """The cost of each study, how many statements hold in it, and those that Holm's correction decides."""
    studies = []
    for name, results in measured.studies.items():
        asked = [each for each in judged(measured) if each["study"] == name]
        kinds = Counter(each["verdict"].kind for each in asked), Counter(each["after Holm"] for each in asked)
        decided = [each for each in asked if each["after Holm"] in ("holds", "fails")]
        studies.append((name, cost_of(name, results), *kinds, decided))
    return SECTIONS.conclusions(studies).strip()


def faults(measured: Measured) -> str:
    return SECTIONS.faults(fault_rows(measured)[-1:]).strip()

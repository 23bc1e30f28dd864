"""All tables and figures, and the training curves of the studies, as one page: ``analysis/report.html``."""

import math
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

from metaformer.analysis.cells import NOT_RUN, Number, Row, Table, Verdict, places
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import ROOT, captions
from metaformer.analysis.render import TEMPLATES, with_notes
from metaformer.records.statistics import Results
from metaformer.variants import LABELS, ROWS

WIDTH, HEIGHT = 200, 100
"""Size of a panel of curves in the units of its SVG."""


def report(tables: dict[str, Table], measured: Measured) -> str:
    """The page, complete without network: styles, script and figures are in it."""
    page = TEMPLATES.get_template("report.html").render(
        tables=[section(table) for table in tables.values()],
        figures=[
            (b64encode(path.read_bytes()).decode(), caption)
            for name, caption in captions()["figures"].items()
            if (path := ROOT / f"analysis/figures/{name}.svg").exists()
        ],
        studies=[study(name, results) for name, results in measured.studies.items()],
        width=WIDTH,
        height=HEIGHT,
    )
    return page + "\n"


def section(table: Table) -> dict[str, Any]:
    body, notes = with_notes(table)
    rows = list(zip(map(state, table.rows), body.to_numpy().tolist(), strict=True))
    number = f"Table {table.name[5:]}: " if table.name.startswith("table") else ""
    return {
        "name": table.name,
        "title": number + table.title,
        "summary": table.summary().partition(": ")[2],
        "columns": list(body.columns),
        "rows": rows,
        "notes": notes,
    }


def state(row: Row) -> str:
    """Whether a row that needs measurements has any: ``measured`` or ``not run``; empty for other rows."""
    found = [place.value is not None for place in places(row)]
    found += [cell.kind != NOT_RUN for cell in row.values() if isinstance(cell, Verdict) and cell.kind in JUDGED]
    return "" if not found else "measured" if any(found) else NOT_RUN


JUDGED = ("holds", "fails", "undecided", NOT_RUN)


def study(name: str, results: Results) -> dict[str, Any]:
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

"""The sections of the README files that are generated from data."""

from collections import Counter
from pathlib import Path

from metaformer.analysis.cells import Counted, Number, Pair, Row, Table, Verdict
from metaformer.analysis.count import cached_count
from metaformer.analysis.measured import Measured, metric, top1
from metaformer.analysis.paper import as_printed, counted_value, rows_of
from metaformer.analysis.render import markdown
from metaformer.analysis.speed import beside_timm
from metaformer.analysis.studies import cost_of, fault_rows, judged
from metaformer.analysis.tables import DETECTION, accuracy
from metaformer.records.schema import Parity
from metaformer.training.config import settings_table

AVERAGE_PRECISION = (("box AP", "AP"), ("mask AP", "mask_AP"))


def sections(tables: dict[str, Table], measured: Measured, complete: bool) -> dict[tuple[str, str], str]:
    """Texts of the README sections that depend on the given tables, by (README file, name of the section).

    Args:
        complete: whether ``tables`` are all tables, which the summaries need.
    """
    makers = {
        "table2": ("README.md", "imagenet", imagenet),
        "table3": ("detection/README.md", "coco", coco),
        "table4": ("segmentation/README.md", "ade20k", ade20k),
        "table5": ("classification/README.md", "ablation", ablation),
        "table6": ("classification/README.md", "settings", lambda measured: settings_table()),
        "speed": ("README.md", "speed", speed),
        "conclusions": ("README.md", "conclusions", conclusions),
        "faults": ("README.md", "faults", faults),
    }
    found = {(readme, name): make(measured) for table, (readme, name, make) in makers.items() if table in tables}
    if complete:
        found["README.md", "status"] = status(tables, measured)
        found["analysis/README.md", "summary"] = "\n".join(f"- {table.summary()}" for table in tables.values())
    return found


def official_code(record: Parity) -> str:
    models = {of.part for of in record.compared} - {"recipe"}
    largest = max(of.difference for of in record.compared if of.part in models)
    run = max((run for run in record.trajectories if run.dtype == "float64"), key=lambda run: max(run.weights))
    return (
        f"- **Official code**: logits and gradients of {len(models)} released architectures equal its own to "
        f"{largest:.1e} (float64), and so do weights after each of {len(run.weights)} training steps, to "
        f"{max(run.weights):.1e}; see [analysis/tables/parity.md](analysis/tables/parity.md)."
    )


def status(tables: dict[str, Table], measured: Measured) -> str:
    """What is reproduced and what is not, in six list items."""
    counts, recipe = (verdicts(tables[name] for name in names) for names in (NUMBERED[:5], NUMBERED[5:6]))
    pairs = [cell for name in NUMBERED for row in tables[name].rows for cell in row.values() if isinstance(cell, Pair)]
    accuracies = [pair.here.value for pair in pairs if pair.paper]
    measured_here = len(accuracies) - accuracies.count(None)
    asked = list(judged(measured))
    decided = {each.statement for each in asked if each.verdict.kind in ("holds", "fails")}
    devices = {device for _, device, _, _ in beside_timm(measured)}
    lines = [
        "- **Architecture**: with the same weights, logits, features and gradients equal those of timm's and "
        "`transformers`' PoolFormer (float64, to 1e-10).",
        *map(official_code, measured.records["parity"][-1:]),
        f"- **Counts**: {counts['equal']} of {sum(counts.values())} parameters, MACs and layouts in Tables 1 to 5 "
        f"equal the printed figures. {counts['explained']} differ for a known reason and {counts['unexplained']} "
        "without one.",
        f"- **Recipe**: {recipe['equal']} of {sum(recipe.values())} settings in Table 6 are the paper's, and "
        f"{recipe['explained']} differ for a stated reason.",
        f"- **Accuracy**: {measured_here} of {len(accuracies)} accuracies in Tables 2 to 5 and 7 are measured here. "
        "Nothing has been trained at the scale of the paper; `pretrained=True` loads its authors' weights.",
        f"- **Small scale**: {len(decided)} of {len({each.statement for each in asked})} statements about the ablation "
        "are decided by a study on a small task. "
        f"Speed is measured on {', '.join(sorted(devices)) or 'no device'} only.",
    ]
    return "\n".join(lines)


NUMBERED = [f"table{number}" for number in range(1, 8)]


def verdicts(tables: list[Table]) -> Counter[str]:
    cells = [cell for table in tables for row in table.rows for cell in row.values()]
    found = [cell.verdict if isinstance(cell, Counted) else cell for cell in cells]
    return Counter(verdict.kind for verdict in found if isinstance(verdict, Verdict))


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


def speed(measured: Measured) -> str:
    """Ranges of the speed relative to timm's class over all measured batches, sizes, precisions and layouts."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for *place, ratio in beside_timm(measured):
        ratios.setdefault(tuple(place), []).append(ratio)
    lines = [
        {
            **dict(zip(("model", "device", "task"), place, strict=True)),
            "settings": Number(len(values)),
            "slowest setting": Number(min(values), 2),
            "fastest setting": Number(max(values), 2),
        }
        for place, values in sorted(ratios.items())
    ]
    return markdown(lines) if lines else "Not measured yet."


def conclusions(measured: Measured) -> str:
    """The cost of each study, and how many statements hold in it."""
    lines = []
    for name, results in measured.studies.items():
        kinds = Counter(each.verdict.kind for each in judged(measured) if each.study == name)
        corrected = Counter(each.after_holm for each in judged(measured) if each.study == name)
        lines.append(f"- {cost_of(name, results)}")
        lines.append(
            f"- {name}: of {sum(kinds.values())} statements, {kinds['holds']} hold, {kinds['fails']} fail, "
            f"{kinds['undecided']} are undecided, and {kinds['not run']} are not run. After Holm's correction for the "
            f"number of statements, {corrected['holds']} hold and {corrected['fails']} fail."
        )
    return "\n".join(lines) or "Not run yet."


def faults(measured: Measured) -> str:
    rows = fault_rows(measured)
    if not rows:
        return "Not measured yet."
    total = rows[-1]
    return (
        f"`make faults` injected {total['tried']} faults. It killed training runs at random moments, filled disks,\n"
        "took away pictures and processes, and corrupted checkpoints, weights, configs and records.\n"
        f"{total['survived']} faults were survived and {total['lost']} were not; see\n"
        "[analysis/tables/faults.md](analysis/tables/faults.md) for each fault and the definition of 'survived'."
    )

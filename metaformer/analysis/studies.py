"""Tables of studies on small tasks and of fault campaigns."""

from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from statistics import mean

from metaformer.analysis.cells import NOT_MEASURED, NOT_RUN, Mean, Measurement, Number, Range, Row, Table, Verdict
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import rows_of, table_of
from metaformer.records.statistics import Interval, Results, holm, statements
from metaformer.variants import LABELS, ROWS


def proxy(measured: Measured) -> Table:
    rows, notes = [], []
    for name, results in measured.studies.items():
        rows += [study_row(name, row, results) for row in ROWS if row in {*results.study.rows, *results.top1}]
        notes += study_notes(name, results)
    table = table_of("proxy", rows)
    return table._replace(notes=[*notes, *table.notes])


def paper_top1() -> dict[str, Decimal]:
    """Top-1 in Table 5, percent, by the name of the row in studies."""
    return {row["row"]: Decimal(str(row["top1"])) for row in rows_of("table5")}


def study_row(name: str, row: str, results: Results) -> Row:
    printed = paper_top1()
    top1 = printed.get(row)
    runs = results.runs[results.runs["row"] == row]
    own, in_paper, difference, paired = results.estimate({row: 1}), None, None, None
    if row != "baseline":
        versus = {row: 1, "baseline": -1}
        difference, paired = results.estimate(versus), results.paired(versus)
        in_paper = top1 and Number(top1 - printed["baseline"], 1, signed=True)
    diverged = runs["diverged"].sum()
    return {
        "study": name,
        "row": row,
        "variant": LABELS[row],
        "top-1 in the paper, %": top1 and Number(top1, 1),
        "difference in the paper": in_paper,
        "runs": f"{len(runs)}, {diverged} diverged" if diverged else Number(len(runs)),
        "top-1 in the study, %": Measurement(
            Mean(mean(runs["top1"]), own and own.high - own.value) if len(runs) else None
        ),
        "difference in the study": difference and in_points(difference),
        "paired by seed": paired and in_points(paired),
    }


def in_points(interval: Interval) -> Range:
    return Range(*interval[:3], digits=1, signed=True)


def study_notes(name: str, results: Results) -> Iterator[str]:
    yield f"{name}: {results.study.title}. {' '.join(results.study.note.split())}"
    yield cost_of(name, results)
    data = [record.data for record in results.records if record.data.train_sha256]
    if (copies := len({(of.train_sha256, of.val_sha256) for of in data})) > 1:
        yield f"{name}: the runs read {copies} copies of the data, whose files differ in name or size."
    number, r = results.rank_correlation({row: float(top1) for row, top1 in paper_top1().items()})
    if r:
        interval = f"95 % interval {r.low:.2f} to {r.high:.2f}" if r.low < r.high else "no interval, as it is perfect"
        yield f"{name}: Spearman's rank correlation with the paper over {number} rows: {r.value:.2f} ({interval})."


def missing_of(results: Results) -> tuple[int, int]:
    """How many of the planned runs are missing, and how many are planned."""
    planned = set(product(results.study.rows, results.study.seeds))
    return len(planned - {(record.settings.row, record.seed) for record in results.records}), len(planned)


def cost_of(name: str, results: Results) -> str:
    missing, planned = missing_of(results)
    hardware = "; ".join(dict.fromkeys(record.hardware.device for record in results.records))
    hours = sum(record.wall_s or 0 for record in results.records) / 3600
    return f"{name}: {planned - missing} of the {planned} planned runs, {hours:.1f} hours in all, on {hardware}."


def conclusions(measured: Measured) -> Table:
    """A row for each statement about each study."""
    rows = []
    for name, results in measured.studies.items():
        listed = [(of, statement) for of, group in statements().items() for statement in group]
        plain = [results.judge(statement.tests) for _, statement in listed]
        for (of, statement), judgement, corrected in zip(listed, plain, holm(plain), strict=True):
            row = {
                "study": name,
                "of": of,
                "statement": statement.text,
                "verdict": Verdict(judgement.verdict),
                "after Holm": corrected,
                "paired by seed": results.judge(statement.tests, paired=True).verdict,
                "tested": "; ".join(map(in_signs, statement.tests, judgement.sums)),
            }
            rows.append(row)
    return table_of("conclusions", rows)


def in_signs(weights: dict[str, float], value: Interval | None) -> str:
    terms = " ".join(
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{name}"
        for name, weight in weights.items()
    )
    return f"{terms.removeprefix('+ ')}: {in_points(value) if value else NOT_RUN}"


def faults(measured: Measured) -> Table:
    """The latest campaign, and the sums of its columns in the row ``all``."""
    columns = ("tried", "survived", "lost")
    rows, notes = [{"fault": None, "tried": NOT_MEASURED, "survived": None, "lost": None}], []
    for record in measured.records["faults"][-1:]:
        counts = {of.fault: [getattr(of, column) for column in columns] for of in record.faults}
        counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
        rows = [{"fault": name, **dict(zip(columns, map(Number, of), strict=True))} for name, of in counts.items()]
        notes = [f"{record.date[:10]}, {record.hardware.processor}: `{record.command}`."]
    return table_of("faults", rows, *notes)

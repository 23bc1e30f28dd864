"""Tables of studies on small tasks and of fault campaigns."""

from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from statistics import mean
from typing import NamedTuple

from metaformer.analysis.cells import NOT_MEASURED, NOT_RUN, Mean, Measurement, Number, Range, Row, Table, Verdict
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import rows_of
from metaformer.records.statistics import Interval, Results, holm, statements
from metaformer.variants import LABELS, ROWS


def proxy(measured: Measured) -> Table:
    rows, notes = [], []
    for name, results in measured.studies.items():
        rows += [study_row(name, row, results) for row in ROWS if row in {*results.study.rows, *results.top1}]
        notes += study_notes(name, results)
    notes.append(
        "Top-1 is that of the last epoch: means over the seeds and differences from the baseline, each with its 95 % "
        "interval (Welch; paired by seed from three seeds on). The variance of a row is at least the binomial variance "
        "of an accuracy on the validation images, because few seeds can agree by chance. A run that diverged counts "
        "with the top-1 of guessing. metaformer/records/statistics.py has the formulas."
    )
    return Table("proxy", "The ablation at a small scale", rows, notes)


def paper_top1() -> dict[str, Decimal]:
    """Top-1 in Table 5, percent, by the name of the row in studies."""
    return {row["row"]: Decimal(str(row["top1"])) for row in rows_of("table5")}


def study_row(name: str, row: str, results: Results) -> Row:
    printed = paper_top1()
    values = list(results.top1.get(row, {}).values())
    own = results.combination({row: 1})
    difference = results.combination({row: 1, "baseline": -1}) if row != "baseline" else None
    paired = results.paired({row: 1, "baseline": -1}) if row != "baseline" else None
    diverged = results.diverged.get(row, 0)
    return {
        "study": name,
        "row": row,
        "variant": LABELS[row],
        "top-1 in the paper, %": Number(printed[row], 1) if row in printed else None,
        "difference in the paper": Number(printed[row] - printed["baseline"], 1, signed=True)
        if row in printed and row != "baseline"
        else None,
        "runs": f"{len(values)}, {diverged} diverged" if diverged else Number(len(values)),
        "top-1 in the study, %": Measurement(Mean(mean(values), own and own.high - own.value) if values else None),
        "difference in the study": difference and in_points(difference),
        "paired by seed": paired and in_points(paired.interval()),
    }


def in_points(interval: Interval) -> Range:
    return Range(*interval, digits=1, signed=True)


def study_notes(name: str, results: Results) -> Iterator[str]:
    yield f"{name}: {results.study.title}. {results.study.note}"
    yield cost_of(name, results)
    number, r = results.rank_correlation({row: float(top1) for row, top1 in paper_top1().items()})
    if r:
        interval = f"95 % interval {r.low:.2f} to {r.high:.2f}" if r.low < r.high else "no interval, as it is perfect"
        yield f"{name}: Spearman's rank correlation with the paper over {number} rows: {r.value:.2f} ({interval})."


def cost_of(name: str, results: Results) -> str:
    planned = set(product(results.study.rows, results.study.seeds))
    missing = len(planned - {(record.settings.row, record.seed) for record in results.records})
    hardware = ", ".join(dict.fromkeys(record.hardware.device for record in results.records))
    hours = sum(record.wall_s or 0 for record in results.records) / 3600
    partial = f"; partial, {missing} of the {len(planned)} planned are missing" if missing else ""
    return f"{name}: {len(results.records)} runs, {hours:.1f} hours added up, on {hardware}{partial}."


class Judged(NamedTuple):
    """A statement about a study, as a row of the table."""

    study: str
    of: str
    statement: str
    verdict: Verdict
    after_holm: str
    paired_by_seed: str
    tested: str


def judged(measured: Measured) -> Iterator[Judged]:
    for name, results in measured.studies.items():
        listed = [
            (of, each)
            for of, kind in (("the paper", "conclusions"), ("users", "questions"))
            for each in statements()[kind]
        ]
        plain = [results.judge(statement["tests"]) for _, statement in listed]
        for (of, statement), judgement, corrected in zip(listed, plain, holm(plain), strict=True):
            paired = results.judge(statement["tests"], paired=True)
            tests = "; ".join(map(in_signs, statement["tests"], judgement.sums))
            yield Judged(name, of, statement["text"], Verdict(judgement.verdict), corrected, paired.verdict, tests)


def conclusions(measured: Measured) -> Table:
    headings = ("study", "of", "statement", "verdict", "after Holm", "paired by seed", "tested")
    rows = [dict(zip(headings, row, strict=True)) for row in judged(measured)]
    notes = [
        "analysis/statements.yaml has the statements and their tests, which were fixed before the studies were run. A "
        "statement holds if the 95 % interval of each sum is above 0, fails if that of one sum is below 0, and is "
        "undecided otherwise.",
        "The verdict treats each statement alone. 'after Holm' corrects it for the number of statements that were run "
        "in the study. 'paired by seed' compares runs of the same seed, of at least three seeds.",
        "A verdict applies to the task and scale of the study. It does not show that the paper is right or wrong on "
        "ImageNet.",
    ]
    return Table("conclusions", "The conclusions of section 4.4 at a small scale", rows, notes)


def in_signs(weights: dict[str, float], value: Interval | None) -> str:
    terms = " ".join(
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{name}"
        for name, weight in weights.items()
    )
    return f"{terms.removeprefix('+ ')}: {in_points(value) if value else NOT_RUN}"


def faults(measured: Measured) -> Table:
    """The latest campaign."""
    rows, notes = fault_rows(measured), []
    if rows:
        record = measured.records["faults"][-1]
        notes = [f"{record.date[:10]}, {record.hardware.processor}: `{record.command}`."]
    notes = [
        "A killed or failed run has survived if it then continues and ends with the same weights, optimizer state, "
        "curve and events as an undisturbed run, bit for bit, in float32 on a CPU.",
        "A corrupted file has survived if it is refused with a one-line error or read correctly, and if nothing in it "
        "is executed. Formats without checksums (configs, records, the numbers in safetensors) cannot reveal a wrong "
        "value that is well-formed. tests/faults.py defines the faults.",
        *notes,
    ]
    nothing = [{"fault": None, "tried": NOT_MEASURED, "survived": None, "lost": None}]
    return Table("faults", "Faults injected into training runs and their files", rows or nothing, notes)


def fault_rows(measured: Measured) -> list[Row]:
    for record in measured.records["faults"][-1:]:
        columns = ("tried", "survived", "lost")
        counts = [(fault.fault, [getattr(fault, column) for column in columns]) for fault in record.faults]
        counts.append(("all", [sum(numbers) for numbers in zip(*(of for _, of in counts), strict=True)]))
        return [{"fault": name, **dict(zip(columns, map(Number, of), strict=True))} for name, of in counts]
    return []

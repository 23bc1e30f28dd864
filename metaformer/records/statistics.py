"""Statistics of small studies (classification/ablate.py): means over seeds, differences, and tests of statements.

The result of a run is the top-1 of its last epoch, since the best epoch would be selected on the validation images. A
run that diverged has the top-1 of guessing.

Intervals are 95 % intervals of Student's t with unequal variances (Welch). The weighted sum of means m = sum of w_i
m_i, over rows with n_i runs of variance v_i, has the variance V = sum of (a_i = w_i^2 v_i / n_i) and V^2 / sum of
(a_i^2 / (n_i - 1)) degrees of freedom. v_i is the larger of the sample variance and the binomial variance p (1 - p) / N
of an accuracy p on N validation images (at least one right and one wrong), because few seeds can agree by chance.

Runs with the same seed see the same pictures in the same order. Paired intervals use this: they are Student's t on the
weighted sums of single seeds, for the seeds that all rows have. Holm's procedure corrects for the number of statements.
"""

import math
from functools import cache
from pathlib import Path
from statistics import mean, variance
from typing import Any, NamedTuple

import yaml
from scipy import stats

from metaformer.errors import InputError
from metaformer.records.schema import Training
from metaformer.training.config import check
from metaformer.training.study import Study, read_study
from metaformer.variants import ROWS

STATEMENTS = Path(__file__).resolve().parents[2] / "analysis/statements.yaml"
CONFIDENCE = 0.95
CONSTANTS = ("chance", "point")
"""Names that a test may use besides those of rows."""

Weights = dict[str, float]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """A weighted sum of top-1, in percentage points, with its standard error and degrees of freedom."""

    value: float
    error: float
    freedom: float

    def interval(self) -> Interval:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom) * self.error
        return Interval(self.value, self.value - half, self.value + half)

    @property
    def p(self) -> float:
        """Of the two-sided test that the sum is 0."""
        return 2 * float(stats.t.sf(abs(self.value) / self.error, self.freedom))


class Judgement(NamedTuple):
    """``holds``, ``fails``, ``undecided`` or ``not run``; its p-value; the interval of each sum."""

    verdict: str
    p: float | None
    sums: list[Interval | None]


class Results:
    """The runs of the study ``name`` by row and seed.

    Raises:
        InputError: the study or a row does not exist, a record has another recipe or other data, or a run occurs twice.
    """

    def __init__(self, name: str, records: list[Training]):
        _, self.study = read_study(name)
        self.records = records
        self.chance = 100 / self.study.data.classes
        self.top1: dict[str, dict[int, float]] = {}
        self.diverged: dict[str, int] = {}
        for record in records:
            row = record.settings.row
            check_recipe(name, self.study, record)
            of_row = self.top1.setdefault(row, {})
            if record.seed in of_row:
                raise InputError(f"{name} has two records of row {row}, seed {record.seed}: remove one")
            diverged = record.status == "diverged"
            of_row[record.seed] = self.chance if diverged else record.curve[-1].top1
            self.diverged[row] = self.diverged.get(row, 0) + diverged

    def estimate(self, weights: Weights) -> Estimate | None:
        """A weighted sum of the rows' means (Welch); ``None`` if a row has fewer than two runs."""
        parts = []
        for row, weight in rows_in(weights).items():
            values = list(self.top1.get(row, {}).values())
            if len(values) < 2:
                return None
            parts.append((weight**2 * self.variance(values) / len(values), len(values) - 1))
        value = self.weighted(weights, {row: mean(self.top1[row].values()) for row in rows_in(weights)})
        whole = sum(part for part, _ in parts)
        return Estimate(value, math.sqrt(whole), whole**2 / sum(part**2 / of for part, of in parts))

    def paired(self, weights: Weights) -> Estimate | None:
        """As :meth:`estimate`, from the sums of single seeds; ``None`` below three seeds, or if all sums agree."""
        of_rows = [self.top1.get(row, {}) for row in rows_in(weights)]
        seeds = set.intersection(*map(set, of_rows)) if of_rows else ()
        sums = [self.weighted(weights, {row: self.top1[row][seed] for row in rows_in(weights)}) for seed in seeds]
        if len(sums) < 3 or variance(sums) == 0:
            return None
        return Estimate(mean(sums), math.sqrt(variance(sums) / len(sums)), len(sums) - 1)

    def weighted(self, weights: Weights, top1: dict[str, float]) -> float:
        values = {"chance": self.chance, "point": 1.0, **top1}
        return sum(weight * values[name] for name, weight in weights.items())

    def combination(self, weights: Weights) -> Interval | None:
        """The interval of :meth:`estimate`."""
        estimate = self.estimate(weights)
        return estimate and estimate.interval()

    def variance(self, values: list[float]) -> float:
        """Variance of a row's runs in squared percentage points, at least the binomial variance."""
        images = self.study.data.val_images
        share = min(max(mean(values) / 100, 1 / images), 1 - 1 / images)
        return max(variance(values), 100**2 * share * (1 - share) / images)

    def judge(self, tests: list[Weights], paired: bool = False) -> Judgement:
        """Whether each of the sums is above 0, by their intervals."""
        sums = [self.paired(weights) if paired else self.estimate(weights) for weights in tests]
        intervals = [estimate and estimate.interval() for estimate in sums]
        below = [
            estimate.p for estimate, interval in zip(sums, intervals, strict=True) if interval and interval.high < 0
        ]
        if below:
            return Judgement("fails", min(1.0, len(tests) * min(below)), intervals)
        if None in sums:
            return Judgement("not run", None, intervals)
        if all(interval.low > 0 for interval in intervals):
            return Judgement("holds", max(estimate.p for estimate in sums), intervals)
        return Judgement("undecided", 1.0, intervals)

    def rank_correlation(self, paper: dict[str, float]) -> tuple[int, Interval | None]:
        """Number of rows, and Spearman's correlation of the paper's top-1 with the means of this study.

        The interval is that of Bonett and Wright: Fisher's z with variance (1 + r^2 / 2) / (n - 3). The correlation is
        ``None`` for fewer than four rows, or if all values of one side are equal.
        """
        rows = [row for row in paper if row in self.top1]
        if len(rows) < 4:
            return len(rows), None
        here = [mean(self.top1[row].values()) for row in rows]
        if len({*here}) == 1 or len({paper[row] for row in rows}) == 1:
            return len(rows), None
        r = float(stats.spearmanr([paper[row] for row in rows], here).statistic)
        if abs(r) > 1 - 1e-9:
            return len(rows), Interval(r, r, r)
        half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + r**2 / 2) / (len(rows) - 3))
        return len(rows), Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def rows_in(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name not in CONSTANTS}


def holm(judgements: list[Judgement]) -> list[str]:
    """The verdicts, of which those become ``undecided`` that Holm's procedure does not keep.

    The smallest p-value is compared with 5 % divided by the number of statements that were run, the next with 5 %
    divided by one less, and so on up to the first that is larger.
    """
    run = sorted((judgement.p, index) for index, judgement in enumerate(judgements) if judgement.p is not None)
    verdicts = [judgement.verdict for judgement in judgements]
    rejected = True
    for rank, (p, index) in enumerate(run):
        rejected = rejected and p <= (1 - CONFIDENCE) / (len(run) - rank)
        if not rejected:
            verdicts[index] = "undecided"
    return verdicts


def check_recipe(name: str, study: Study, record: Training) -> None:
    """Refuse a record of another recipe or of other data than the study's."""
    settings, row = record.settings, record.settings.row
    if row not in ROWS:
        raise InputError(f"{name} has a record of row {row!r}, which ablate.py does not know")
    recipe = {**study.recipe, **ROWS[row]}
    expected = check(recipe, source=name).model_dump(mode="json")
    fields = {key: (getattr(settings, key, None), expected[key]) for key in recipe}
    fields |= {f"data.{what}": (getattr(record.data, what, None), number) for what, number in study.data}
    fields["skipped pictures"] = sum(record.skipped.values()), 0
    for field, (found, planned) in fields.items():
        if found != planned:
            raise InputError(
                f"{name} has a record of row {row}, seed {record.seed} with {field}={found}, and the study has "
                f"{planned}: the record has another recipe or other data, so remove it"
            )


@cache
def statements() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load(STATEMENTS.read_text(encoding="utf-8"))

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
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, RootModel
from scipy import stats

from metaformer.errors import InputError
from metaformer.records.schema import Training
from metaformer.training.checkpoints import MAY_CHANGE
from metaformer.training.config import check, read_yaml_mapping
from metaformer.training.study import Study, read_study
from metaformer.variants import ROWS

STATEMENTS = Path(__file__).resolve().parents[2] / "analysis/statements.yaml"
CONFIDENCE = 0.95

OF_MODEL = {"crop_pct", "interpolation", "mean", "std"}
"""Settings that a run takes from its model where the recipe does not give them."""

Weights = dict[str, float]
"""Weights in a sum of the rows' mean top-1; a test may also use ``chance``, the top-1 of guessing, and ``point``, 1."""


class Interval(NamedTuple):
    """An estimate with its interval, and the p-value of the two-sided test that it is 0."""

    value: float
    low: float
    high: float
    p: float | None = None


def student(value: float, error: float, freedom: float) -> Interval:
    """The interval of a sum with its standard error and degrees of freedom, in percentage points."""
    of = stats.t(freedom, value, error)
    return Interval(value, *of.interval(CONFIDENCE), 2 * min(of.cdf(0), of.sf(0)))


class Judgement(NamedTuple):
    """``holds``, ``fails``, ``undecided`` or ``not run``; its p-value; the interval of each sum."""

    verdict: str
    p: float | None
    sums: list[Interval | None]


class Results:
    """The runs of the study ``name``, one for each row and seed.

    ``runs`` has the columns row, seed, top1 (in percent) and diverged. ``top1`` has a column for each row and an entry
    for each seed.

    Raises:
        InputError: the study or a row does not exist, or a record has another recipe or other data.
    """

    def __init__(self, name: str, records: list[Training]):
        _, self.study = read_study(name)
        self.records = records
        self.constants = {"chance": 100 / self.study.data.classes, "point": 1.0}
        runs = []
        for record in records:
            check_recipe(name, self.study, record)
            diverged = record.status == "diverged"
            top1 = self.constants["chance"] if diverged else record.curve[-1].top1
            runs.append((record.settings.row, record.seed, top1, diverged))
        self.runs = pd.DataFrame(runs, columns=["row", "seed", "top1", "diverged"])
        self.top1 = self.runs.pivot(index="seed", columns="row", values="top1")

    def terms(self, weights: Weights) -> tuple[pd.DataFrame, pd.Series, float]:
        """Top-1 of the weighted rows by seed; their weights; and the weighted sum of the constants."""
        rows = pd.Series({name: weight for name, weight in weights.items() if name not in self.constants})
        constant = sum(weights.get(name, 0) * value for name, value in self.constants.items())
        return self.top1.reindex(columns=rows.index), rows, constant

    def estimate(self, weights: Weights) -> Interval | None:
        """A weighted sum of the rows' means (Welch); ``None`` if a row has fewer than two runs."""
        top1, weights, constant = self.terms(weights)
        number, images = top1.count(), self.study.data.val_images
        if (number < 2).any():
            return None
        share = (top1.mean() / 100).clip(1 / images, 1 - 1 / images)
        variance = top1.var().clip(100**2 * share * (1 - share) / images)  # at least the binomial variance
        parts = weights**2 * variance / number
        freedom = parts.sum() ** 2 / (parts**2 / (number - 1)).sum()
        return student(weights @ top1.mean() + constant, math.sqrt(parts.sum()), freedom)

    def paired(self, weights: Weights) -> Interval | None:
        """As :meth:`estimate`, from the sums of single seeds; ``None`` below three seeds, or if all sums agree."""
        top1, weights, constant = self.terms(weights)
        sums = top1.dropna() @ weights + constant
        if len(sums) < 3 or np.ptp(sums) < 1e-9:
            return None
        return student(sums.mean(), sums.sem(), len(sums) - 1)

    def judge(self, tests: list[Weights], paired: bool = False) -> Judgement:
        """Whether each of the sums is above 0, by their intervals."""
        sums = [self.paired(weights) if paired else self.estimate(weights) for weights in tests]
        below = [interval.p for interval in sums if interval and interval.high < 0]
        if below:
            return Judgement("fails", min(1.0, len(tests) * min(below)), sums)
        if None in sums:
            return Judgement("not run", None, sums)
        if all(interval.low > 0 for interval in sums):
            return Judgement("holds", max(interval.p for interval in sums), sums)
        return Judgement("undecided", 1.0, sums)

    def rank_correlation(self, paper: dict[str, float]) -> tuple[int, Interval | None]:
        """Number of rows, and Spearman's correlation of the paper's top-1 with the means of this study.

        The interval is that of Bonett and Wright: Fisher's z with variance (1 + r^2 / 2) / (n - 3). The correlation is
        ``None`` for fewer than four rows, or if all values of one side are equal.
        """
        both = pd.DataFrame({"paper": paper, "here": self.top1.mean()}).dropna()
        if len(both) < 4 or (both.nunique() == 1).any():
            return len(both), None
        r = float(stats.spearmanr(both["paper"], both["here"]).statistic)
        if abs(r) > 1 - 1e-9:
            return len(both), Interval(r, r, r)
        half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + r**2 / 2) / (len(both) - 3))
        return len(both), Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def holm(judgements: list[Judgement]) -> list[str]:
    """The verdicts after Holm's procedure; those that it does not keep become ``undecided``.

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
    given = settings.model_dump(exclude_unset=True)
    compared = expected.keys() - MAY_CHANGE - {"seed", "study", "row"} - (OF_MODEL - recipe.keys())
    # Records of earlier versions lack later settings.
    fields = {key: (given.get(key), expected[key]) for key in sorted(compared) if key in recipe or key in given}
    fields |= {f"data.{what}": (getattr(record.data, what, None), number) for what, number in study.data}
    fields["skipped pictures"] = sum(record.skipped.values()), 0
    for field, (found, planned) in fields.items():
        if found != planned:
            raise InputError(
                f"{name} has a record of row {row}, seed {record.seed} with {field}={found}, and the study has "
                f"{planned}: the record has another recipe or other data, so remove it"
            )


class Statement(BaseModel):
    """A statement about the rows, which holds if all sums of its tests are above 0."""

    text: str
    tests: list[dict[Literal[(*ROWS, "chance", "point")], float]]


@cache
def statements() -> dict[str, list[Statement]]:
    """The statements, in one list for the paper's and one for those of users; ``InputError`` if one names no row."""
    return check(read_yaml_mapping(STATEMENTS), str(STATEMENTS), RootModel[dict[str, list[Statement]]]).root

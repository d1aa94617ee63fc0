"""The arithmetic of the evaluation, on plain arrays: ranking metrics with weights, Brier, reliability, bootstrap.

Weighted, because a bootstrap over vehicles is a weight per vehicle: each resample then costs a cumulative sum, not a
copy (Efron's bootstrap; a vehicle's windows are no independent observations). A metric that the data cannot give (one
class only) is NaN here; whoever writes JSON makes it null.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.contract.signals import FloatArray

BoolArray = npt.NDArray[np.bool_]
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 90 % interval over vehicles; NaN where it cannot be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scores sorted once, so that many weightings can be evaluated: descending order, and where ties end."""

    order: npt.NDArray[np.intp]
    last_of_tie: npt.NDArray[np.intp]
    truth: BoolArray  # in descending order of score

    @classmethod
    def of(cls, score: FloatArray, truth: BoolArray) -> "Ranked":
        """Rank [n] scores against [n] truths."""
        order = np.argsort(-score, kind="stable")
        ranked = score[order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.empty(0, np.intp)
        return cls(order, last, truth[order])

    def counts(self, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weighted true and false positives at every distinct threshold, from the highest score down."""
        ordered = weight[self.order]
        true = np.cumsum(ordered * self.truth)[self.last_of_tie]
        false = np.cumsum(ordered * ~self.truth)[self.last_of_tie]
        return true, false

    def roc_auc(self, weight: FloatArray) -> float:
        """Area under the ROC curve, ties counted half."""
        true, false = self.counts(weight)
        if not len(true) or true[-1] <= 0 or false[-1] <= 0:
            return NAN
        return float(np.trapezoid(np.append(0.0, true) / true[-1], np.append(0.0, false) / false[-1]))

    def pr_auc(self, weight: FloatArray) -> float:
        """Average precision: the step-wise area under precision over recall."""
        true, false = self.counts(weight)
        if not len(true) or true[-1] <= 0:
            return NAN
        seen = true + false
        precision = np.divide(true, seen, out=np.ones_like(true), where=seen > 0)
        return float(np.sum(np.diff(np.append(0.0, true)) * precision) / true[-1])


def precision_at(score: FloatArray, truth: BoolArray, budget: int) -> float:
    """Share of true among the `budget` highest scores: what a workshop with so many visits would find."""
    if len(score) == 0:
        return NAN
    top = np.argsort(-score, kind="stable")[:budget]
    return float(truth[top].mean())


def confusion(score: FloatArray, truth: BoolArray, threshold: float) -> tuple[int, int, int]:
    """Count true positives, false positives, false negatives at `score >= threshold`."""
    raised = score >= threshold
    return int((raised & truth).sum()), int((raised & ~truth).sum()), int((~raised & truth).sum())


def f1(true_positive: int, false_positive: int, false_negative: int) -> float:
    """F1 from counts; NaN without any positive, raised or true."""
    total = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / total if total else NAN


def brier(probability: FloatArray, truth: BoolArray) -> float:
    """Mean squared distance of the probability from what happened; NaN for no windows."""
    return float(np.mean((probability - truth) ** 2)) if len(truth) else NAN


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Of `count` windows with a probability in [low, high): what was said on average, and what was so."""

    low: float
    high: float
    count: int
    mean_probability: float
    observed: float


def reliability(probability: FloatArray, truth: BoolArray, bins: int = 10) -> list[ReliabilityBin]:
    """Bins of equal width over [0, 1]; empty ones are left out."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.digitize(probability, edges) - 1, 0, bins - 1)
    return [
        ReliabilityBin(
            float(edges[b]),
            float(edges[b + 1]),
            int((place == b).sum()),
            float(probability[place == b].mean()),
            float(truth[place == b].mean()),
        )
        for b in range(bins)
        if (place == b).any()
    ]


def vehicle_weights(vehicle: npt.NDArray[np.int64], samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Return [samples, V]: how often each resample draws each of V vehicles; `vehicle` [n] holds their numbers."""
    count = int(vehicle.max(initial=-1)) + 1
    if count == 0:
        return np.zeros((samples, 0), np.int64)
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=samples)


def bootstrap(
    metric: Callable[[FloatArray], float], vehicle: npt.NDArray[np.int64], draws: npt.NDArray[np.int64]
) -> Interval:
    """90 % percentile interval of `metric(weight [n])` over resampled vehicles.

    Resamples in which the metric does not exist (no failing vehicle drawn) are left out; with fewer than half of them
    left there is no interval.
    """
    value = metric(np.ones(len(vehicle)))
    sampled = np.array([metric(draw[vehicle].astype(np.float64)) for draw in draws])
    sampled = sampled[np.isfinite(sampled)]
    if np.isnan(value) or len(sampled) < len(draws) / 2 or len(sampled) == 0:
        return Interval(value, NAN, NAN)
    low, high = np.quantile(sampled, [0.05, 0.95])
    return Interval(value, float(low), float(high))

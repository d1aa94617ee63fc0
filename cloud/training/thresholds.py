"""`thresholds.json`: three stated policies, each measured on vehicles that the model in question has not seen.

The autoencoder's come from validation vehicles through the int8 heads graph at batch 1. The boosters' also use training
vehicles, each scored by the fold's booster that has not seen it: a threshold taken from six healthy vehicles alone is
wrong for the seventh, and trees answer the same in the graph as here.

precision_80         the lowest threshold whose flagged windows are right in 80 % of cases (at validation prevalence:
                     80 % at 30 % prevalence is 9 % at 1 %, so the prevalence is written beside it)
percentile_95        the 95th percentile of healthy windows: 5 % of healthy windows are over it, by construction
false_alarm_budget   the lowest threshold whose alerts on healthy vehicles, through the decision's k-of-n, stay within a
                     number of episodes per vehicle-month, counted on the recordings as they are: views of the same
                     days with an empty state or missing signals add neither days nor alarms. Where the failing
                     vehicles leave room above it, a share of that room (in log-odds) is taken as margin: on the edge
                     of what a few vehicles showed, the next healthy one would be over it. A few vehicle-months cannot
                     prove a tenth of an episode, and one odd healthy vehicle must not silence a head: no threshold of
                     a probability stands above both 0.5 and what half of the unseen failures reach. There the budget
                     is exceeded: `measured` says for each head whether it is kept (`HEAD.budget_kept`, 1 or 0)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud.training.config import ThresholdPolicies
from cloud.training.dataset import Windows
from cloud.training.events import alerts, false_alarms, healthy_months, hold_against, k_of_n
from cloud.training.failure import FAILURE, Head, targets
from cloud.training.labels import Episode
from cloud.training.scoring import HeadScores
from cloud.training.vehicle import NATURAL
from edge_agent.contract.bundle import Policy, Thresholds, TypeThreshold
from edge_agent.contract.signals import FAILURE_TYPES, FloatArray
from edge_agent.contract.topics import ANOMALY

PROBABILITY_LIMITS = (0.02, 0.98)  # below, everything alerts; above, float32 and calibration have no say any more


@dataclass(frozen=True, slots=True)
class Scored:
    """One head's values [W] on windows of vehicles it has not seen, and what is true of them."""

    name: str
    windows: Windows
    value: FloatArray
    positive: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]
    failure_type: str | None
    probability: bool = True

    @classmethod
    def of(cls, name: str, windows: Windows, value: FloatArray) -> "Scored":
        """Take the truths of head `name` from the windows; the anomaly detector is held against any failure."""
        positive, used = targets(windows, FAILURE if name == ANOMALY else name)
        return cls(
            name, windows, value, positive, used, name if name in FAILURE_TYPES else None, probability=name != ANOMALY
        )


def scored_heads(train: Windows, validation: Windows, scores: HeadScores, trained: list[Head]) -> list[Scored]:
    """Return every head with all windows of vehicles it has not seen; `scores` are the validation windows'."""
    found: list[Scored] = []
    together = Windows.together(train, validation)
    for head in trained:
        index = None if head.name == FAILURE else FAILURE_TYPES.index(head.name)
        answers = scores.failure if index is None else None if scores.types is None else scores.types[:, index]
        if answers is None:
            continue
        value = np.concatenate([head.unseen, answers])
        known = np.isfinite(value)
        found.append(Scored.of(head.name, together.take(known), value[known]))
    if scores.anomaly is not None:
        found.append(Scored.of(ANOMALY, validation, scores.anomaly))
    return found


def choose_thresholds(heads: list[Scored], episodes: dict[str, list[Episode]], config: ThresholdPolicies) -> Thresholds:
    """Apply every policy to every head; what the data cannot give (no failure at all) is left out or null."""
    measured: dict[str, dict[str, float | None]] = {}
    chosen: dict[str, dict[str, float | None]] = {}
    for policy in ("precision_80", "percentile_95", "false_alarm_budget"):
        chosen[policy], measured[policy] = {}, {}
        for head in heads:
            at = _threshold(policy, head, episodes, config)
            chosen[policy][head.name] = at
            measured[policy].update(_measure(head, at, episodes, config))
    describe = {
        "precision_80": f"lowest threshold with a precision of {config.precision:.0%} over unseen windows",
        "percentile_95": f"{config.percentile:g}th percentile of unseen healthy windows",
        "false_alarm_budget": f"at most {config.episodes_per_vehicle_month:g} false alarm episodes per vehicle-month "
        f"and type on unseen healthy vehicles, with a margin where there is room; exceeded where keeping it needs a "
        f"probability above both 0.5 and what half of the unseen failures reach (HEAD.budget_kept in measured is 0)",
    }
    return Thresholds(
        active=config.active,
        decision=config.decision,
        policies={
            name: Policy(
                description=text,
                types={
                    head.name: TypeThreshold(raise_at=at, clear_below=at * config.clear_ratio)
                    for head in heads
                    if head.failure_type is not None and (at := chosen[name][head.name]) is not None
                },
                failure=chosen[name].get(FAILURE),
                anomaly=chosen[name].get(ANOMALY),
                measured=measured[name],
            )
            for name, text in describe.items()
        },
    )


def _threshold(
    policy: str, head: Scored, episodes: dict[str, list[Episode]], config: ThresholdPolicies
) -> float | None:
    if policy == "precision_80":
        at = precision_threshold(head.value[head.used], head.positive[head.used], config.precision)
    elif policy == "percentile_95":
        healthy = head.value[head.windows.healthy]
        at = float(np.percentile(healthy, config.percentile)) if len(healthy) else None
    else:
        at = budget_threshold(head, episodes, config)
    if at is None or not head.probability:
        return at
    return float(np.clip(at, *PROBABILITY_LIMITS))


def precision_threshold(value: FloatArray, truth: npt.NDArray[np.bool_], precision: float) -> float | None:
    """Lowest threshold at which the flagged windows are right so often; None where none is (or nothing is true)."""
    order = np.argsort(-value, kind="stable")
    ranked, right = value[order], np.cumsum(truth[order])
    last = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.empty(0, bool)
    fine = np.flatnonzero(last & (right / np.arange(1, len(ranked) + 1) >= precision))
    return float(ranked[fine[-1]]) if len(fine) else None


def budget_threshold(head: Scored, episodes: dict[str, list[Episode]], config: ThresholdPolicies) -> float | None:
    """See the module. None where there is no healthy window as recorded to count false alarms on."""
    recorded = head.windows.variant == NATURAL
    windows, value = head.windows.take(recorded), head.value[recorded]
    if not windows.healthy.any():
        return None
    within = k_of_n(head.windows, head.value, config.decision)
    allowed = config.episodes_per_vehicle_month * healthy_months(windows)
    # only these values change how often a healthy vehicle alerts
    candidates = np.unique(within[recorded][windows.healthy])
    low, high = 0, len(candidates)  # the first index that is within the budget; `high` = above all of them
    while low < high:
        middle = (low + high) // 2
        at = TypeThreshold(
            raise_at=float(candidates[middle]), clear_below=float(candidates[middle]) * config.clear_ratio
        )
        if len(false_alarms(alerts(windows, value, at, config.decision), windows)) <= allowed:
            high = middle
        else:
            low = middle + 1
    least = float(candidates[low]) if low < len(candidates) else float(np.nextafter(candidates[-1], np.inf))
    reached = _reached(head, within, episodes)
    room = [value for value in reached if value > least]
    if not head.probability:
        return float(least * (min(room) / least) ** config.margin) if room and least > 0 else least * 1.1
    chosen = _sigmoid(_logit(least) + config.margin * (_logit(min(room)) - _logit(least))) if room else max(least, 0.5)
    return min(chosen, max(0.5, float(np.median(reached)))) if reached else chosen


def _reached(head: Scored, within: FloatArray, episodes: dict[str, list[Episode]]) -> list[float]:
    """For each episode that the head could see: the highest threshold that would still find it."""
    windows = head.windows
    out: list[float] = []
    for (vehicle, _), rows in windows.sequences().items():
        for episode in episodes.get(vehicle, []):
            if head.failure_type in {None, episode.failure_type}:
                inside = rows[(windows.end_s[rows] >= episode.onset_s) & (windows.end_s[rows] <= episode.end_s)]
                inside = inside[head.positive[inside]]
                if len(inside):
                    out.append(float(within[inside].max()))
    return out


def _measure(
    head: Scored, at: float | None, episodes: dict[str, list[Episode]], config: ThresholdPolicies
) -> dict[str, float | None]:
    """Say what the threshold did on vehicles the head has not seen, under keys `HEAD.quantity`.

    False alarms, their vehicle-months and whether the budget is kept are of the recordings as they are; the shares of
    windows and of episodes are over all views.
    """
    windows, positive, used = head.windows, head.positive, head.used
    recorded = windows.variant == NATURAL
    months = healthy_months(windows.take(recorded))
    out: dict[str, float | None] = {
        f"{head.name}.prevalence": float(positive[used].mean()) if used.any() else None,
        f"{head.name}.healthy_vehicle_months": months,
    }
    if at is None:
        return out
    found = alerts(
        windows, head.value, TypeThreshold(raise_at=at, clear_below=at * config.clear_ratio), config.decision
    )
    false = sum(bool(recorded[a.row]) for a in false_alarms(found, windows))
    flagged = (head.value >= at) & used
    held = hold_against(found, windows, episodes, head.failure_type)
    out[f"{head.name}.false_alarm_episodes_per_vehicle_month"] = false / months if months else None
    out[f"{head.name}.budget_kept"] = float(false <= config.episodes_per_vehicle_month * months) if months else None
    out[f"{head.name}.window_precision"] = float(positive[flagged].mean()) if flagged.any() else None
    out[f"{head.name}.window_recall"] = float(flagged[positive].mean()) if positive.any() else None
    out[f"{head.name}.event_recall"] = float(np.mean([f.detected for f in held])) if held else None
    return out


def budget_kept(thresholds: Thresholds) -> dict[str, bool]:
    """Return for each head whether the policy in force kept the budget, where that could be counted."""
    measured = thresholds.policy.measured.items()
    return {
        name.removesuffix(".budget_kept"): value == 1.0
        for name, value in measured
        if name.endswith(".budget_kept") and value is not None
    }


def _logit(p: float) -> float:
    p = float(np.clip(p, 1e-6, 1 - 1e-6))
    return float(np.log(p / (1 - p)))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))

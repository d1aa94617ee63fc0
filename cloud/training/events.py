"""Scores along vehicles' time → alerts, by the vehicle's own decision table, and alerts held against what happened.

An alert is one event however many windows it spans; an episode is found or not. Window metrics cannot say how often a
workshop is called for nothing: this can.

A vehicle may stand in a dataset in several views of the same days (vehicle.py). What is counted per vehicle-month is
counted on one view at a time, the recording as it is unless a table says another: no day counts twice.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud.training.dataset import Windows
from cloud.training.labels import Episode
from edge_agent.contract.bundle import Decision, TypeThreshold
from edge_agent.contract.messages import Severity
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, FloatArray
from edge_agent.pipeline.decision import UNGRADED, Observation, TypeState, step

DAY_S = 86_400.0
MONTH_DAYS = 30.0


@dataclass(frozen=True, slots=True)
class Raised:
    """One alert: which vehicle, in which variant of its recording, and the window (row) that raised it."""

    vehicle_id: str
    variant: str
    row: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """An episode held against the alerts of its type; `lead_s` None = not found, or it never came to a failure."""

    episode: Episode
    variant: str
    detected: bool
    lead_s: float | None


def alerts(
    windows: Windows,
    value: FloatArray,
    threshold: TypeThreshold,
    rule: Decision,
    severity: npt.NDArray[np.int64] | None = None,
) -> list[Raised]:
    """Run the decision table along every vehicle and variant; `value` [W] is what the threshold applies to.

    `severity` [W] are indices into SEVERITIES, where graded: a rise lets an alert pass the cooldown.
    """
    found: list[Raised] = []
    for (vehicle, variant), rows in windows.sequences().items():
        over = np.flatnonzero(value[rows] >= threshold.raise_at)
        if len(over) < min(rule.k, rule.n):
            continue
        state = TypeState()
        for row in rows[over[0] :].tolist():  # a healthy state stays one until the first window over the threshold
            level: Severity = SEVERITIES[int(severity[row])] if severity is not None else UNGRADED  # type: ignore[assignment]
            seen = Observation(float(windows.end_s[row]), float(value[row]), level)
            state, transition = step(state, seen, threshold, rule)
            if transition == "raised":
                found.append(Raised(vehicle, variant, row, float(windows.end_s[row])))
    return found


def k_of_n(windows: Windows, value: FloatArray, rule: Decision) -> FloatArray:
    """[W]: the highest threshold at which `k` of the last `n` windows of the vehicle are over it; 0 before the k-th."""
    out = np.zeros(len(windows))
    for rows in windows.sequences().values():
        padded = np.concatenate([np.zeros(rule.n - 1), value[rows]])
        recent = np.lib.stride_tricks.sliding_window_view(padded, rule.n)
        out[rows] = np.sort(recent, axis=1)[:, max(0, rule.n - rule.k)]
    return out


def false_alarms(found: list[Raised], windows: Windows) -> list[Raised]:
    """Return the alerts raised on a healthy window."""
    return [a for a in found if windows.healthy[a.row]]


def wrong_type(found: list[Raised], windows: Windows, failure_type: str) -> list[Raised]:
    """Return the alerts raised while only failures of other types were at work."""
    bit = 1 << FAILURE_TYPES.index(failure_type)
    return [a for a in found if not windows.healthy[a.row] and not windows.at_work[a.row] & bit]


def healthy_months(windows: Windows) -> float:
    """Vehicle-months under observation without a failure at work: days with a healthy window, a month being 30.

    A vehicle's day counts once, in however many views it is here.
    """
    days: set[tuple[str, int]] = set()
    for (vehicle, _), rows in windows.sequences().items():
        healthy = rows[windows.healthy[rows]]
        days.update((vehicle, int(day)) for day in np.unique(windows.end_s[healthy] // DAY_S))
    return len(days) / MONTH_DAYS


def hold_against(
    found: list[Raised], windows: Windows, episodes: dict[str, list[Episode]], failure_type: str | None
) -> list[Found]:
    """Match alerts to the episodes that these windows could show, a variant at a time.

    `failure_type` None = any (the failure predictor, the anomaly detector). An episode without a single visible window
    (the vehicle slept through it) is not counted. An alert raised in the gray zone and still standing is the alert of
    the episode: it was early, not wrong.
    """
    bits = windows.at_work if failure_type is None else windows.at_work >> FAILURE_TYPES.index(failure_type) & 1
    out: list[Found] = []
    for (vehicle, variant), rows in windows.sequences().items():
        of_vehicle = [a for a in found if a.vehicle_id == vehicle and a.variant == variant and bits[a.row]]
        for episode in episodes.get(vehicle, []):
            if failure_type is not None and episode.failure_type != failure_type:
                continue
            if not _shown(episode, windows.end_s[rows]):
                continue
            inside = [a for a in of_vehicle if episode.onset_s <= a.time_s <= episode.end_s]
            lead = None
            if inside and np.isfinite(episode.failure_s):
                lead = episode.failure_s - min(a.time_s for a in inside)
            out.append(Found(episode, variant, bool(inside), lead))
    return out


def _shown(episode: Episode, end_s: FloatArray) -> bool:
    visible = episode.visible_s if episode.predictable else episode.failure_s
    return bool(((end_s >= visible) & (end_s <= episode.end_s)).any())

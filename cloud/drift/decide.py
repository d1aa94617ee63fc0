"""Evidence → ok, drift or too few, and verdicts → drift alerts raised and cleared. Pure.

A limit is the release's own, calibrated on chunks of its training fleet for so many vehicles and so many windows of
each, and looked up for the effective sizes: between two calibrated sizes in the logarithm of the size, above the
largest the largest's, which is the stricter for the vehicle and so the safer. A release without calibrated limits is
judged by the one limit of the configuration, and the verdict says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cloud.drift.limits import Drift
from cloud.drift.merge import Size
from cloud.drift.statistics import Distances
from edge_agent.contract.bundle import DriftCalibration, DriftReferenceVariable

Verdict = Literal["ok", "drift", "too_few"]
LimitSource = Literal["release", "config"]
Scope = Literal["vehicle", "make", "fleet"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One variable in one stratum of one scope."""

    variable: str
    kind: Literal["signal", "feature", "score"]
    stratum: str
    verdict: Verdict
    why: str  # where it is too few: what there is too little of
    distances: Distances | None  # None: nothing was counted on one side
    threshold: float | None  # the index from which it is drift; None where the sizes allow no verdict
    threshold_source: LimitSource
    size: Size
    reference_windows: int


def limit(
    variable: DriftReferenceVariable, stratum: str, calibration: DriftCalibration | None, size: Size, limits: Drift
) -> tuple[float | None, LimitSource]:
    """Return the stability index from which it is drift, and whose limit that is; None where none was calibrated."""
    if calibration is None:
        return limits.psi, "config"
    held = variable.limits.get(stratum)
    if held is None:
        return None, "release"
    table: dict[int, list[tuple[int, float]]] = {}
    for place, value in zip(calibration.sizes, held, strict=True):
        table.setdefault(place.windows, []).append((place.vehicles, value))
    fitting = [windows for windows in table if windows <= size.windows_each * (1 + 1e-9)]
    if not fitting:
        return None, "release"
    found = _between(sorted(table[max(fitting)]), size.effective_vehicles)
    return max(found, limits.least_psi), "release"


def _between(points: Sequence[tuple[int, float]], at: float) -> float:
    """Interpolate log(limit) over log(vehicles); flat beyond either end."""
    for (low, first), (high, second) in pairwise(points):
        if low <= at <= high:
            part = math.log(at / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(first) + part * math.log(second))
    return points[0][1] if at < points[0][0] else points[-1][1]


def judge(
    variable: DriftReferenceVariable,
    stratum: str,
    found: Distances | None,
    *,
    size: Size,
    reference_windows: int,
    scope: Scope,
    calibration: DriftCalibration | None,
    limits: Drift,
) -> Judged:
    """Say whether a variable has left its reference; `found` None: nothing of it was counted on one side."""
    threshold, source = limit(variable, stratum, calibration, size, limits)
    why = ""
    if size.windows < limits.min_windows:
        why = f"{size.windows} windows, at least {limits.min_windows} are needed"
    elif scope != "vehicle" and size.vehicles < limits.min_vehicles:
        why = f"{size.vehicles} vehicles, at least {limits.min_vehicles} are needed"
    elif reference_windows < limits.min_windows:
        why = f"the release's reference has {reference_windows} in this stratum, at least {limits.min_windows} needed"
    elif found is None:
        why = "this variable was not counted"
    elif threshold is None:
        why = "the release has no limit for so few windows of each vehicle in this stratum"
    verdict: Verdict = "too_few"
    if not why and found is not None and threshold is not None:
        verdict = "drift" if found.psi >= threshold else "ok"
    return Judged(
        variable.name, variable.kind, stratum, verdict, why, found, threshold, source, size, reference_windows
    )


@dataclass(frozen=True, slots=True)
class Open:
    """A drift alert that is open: the newest figures it was given, and when."""

    drift_alert_id: int
    variable: str
    stratum: str
    updated_at_s: float


@dataclass(frozen=True, slots=True)
class Changes:
    """What to write after one evaluation of a scope against one reference."""

    raised: tuple[Judged, ...]
    updated: tuple[tuple[int, Judged], ...]
    cleared: tuple[int, ...]


def change(judged: Sequence[Judged], open_alerts: Sequence[Open], *, now_s: float, limits: Drift) -> Changes:
    """Raise, keep and clear: cleared below `clear_ratio` of the limit, or when a whole span gave too few to say."""
    held = {(alert.variable, alert.stratum): alert for alert in open_alerts}
    raised: list[Judged] = []
    updated: list[tuple[int, Judged]] = []
    cleared: list[int] = []
    for one in judged:
        alert = held.pop((one.variable, one.stratum), None)
        if one.verdict == "drift":
            if alert is None:
                raised.append(one)
            else:
                updated.append((alert.drift_alert_id, one))
        elif alert is not None and one.verdict == "ok" and one.distances is not None and one.threshold is not None:
            if one.distances.psi < limits.clear_ratio * one.threshold:
                cleared.append(alert.drift_alert_id)
            else:
                updated.append((alert.drift_alert_id, one))
        elif alert is not None and _stale(alert, now_s, limits):
            cleared.append(alert.drift_alert_id)
    cleared += [alert.drift_alert_id for alert in held.values() if _stale(alert, now_s, limits)]
    return Changes(tuple(raised), tuple(updated), tuple(cleared))


def _stale(alert: Open, now_s: float, limits: Drift) -> bool:
    return now_s - alert.updated_at_s > limits.window_hours * 3600.0

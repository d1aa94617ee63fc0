"""Scores become alerts: one small state machine per failure type, as a table.

Promises: pure (a state and an observation in, a state and perhaps a change out); a type is raised when `k` of the last
`n` scored windows are over its threshold; the same alert comes again only after the cooldown, but a rise in severity
always passes; it is cleared after `clear_windows` windows in a row below the lower threshold. Leaves messages to
`alerts` and what the thresholds should be to training.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import Decision, Manifest, Policy, TypeThreshold
from edge_agent.contract.messages import Severity, Transition
from edge_agent.contract.signals import SEVERITIES
from edge_agent.contract.topics import ANOMALY
from edge_agent.pipeline.outcomes import AlertChange, Scores

Phase = Literal["healthy", "suspected", "raised", "escalated", "cleared"]
Event = Literal["quiet", "over", "held", "enough", "rise", "recovered"]

# over       this window is over the threshold, too few others are
# held       enough are, but the same alert was given within the cooldown and severity has not risen since
# enough     enough are, and an alert is due
# rise       an alert stands, and this window over the threshold is more severe than it
# recovered  `clear_windows` in a row are below the lower threshold
TABLE: dict[tuple[Phase, Event], Phase] = {
    ("healthy", "quiet"): "healthy",
    ("healthy", "over"): "suspected",
    ("healthy", "held"): "suspected",
    ("healthy", "enough"): "raised",
    ("healthy", "recovered"): "healthy",
    ("suspected", "quiet"): "suspected",
    ("suspected", "over"): "suspected",
    ("suspected", "held"): "suspected",
    ("suspected", "enough"): "raised",
    ("suspected", "recovered"): "healthy",
    ("raised", "quiet"): "raised",
    ("raised", "over"): "raised",
    ("raised", "held"): "raised",
    ("raised", "enough"): "raised",
    ("raised", "rise"): "escalated",
    ("raised", "recovered"): "cleared",
    ("escalated", "quiet"): "escalated",
    ("escalated", "over"): "escalated",
    ("escalated", "held"): "escalated",
    ("escalated", "enough"): "escalated",
    ("escalated", "rise"): "escalated",
    ("escalated", "recovered"): "cleared",
    ("cleared", "quiet"): "cleared",
    ("cleared", "over"): "suspected",
    ("cleared", "held"): "suspected",
    ("cleared", "enough"): "raised",
    ("cleared", "recovered"): "healthy",
}
STANDING: tuple[Phase, ...] = ("raised", "escalated")
UNGRADED: Severity = "medium"  # of a bundle without a severity head
ANOMALY_CLEAR_SHARE = 0.9  # of the anomaly threshold: the policy states one number for it


@dataclass(frozen=True, slots=True)
class TypeState:
    """What one type remembers. Times are seconds on the source's timeline, None = never.

    recent      (end_s, over) of the last n scored windows, oldest first
    below       scored windows in a row below the lower threshold
    severity    of the standing alert, or of the last one
    alerted_s   when the last alert was raised or escalated: the cooldown counts from here
    """

    phase: Phase = "healthy"
    recent: tuple[tuple[float, bool], ...] = ()
    below: int = 0
    since_s: float | None = None
    severity: Severity = "low"
    alerted_s: float | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """One scored window, seen by one type: the value its threshold applies to, and how severe it looks."""

    time_s: float
    value: float
    severity: Severity


def step(
    state: TypeState, seen: Observation, threshold: TypeThreshold, rule: Decision, timeline: str = ""
) -> tuple[TypeState, Transition | None]:
    """Move one type by one window; returns its next state and the transition to report, if any.

    `timeline` tells timelines apart in the alert's key: the boot id of a vehicle, "" where times are Unix seconds.
    """
    over = seen.value >= threshold.raise_at
    below = state.below + 1 if seen.value < threshold.clear_below else 0
    recent = (*state.recent, (seen.time_s, over))[-rule.n :]
    event = _event(state, seen, over=over, below=below, recent=recent, rule=rule)
    phase = TABLE[state.phase, event]
    moved = replace(state, phase=phase, recent=recent, below=0 if event == "recovered" else below)
    if event == "rise":
        return replace(moved, severity=seen.severity, alerted_s=seen.time_s), "escalated"
    if phase == "raised" and state.phase not in STANDING:
        since = next(time for time, was_over in recent if was_over)
        key = f"{timeline}/{round(since * 1000)}"
        return replace(moved, severity=seen.severity, alerted_s=seen.time_s, since_s=since, key=key), "raised"
    if phase == "cleared" and state.phase in STANDING:
        return moved, "cleared"
    return moved, None


def _event(
    state: TypeState, seen: Observation, *, over: bool, below: int, recent: tuple[tuple[float, bool], ...],
    rule: Decision,
) -> Event:  # fmt: skip
    if state.phase in STANDING and over and _rank(seen.severity) > _rank(state.severity):
        return "rise"
    if below >= rule.clear_windows:
        return "recovered"
    if not over:
        return "quiet"
    if sum(was_over for _, was_over in recent) < min(rule.k, rule.n):
        return "over"
    due = (
        state.alerted_s is None
        or seen.time_s - state.alerted_s >= rule.cooldown_s
        or seen.time_s < state.alerted_s  # the clock was set back: do not stay silent for years
        or _rank(seen.severity) > _rank(state.severity)
    )
    return "enough" if due else "held"


def _rank(severity: Severity) -> int:
    return SEVERITIES.index(severity)


def grade(share: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Median level of each distribution over the severities, [..., 4] → [...] of 0 to 3.

    The levels are ordered, and the median is wrong by the fewest steps; the argmax leaps from end to end.
    """
    half = 0.5 * share.sum(axis=-1, keepdims=True)
    level: npt.NDArray[np.int64] = np.minimum((np.cumsum(share, axis=-1) < half).sum(axis=-1), share.shape[-1] - 1)
    return level


def severity_of(scores: Scores, type_index: int | None) -> Severity:
    """Return the severity level of a type's window; `UNGRADED` where the bundle has no severity head."""
    if scores.severity is None or type_index is None:
        return UNGRADED
    share = np.clip(scores.severity[type_index].astype(np.float64), 0.0, None)
    if float(share.sum()) <= 0.0:
        return UNGRADED
    level: Severity = SEVERITIES[int(grade(share))]  # type: ignore[assignment]
    return level


def decide(
    states: dict[str, TypeState], scores: Scores, time_s: float, *, manifest: Manifest, policy: Policy, rule: Decision,
    timeline: str = "",
) -> tuple[dict[str, TypeState], list[AlertChange]]:  # fmt: skip
    """Move every type by one scored window; returns the new states and the changes, in the manifest's order.

    A bundle with type heads alerts on their probabilities; one with the anomaly detector alone alerts as `ANOMALY`.
    """
    new = dict(states)
    changes: list[AlertChange] = []
    for name, index, value, threshold in _values(scores, manifest, policy):
        seen = Observation(time_s, value, severity_of(scores, index))
        new[name], transition = step(states.get(name, TypeState()), seen, threshold, rule, timeline)
        if transition is not None:
            state = new[name]
            changes.append(
                AlertChange(
                    time_s=time_s,
                    since_s=time_s if state.since_s is None else state.since_s,
                    failure_type=name,
                    transition=transition,
                    severity=state.severity,
                    origin="model",
                    key=state.key,
                    scores=scores,
                    type_index=index,
                    windows_over_threshold=sum(was_over for _, was_over in state.recent),
                    windows_considered=len(state.recent),
                )
            )
    return new, changes


def _values(scores: Scores, manifest: Manifest, policy: Policy) -> list[tuple[str, int | None, float, TypeThreshold]]:
    if scores.type_probability is not None:
        return [
            (name, i, float(scores.type_probability[i]), policy.types[name])
            for i, name in enumerate(manifest.failure_types)
            if name in policy.types
        ]
    if scores.anomaly_score is not None and policy.anomaly is not None:
        limit = TypeThreshold(raise_at=policy.anomaly, clear_below=policy.anomaly * ANOMALY_CLEAR_SHARE)
        return [(ANOMALY, None, scores.anomaly_score, limit)]
    return []


def shifted(state: TypeState, by_s: float) -> TypeState:
    """Return `state` on a timeline whose times are `by_s` later; its alert keeps its key."""
    if by_s == 0.0:
        return state
    return replace(
        state,
        recent=tuple((time + by_s, over) for time, over in state.recent),
        since_s=None if state.since_s is None else state.since_s + by_s,
        alerted_s=None if state.alerted_s is None else state.alerted_s + by_s,
    )

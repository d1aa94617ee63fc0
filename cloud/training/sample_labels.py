"""What a sampled window is evidence of, given how people judged the alerts: labeling_spec.txt, section 8. Pure.

A person's verdict is the only source of truth about a vehicle in the field. Where none was given, or where another
alert could explain the window, it is evidence of nothing: it is counted, with the reason, and teaches nobody.
"""

from dataclasses import dataclass
from typing import Literal

from cloud.store.training_rows import JudgedAlert
from cloud.store.wire_time import unix_s
from cloud.training.labels import NO_TYPE
from edge_agent.contract.errors import MessageError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES

CONFIRMED, FALSE_ALARM = "confirmed", "false_alarm"
INFINITY = float("inf")

Meaning = Literal["confirmed", "early", "false_alarm", "healthy", "unlabelled"]


@dataclass(frozen=True, slots=True)
class Known:
    """One alert as far as labels go. `since_s` to `until_s` on the vehicle's clock; infinite where it cannot be known.

    `label_type` is what a person says that it was, "" where nobody confirmed it or the type is none that is known here.
    """

    alert_id: str
    since_s: float
    until_s: float
    verdict: str | None
    label_type: str
    severity_index: int
    problem: str = ""  # why its verdict cannot be used
    by_model: bool = True  # a model raised it, not a guard
    model_release: int | None = None  # which was loaded then

    def may_be_of(self, release: int | None) -> bool:
        """Whether the models of this release raised it, or may have: either release may be unknown."""
        return self.by_model and (release is None or self.model_release is None or self.model_release == release)


@dataclass(frozen=True, slots=True)
class SampleLabel:
    """What one window is. `why` says for an unlabelled one what is missing, for a report's counts."""

    meaning: Meaning
    type_index: int = NO_TYPE
    severity_index: int = NO_TYPE
    alert: Known | None = None
    why: str = ""

    @property
    def used(self) -> bool:
        """Whether it goes into a dataset at all."""
        return self.meaning != "unlabelled"


def known_alert(alert: JudgedAlert) -> Known:
    """Read an alert's times and verdict. A verdict with an unknown failure type or severity is no label."""
    kind = alert.label_type or alert.failure_type
    problem = ""
    severity = NO_TYPE  # the vehicle's own grade is what is to be learned, so it cannot be the truth
    if alert.verdict == CONFIRMED:
        if kind not in FAILURE_TYPES:
            problem = f"unknown failure type {kind!r}"
        if alert.label_severity is not None:
            if alert.label_severity in SEVERITIES:
                severity = SEVERITIES.index(alert.label_severity)
            else:
                problem = problem or f"unknown severity {alert.label_severity!r}"
    since_s, until_s = -INFINITY, INFINITY
    if alert.clock_trusted:  # another boot's clock may have been years away: then it stands everywhere
        since_s = _seconds(alert.since, -INFINITY)
        until_s = INFINITY if alert.ended is None else _seconds(alert.ended, INFINITY)
    return Known(
        alert.alert_id, since_s, until_s, alert.verdict, kind if alert.verdict == CONFIRMED else "", severity, problem,
        alert.origin != "guard", alert.model_release,
    )  # fmt: skip


def _seconds(text: str, otherwise: float) -> float:
    try:
        return unix_s(text)
    except MessageError:
        return otherwise


def label_sample(
    reason: str,
    alert_id: str,
    end_s: float,
    alerts: list[Known],
    *,
    clock_trusted: bool,
    received_at_s: float,
    observed_until_s: float,
    horizon_s: float,
) -> SampleLabel:
    """Say what a window that ends at `end_s` (Unix seconds, the vehicle's clock) is evidence of.

    Where that clock was not trusted the window may be of any time: its own alert is known by its id, and any other that
    may explain a window may explain this one. It came here at `received_at_s`, so it is not younger.

    `observed_until_s`: until when the vehicle was heard of, on the server's clock. A failure that shows only after that
    has told nobody yet, so that a window at random whose horizon ends later is not known to be healthy.

    `alerts` are all alerts of its vehicle. `horizon_s`: so long before and after an alert that is confirmed, or that
    nobody has judged, no window of its vehicle is taken as healthy.
    """
    own = next((a for a in alerts if a.alert_id == alert_id), None) if reason == "alert" else None
    if reason == "alert":
        why = _unusable(own)
        if why or own is None:
            return SampleLabel("unlabelled", why=why)
        if own.verdict == CONFIRMED:
            kind = FAILURE_TYPES.index(own.label_type)
            if (
                clock_trusted and end_s < own.since_s
            ):  # the fault may have been at work; nobody says that it could be seen
                return SampleLabel("early", kind, NO_TYPE, own)
            return SampleLabel("confirmed", kind, own.severity_index, own)
    standing = [a for a in alerts if a.verdict != FALSE_ALARM and (not clock_trusted or _near(a, end_s, horizon_s))]
    if standing:
        what = "a confirmed alert" if any(a.verdict == CONFIRMED for a in standing) else "an alert nobody has judged"
        where = "is near" if clock_trusted else "may be near: its clock was not trusted"
        return SampleLabel("unlabelled", why=f"{what} of its vehicle {where}")
    if own is not None:
        return SampleLabel("false_alarm", alert=own)
    if observed_until_s < (end_s if clock_trusted else received_at_s) + horizon_s:
        return SampleLabel("unlabelled", why="its vehicle has not been heard of for the whole horizon after it")
    return SampleLabel("healthy")


def _unusable(own: Known | None) -> str:
    """Say why the verdict on a sample's own alert is none; empty where it is one."""
    if own is None:
        return "its alert is not in the store"
    if own.verdict is None:
        return "nobody has judged its alert"
    if own.problem:
        return f"its label has an {own.problem}"
    return "" if own.verdict in {CONFIRMED, FALSE_ALARM} else f"its alert has the unknown verdict {own.verdict!r}"


def _near(alert: Known, end_s: float, horizon_s: float) -> bool:
    return alert.since_s - horizon_s <= end_s <= alert.until_s + horizon_s

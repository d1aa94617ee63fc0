"""Whether a training run is due: the four triggers of the runbook, each with its evidence. Pure.

Any one of them is enough: drift alerts, age, new samples, or a drop of performance. What cannot be known (no bundle, no
stated precision, too few labels) is said, and is not due.

Performance is what labels can show: the share of the release's alerts that people confirmed, among those they judged.
It is held against the precision that the release states for its own thresholds, each type weighted by its judged
alerts. The stated figure is of windows of vehicles not seen in training, the observed one of alerts: an alert needs
several windows, so at equal quality it is not below. Recall cannot be seen so: nobody labels an alert that never was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cloud.drift.limits import Retraining
from edge_agent.contract.bundle import Thresholds

TriggerName = Literal["drift_alerts", "age_days", "new_samples", "performance_drop"]
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Champion:
    """What serves now. Times in Unix seconds."""

    release: int
    created_s: float | None
    precision: Mapping[str, float]  # by failure type, as the release states it


@dataclass(frozen=True, slots=True)
class Judgements:
    """Alerts of one failure type that people judged."""

    confirmed: int  # as that very type
    wrong: int  # a false alarm, or confirmed as another type


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the store knows, counted since `since_s`, the last training."""

    drifted: tuple[str, ...]  # variables that raised a drift alert of the fleet or a make, each once
    new_samples: int
    judged: Mapping[str, Judgements]  # by the type the alert said; of this release's models, whenever it was


@dataclass(frozen=True, slots=True)
class Trained:
    """When the last training was, and what says so."""

    at_s: float | None
    source: Literal["training_run", "release", "unknown"]


@dataclass(frozen=True, slots=True)
class Trigger:
    """One trigger. `value` None: it cannot be known, `why` says for what reason."""

    name: TriggerName
    value: float | None
    threshold: float
    due: bool
    why: str


@dataclass(frozen=True, slots=True)
class Performance:
    """Precision that labels show, against the stated one; None where it cannot be said."""

    judged: int
    confirmed: int
    observed: float | None
    stated: float | None
    unstated_types: tuple[str, ...]  # judged, but the release states no precision for them: left out


def stated_precision(thresholds: Thresholds) -> dict[str, float]:
    """Return the precision that a release states by failure type, of the policy in force; absent where it has none."""
    measured = thresholds.policy.measured
    found = {kind: measured.get(f"{kind}.window_precision") for kind in thresholds.policy.types}
    return {kind: value for kind, value in found.items() if value is not None}


def last_training(champion: Champion | None, run_finished_s: float | None) -> Trained:
    """Say when the last training was: the newest recorded run, or the making of the release, whichever is later."""
    created = champion.created_s if champion is not None else None
    if run_finished_s is not None and (created is None or run_finished_s >= created):
        return Trained(run_finished_s, "training_run")
    return Trained(None, "unknown") if created is None else Trained(created, "release")


def performance(champion: Champion | None, judged: Mapping[str, Judgements]) -> Performance:
    """Compute the precision that labels show, over the types for which the release states one."""
    stated = champion.precision if champion is not None else {}
    known = {kind: j for kind, j in judged.items() if kind in stated and j.confirmed + j.wrong}
    unstated = tuple(sorted(kind for kind, j in judged.items() if kind not in stated and j.confirmed + j.wrong))
    count = sum(j.confirmed + j.wrong for j in known.values())
    confirmed = sum(j.confirmed for j in known.values())
    if not count:
        return Performance(0, 0, None, None, unstated)
    expected = sum(stated[kind] * (j.confirmed + j.wrong) for kind, j in known.items()) / count
    return Performance(count, confirmed, confirmed / count, expected, unstated)


def triggers(
    champion: Champion | None, trained: Trained, evidence: Evidence, limits: Retraining, now_s: float
) -> tuple[Trigger, ...]:
    """Evaluate the four."""
    drifted = len(evidence.drifted)
    since = "since the last training" if trained.at_s is not None else "ever, as no training is known"
    samples = evidence.new_samples
    return (
        Trigger(
            "drift_alerts", drifted, limits.drift_alerts, drifted >= limits.drift_alerts,
            f"{drifted} variables left the reference {since}, on the fleet or a make; due from {limits.drift_alerts}",
        ),
        _age(trained, limits, now_s),
        Trigger(
            "new_samples", samples, limits.new_samples, samples >= limits.new_samples,
            f"{samples} samples came into the lake {since}; due from {limits.new_samples}",
        ),
        _drop(champion, evidence.judged, limits),
    )  # fmt: skip


def _age(trained: Trained, limits: Retraining, now_s: float) -> Trigger:
    if trained.at_s is None:
        why = "no release is loaded here and no training run is recorded: the age is not known"
        return Trigger("age_days", None, limits.max_age_days, due=False, why=why)
    days = (now_s - trained.at_s) / DAY_S
    whence = "the newest training run ended" if trained.source == "training_run" else "the release was made"
    why = f"{whence} {days:.1f} days ago; due from {limits.max_age_days:g}"
    return Trigger("age_days", days, limits.max_age_days, days >= limits.max_age_days, why)


def _drop(champion: Champion | None, judged: Mapping[str, Judgements], limits: Retraining) -> Trigger:
    def unknown(why: str) -> Trigger:
        return Trigger("performance_drop", None, limits.performance_drop, due=False, why=why)

    if champion is None:
        return unknown("no release is loaded here: which alerts are its own, and what it states, is not known")
    found = performance(champion, judged)
    if not champion.precision:
        return unknown(f"release {champion.release} states no precision")
    if found.judged < limits.min_labelled_alerts:
        return unknown(
            f"too few labels: {found.judged} alerts of release {champion.release} are judged, at least "
            f"{limits.min_labelled_alerts} are needed"
        )
    if found.observed is None or not found.stated:
        return unknown(f"release {champion.release} states a precision of 0 for the judged types")
    drop = (found.stated - found.observed) / found.stated
    why = (
        f"{found.confirmed} of {found.judged} judged alerts were right ({found.observed:.2f}), release "
        f"{champion.release} states {found.stated:.2f}: {drop:+.0%}, due above {limits.performance_drop:.0%}"
    )
    return Trigger("performance_drop", drop, limits.performance_drop, drop > limits.performance_drop, why)

"""Whether a training run is due: the four triggers of the runbook, each with its evidence. Pure.

Any one of them is enough: drift alerts, age, new samples, or a drop of performance. What cannot be known (no bundle, no
stated precision, too few labels) is said, and is not due.

Performance is what labels can show: the share of the release's alerts that people confirmed, among those they judged.
It is held against the precision that the release states for its own thresholds, each type weighted by its judged
alerts. The stated figure is of windows of vehicles not seen in training, the observed one of alerts: an alert needs
several windows, so at equal quality it is not below. A few labels make any figure: the drop counts that the labels
prove, to the upper bound of the observed precision. Recall cannot be seen so: nobody labels an alert that never was.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cloud.drift.limits import Retraining
from edge_agent.contract.bundle import Thresholds

TriggerName = Literal["drift_alerts", "age_days", "new_samples", "performance_drop"]
DAY_S = 86_400.0
CONFIDENCE = 0.95  # one-sided: of 20 releases as good as the limit allows, one is taken for worse


@dataclass(frozen=True, slots=True)
class Champion:
    """What serves now. Times in Unix seconds."""

    release: int
    created_s: float | None
    precision: Mapping[str, float]  # by failure type, as the release states it
    reference: str = ""  # SHA-256 of its drift reference; counts against another one say nothing about its training


@dataclass(frozen=True, slots=True)
class Judgements:
    """Alerts of one failure type that people judged."""

    confirmed: int  # as that very type
    wrong: int  # a false alarm, or confirmed as another type


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the store knows, counted since `Trained.since_s`."""

    drifted: tuple[str, ...]  # variables that left the champion's reference, on the fleet or a make, each once
    new_samples: int
    judged: Mapping[str, Judgements]  # by the type the alert said; of this release's models, whenever it was


@dataclass(frozen=True, slots=True)
class Trained:
    """When the last training was, what says so, and from when on what came was in no training."""

    at_s: float | None
    source: Literal["training_run", "release", "unknown"]
    since_s: float | None = None


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
    upper: float | None  # what the true precision lies below, at `CONFIDENCE`
    stated: float | None
    unstated_types: tuple[str, ...]  # judged, but the release states no precision for them: left out


def stated_precision(thresholds: Thresholds) -> dict[str, float]:
    """Return the precision that a release states by failure type, of the policy in force; absent where it has none."""
    measured = thresholds.policy.measured
    found = {kind: measured.get(f"{kind}.window_precision") for kind in thresholds.policy.types}
    return {kind: value for kind, value in found.items() if value is not None}


def last_training(champion: Champion | None, run_started_s: float | None) -> Trained:
    """Say when the last training was: the newest recorded run, or the making of the release, whichever is later.

    A run reads the lake when it begins: what came while it went on, or until its challenger was made a release, is in
    no training. So counting goes from the run's start wherever a run is recorded, also where the release is younger.
    """
    created = champion.created_s if champion is not None else None
    if run_started_s is not None and (created is None or run_started_s >= created):
        return Trained(run_started_s, "training_run", run_started_s)
    if created is None:
        return Trained(None, "unknown")
    return Trained(created, "release", created if run_started_s is None else run_started_s)


def performance(champion: Champion | None, judged: Mapping[str, Judgements]) -> Performance:
    """Compute the precision that labels show, over the types for which the release states one."""
    stated = champion.precision if champion is not None else {}
    known = {kind: j for kind, j in judged.items() if kind in stated and j.confirmed + j.wrong}
    unstated = tuple(sorted(kind for kind, j in judged.items() if kind not in stated and j.confirmed + j.wrong))
    count = sum(j.confirmed + j.wrong for j in known.values())
    confirmed = sum(j.confirmed for j in known.values())
    if not count:
        return Performance(0, 0, None, None, None, unstated)
    expected = sum(stated[kind] * (j.confirmed + j.wrong) for kind, j in known.items()) / count
    return Performance(count, confirmed, confirmed / count, upper_bound(confirmed, count), expected, unstated)


def upper_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided upper bound of a share: Clopper and Pearson, Biometrika 26 (1934), by bisection.

    The share at which so few successes or fewer happen with probability 1 - `confidence`. Exact: it fails at most that
    often, and less often where the trials have different chances, as alerts of several types have (Hoeffding 1956).
    """
    if successes >= trials:
        return 1.0
    low, high = successes / trials, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(successes, trials, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(successes: int, trials: int, share: float) -> float:
    """Probability of `successes` or fewer of `trials`; `share` strictly between 0 and 1."""
    odds, term, total = share / (1.0 - share), 0.0, 0.0
    log_term = trials * math.log1p(-share)
    for k in range(successes + 1):
        term = math.exp(log_term)
        total += term
        log_term += math.log(odds * (trials - k) / (k + 1))
    return min(1.0, total)


def triggers(
    champion: Champion | None, trained: Trained, evidence: Evidence, limits: Retraining, now_s: float
) -> tuple[Trigger, ...]:
    """Evaluate the four."""
    drifted = len(evidence.drifted)
    since = "since the last training began" if trained.since_s is not None else "ever, as no training is known"
    of = "the release's reference" if champion is not None else "a reference, as no release is loaded here,"
    samples = evidence.new_samples
    return (
        Trigger(
            "drift_alerts", drifted, limits.drift_alerts, drifted >= limits.drift_alerts,
            f"{drifted} variables left {of} {since}, on the fleet or a make; due from {limits.drift_alerts}",
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
    whence = "the newest training run began" if trained.source == "training_run" else "the release was made"
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
    if found.observed is None or found.upper is None or not found.stated:
        return unknown(f"release {champion.release} states a precision of 0 for the judged types")
    estimate = (found.stated - found.observed) / found.stated
    drop = (found.stated - found.upper) / found.stated
    why = (
        f"{found.confirmed} of {found.judged} judged alerts were right ({found.observed:.2f}, at {CONFIDENCE:.0%} "
        f"confidence below {found.upper:.2f}), release {champion.release} states {found.stated:.2f}: a drop of "
        f"{estimate:.0%}, of which {max(0.0, drop):.0%} is proven; due above {limits.performance_drop:.0%} proven"
    )
    return Trigger("performance_drop", drop, limits.performance_drop, drop > limits.performance_drop, why)

"""Who serves from here on: champion or challenger. One pure function from figures to a winner and its reasons.

Only windows that the champion did not choose have a say: recordings, the random share, and what guards or another
release alerted on. On its own alerts (part "alerts") any other model raises fewer false alarms and finds fewer
failures, however good it is.

The challenger wins when all three hold, and the champion stays otherwise, also on a tie:

1. **It is better somewhere that matters, beyond chance.** One of `GAINS` is better, carried by at least
   `least_vehicles` vehicles, and the share of paired resamples in which it is not better is at most `doubt` divided by
   the number of figures in `GAINS`, as any one of them would do (Bonferroni).
2. **It is nowhere worse beyond a stated margin.** Each figure of `GUARDS` may be worse by its margin at most, which
   is about what another seed of the same training moves it by; and no head that the champion has is missing.
3. **It raises no more false alarms**, neither on the recordings as they are nor on the sampled occasions on which
   nothing was wrong; people stop reading what cries wolf. One odd vehicle (`false_alarm_slack`) decides nothing,
   however often it cries: that much another seed of the same training gives, and a champion that never alerts on a
   type would forbid every other to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cloud.training.compare import Figure
from cloud.training.config import Challenger

Winner = Literal["challenger", "champion"]
GAINS = (("pr_auc.types", "all"), ("pr_auc.types", "lake"), ("event_recall", "all"), ("false_alarms", "lake"))
GUARDS = {  # figure → which margin of the configuration holds
    "pr_auc.types": "pr_auc_margin",
    "pr_auc.failure": "pr_auc_margin",
    "pr_auc.anomaly": "pr_auc_margin",
    "pr_auc": "type_margin",  # of a single type, which rests on fewer vehicles
    "event_recall": "recall_margin",
    "severity_steps_off": "severity_margin",
}
NO_MORE = "false_alarms"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The winner, and why in plain words: what decided it first."""

    winner: Winner
    reasons: tuple[str, ...]


def decide(figures: Sequence[Figure], rule: Challenger) -> Verdict:
    """Apply the rule to the figures of one comparison."""
    figures = [f for f in figures if f.part != "alerts"]
    gains = [f for f in figures if (f.name, f.part) in GAINS]
    sure = [f for f in gains if _is_gain(f, rule)]
    against = [reason for f in figures if (reason := _objection(f, rule))]
    if sure and not against:
        return Verdict("challenger", (*(_better(f) for f in sure), "nowhere worse beyond the stated margins"))
    if sure:
        return Verdict("champion", (*against, *(f"although {_better(f)}" for f in sure)))
    return Verdict("champion", (*(_no_gain(f, rule) for f in gains), *against) or ("no figure could be computed",))


def _is_gain(f: Figure, rule: Challenger) -> bool:
    return f.gain > 0 and f.vehicles >= rule.least_vehicles and f.doubt <= rule.doubt / len(GAINS)


def _objection(f: Figure, rule: Challenger) -> str:
    if math.isnan(f.challenger) and not math.isnan(f.champion):
        return f"{describe(f)}: the challenger has no answer there, the champion has"
    if math.isnan(f.gain):
        return ""
    if f.name == NO_MORE:
        allowed = f.gain >= 0 or f.worse_on <= rule.false_alarm_slack
        return "" if allowed else f"{describe(f)}: {_both(f)}: more on {f.worse_on} vehicles"
    margin = guard_margin(f, rule)
    if margin is None or f.gain >= -margin:
        return ""
    return f"{describe(f)}: {_both(f)}: worse by more than the margin of {margin:g}"


def guard_margin(f: Figure, rule: Challenger) -> float | None:
    """By how much a figure may be worse; None where the rule does not look at it."""
    if f.part != "all":
        return None  # the parts are few vehicles each; the whole has them all
    name = GUARDS.get(f.name) or GUARDS.get(f.name.partition(".")[0])
    return None if name is None else float(getattr(rule, name))


def _no_gain(f: Figure, rule: Challenger) -> str:
    if math.isnan(f.gain):
        return f"{describe(f)}: no difference can be computed"
    if f.gain <= 0:
        return f"{describe(f)}: {_both(f)}: not better"
    if f.vehicles < rule.least_vehicles:
        return (
            f"{describe(f)}: {_both(f)}: better, but on {f.vehicles} vehicles; fewer than {rule.least_vehicles} "
            f"decide nothing"
        )
    return f"{describe(f)}: {_both(f)}: better, but {f.doubt:.0%} of resamples say otherwise"


def _better(f: Figure) -> str:
    return f"{describe(f)}: {_both(f)} on {f.vehicles} vehicles"


def _both(f: Figure) -> str:
    text = f"{f.champion:.3f} → {f.challenger:.3f}"
    if math.isnan(f.difference.low):
        return text
    return f"{text} ({f.difference.value:+.3f}, 90 % interval {f.difference.low:+.3f} to {f.difference.high:+.3f})"


_WORDS = {
    "pr_auc.types": "PR-AUC over the failure types",
    "pr_auc.failure": "PR-AUC of the failure predictor",
    "pr_auc.anomaly": "PR-AUC of the anomaly score",
    "event_recall": "failures found",
    "false_alarms": "false alarms",
    "severity_steps_off": "severity levels off",
}
_PARTS = {
    "all": "",
    "base": ", base test vehicles",
    "lake": ", sampled windows of held-out vehicles",
    "alerts": ", at the champion's own alerts (decides nothing)",
}


def describe(f: Figure) -> str:
    """Say in words which figure this is."""
    words = _WORDS.get(f.name) or f"PR-AUC of {f.name.partition('.')[2]}"
    unit = f" {f.unit}" if f.name == NO_MORE else ""
    return f"{words}{unit}{_PARTS[f.part]}"

"""Champion and challenger on the same frozen windows: each figure of both, and what a paired bootstrap says of it.

Both go through the int8 heads graph at batch 1 with their own thresholds. Every resample draws whole vehicles, the same
for both, so that what is hard for one vehicle is hard for both and falls out of the difference. A vehicle weighs the
same however many windows it sent: near-duplicates around one alert are one witness.

Parts: "base" is the base dataset's test vehicles as recorded; "lake" the held-out vehicles' sampled windows that are
labelled and that chance, a guard or another release chose; "all" both. "alerts" are the windows that the champion's own
alerts chose: there it finds every failure and every false alarm is its own, by construction, so that of two models of
equal quality the champion has the worse false alarms and the better recall. That part is to look at; it decides
nothing, and is in no other part. On sampled windows, chosen around alerts, k-of-n and rates a month mean nothing:
there an *occasion* (windows of a vehicle within half an hour of each other) is raised when as many of its windows are
over as the decision asks for, or all where it has fewer.

Pure but for the scoring, which is handed in. What cannot be computed is NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cloud.training.dataset import Windows
from cloud.training.events import alerts, false_alarms, healthy_months, hold_against
from cloud.training.failure import FAILURE, targets
from cloud.training.labels import Episode
from cloud.training.metrics import NAN, Interval, Ranked, vehicle_weights
from cloud.training.sampled import SAMPLED, SELECTED
from cloud.training.scoring import HeadScores
from cloud.training.vehicle import NATURAL
from edge_agent.contract.bundle import Thresholds, TypeThreshold
from edge_agent.contract.signals import FAILURE_TYPES, FloatArray
from edge_agent.contract.topics import ANOMALY
from edge_agent.pipeline.decision import ANOMALY_CLEAR_SHARE, grade

OCCASION_S = 1800.0
Part = Literal["all", "base", "lake", "alerts"]
PARTS: tuple[Part, ...] = ("all", "base", "lake", "alerts")
BoolArray = npt.NDArray[np.bool_]
# a figure of both models at once, for vehicles that count so often [V] → (champion, challenger)
Paired = Callable[[FloatArray], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One models folder on the frozen windows."""

    scores: HeadScores
    thresholds: Thresholds

    def types(self, count: int) -> FloatArray:
        """[W, T] probabilities; 0 where it has no such head: a model that cannot say so says never."""
        return self.scores.types if self.scores.types is not None else np.zeros((count, len(FAILURE_TYPES)))

    def raised_by(self, count: int) -> list[tuple[str, FloatArray, TypeThreshold]]:
        """Return what it alerts on, as the vehicle does: the type heads, or without any the anomaly score."""
        policy = self.thresholds.policy
        if self.scores.types is not None and policy.types:
            return [
                (name, self.types(count)[:, FAILURE_TYPES.index(name)], limit) for name, limit in policy.types.items()
            ]
        if self.scores.anomaly is not None and policy.anomaly is not None:
            limit = TypeThreshold(raise_at=policy.anomaly, clear_below=policy.anomaly * ANOMALY_CLEAR_SHARE)
            return [(ANOMALY, self.scores.anomaly, limit)]
        return []


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of both. `difference` is challenger minus champion with its 90 % interval over vehicles.

    `doubt` is the share of resamples in which the challenger is not better; `vehicles` how many carry the figure: those
    that fail, or those on which false alarms are counted.
    """

    name: str
    part: Part
    better: Literal["higher", "lower"]
    unit: str
    vehicles: int
    champion: float
    challenger: float
    difference: Interval
    doubt: float
    worse_on: int = 0  # of a count: vehicles on which the challenger has more, less those on which it has fewer

    @property
    def gain(self) -> float:
        """The difference with the sign turned so that more is better; NaN where there is none."""
        return self.difference.value if self.better == "higher" else -self.difference.value


@dataclass(frozen=True, slots=True)
class Frozen:
    """What both are held against; `number` [W] is each window's vehicle, 0 … V - 1.

    `episodes` are those of the recordings, by vehicle: sampled windows carry their own label.
    """

    windows: Windows
    episodes: dict[str, list[Episode]]
    vehicles: tuple[str, ...]
    number: npt.NDArray[np.int64]

    @classmethod
    def of(cls, windows: Windows, episodes: dict[str, list[Episode]]) -> "Frozen":
        """Give each vehicle its number."""
        names, number = np.unique(windows.vehicle, return_inverse=True)
        return cls(windows, episodes, tuple(str(n) for n in names.tolist()), number)

    def mask(self, part: Part) -> BoolArray:
        """[W]: the windows of a part, each day once."""
        variant = self.windows.variant
        variants = {"all": (NATURAL, SAMPLED), "base": (NATURAL,), "lake": (SAMPLED,), "alerts": (SELECTED,)}
        chosen: BoolArray = np.isin(variant, variants[part])
        return chosen


def compare(frozen: Frozen, champion: Contestant, challenger: Contestant, *, samples: int, seed: int) -> list[Figure]:
    """Return every figure that the frozen set can give for at least one of the two."""
    draws = vehicle_weights(frozen.number, samples, seed)
    both = (champion, challenger)
    figures = [
        figure for part in PARTS for figure in (_types(frozen, both, part, draws), _recall(frozen, both, part, draws))
    ]
    figures += [_head(frozen, both, name, draws) for name in (FAILURE, *FAILURE_TYPES, ANOMALY)]
    figures += [_false_alarms(frozen, both, draws), *(_occasions(frozen, both, part, draws) for part in PARTS[2:])]
    figures.append(_severity(frozen, both, draws))
    return [f for f in figures if f is not None]


def paired(metric: Paired, draws: npt.NDArray[np.int64], better: str) -> tuple[float, float, Interval, float]:
    """Champion's and challenger's value, their difference with its interval, and the doubt; NaN where there is none."""
    ours, theirs = metric(np.ones(draws.shape[1]))
    sampled = np.array([b - a for a, b in (metric(draw.astype(np.float64)) for draw in draws)])
    sampled = sampled[np.isfinite(sampled)]
    value = theirs - ours
    if not math.isfinite(value) or len(sampled) < max(1, len(draws) // 2):
        return ours, theirs, Interval(value, NAN, NAN), NAN
    low, high = np.quantile(sampled, [0.05, 0.95])
    gained = sampled > 0 if better == "higher" else sampled < 0
    return ours, theirs, Interval(value, float(low), float(high)), float(1.0 - gained.mean())


def _figure(
    name: str, part: Part, better: Literal["higher", "lower"], unit: str, vehicles: int, metric: Paired,
    draws: npt.NDArray[np.int64], worse_on: int = 0,
) -> Figure | None:  # fmt: skip
    champion, challenger, difference, doubt = paired(metric, draws, better)
    if math.isnan(champion) and math.isnan(challenger):
        return None
    return Figure(name, part, better, unit, vehicles, champion, challenger, difference, doubt, worse_on)


def _ranking(
    frozen: Frozen, name: str, part: Part, values: tuple[FloatArray | None, FloatArray | None]
) -> tuple[Paired, npt.NDArray[np.int64]] | None:
    """Average precision of one head, every vehicle's positives and negatives the same; and the vehicles that fail."""
    positive, used = targets(frozen.windows, FAILURE if name == ANOMALY else name)
    rows = np.flatnonzero(used & frozen.mask(part))
    truth, vehicle = positive[rows], frozen.number[rows]
    if not truth.any() or truth.all():
        return None
    share = np.zeros(len(rows))
    for side in (truth, ~truth):
        share[side] = 1.0 / np.bincount(vehicle[side])[vehicle[side]]
    ranked = [None if value is None else Ranked.of(value[rows], truth) for value in values]

    def metric(weight: FloatArray) -> tuple[float, float]:
        of_window = share * weight[vehicle]
        first, second = (NAN if r is None else r.pr_auc(of_window) for r in ranked)
        return first, second

    return metric, np.unique(vehicle[truth])


def _head(
    frozen: Frozen, both: tuple[Contestant, Contestant], name: str, draws: npt.NDArray[np.int64]
) -> Figure | None:
    count = len(frozen.windows)

    def value(of: Contestant) -> FloatArray | None:
        if name in FAILURE_TYPES:
            return of.types(count)[:, FAILURE_TYPES.index(name)]
        return of.scores.anomaly if name == ANOMALY else of.scores.failure

    found = _ranking(frozen, name, "all", (value(both[0]), value(both[1])))
    return None if found is None else _figure(f"pr_auc.{name}", "all", "higher", "", len(found[1]), found[0], draws)


def _types(
    frozen: Frozen, both: tuple[Contestant, Contestant], part: Part, draws: npt.NDArray[np.int64]
) -> Figure | None:
    """Average precision over the types that the part shows, each by its failing vehicles: what alerts are made of.

    A type that a single vehicle shows would else carry as much as one that ten do.
    """
    count = len(frozen.windows)
    heads = []
    for i, name in enumerate(FAILURE_TYPES):
        found = _ranking(frozen, name, part, (both[0].types(count)[:, i], both[1].types(count)[:, i]))
        if found is not None:
            heads.append(found)

    def metric(weight: FloatArray) -> tuple[float, float]:
        total = first = second = 0.0
        for head, failing in heads:
            witnesses = float(weight[failing].sum())
            a, b = head(weight) if witnesses > 0 else (NAN, NAN)
            if math.isfinite(a) and math.isfinite(b):  # a type none of whose vehicles was drawn says nothing
                total, first, second = total + witnesses, first + witnesses * a, second + witnesses * b
        return (first / total, second / total) if total > 0 else (NAN, NAN)

    if not heads:
        return None
    failing = frozen.mask(part) & (frozen.windows.type_index >= 0)
    return _figure("pr_auc.types", part, "higher", "", len(np.unique(frozen.number[failing])), metric, draws)


def _recall(
    frozen: Frozen, both: tuple[Contestant, Contestant], part: Part, draws: npt.NDArray[np.int64]
) -> Figure | None:
    """Share of the failures that an alert of their own type finds."""
    place = {vehicle: i for i, vehicle in enumerate(frozen.vehicles)}
    found = np.zeros((len(both), len(place)))
    total = np.zeros(len(place))
    for k, contestant in enumerate(both):
        seen = total if k == 0 else np.zeros(len(place))
        if part in {"all", "base"}:
            _found_recorded(frozen, contestant, place, found[k], seen)
        if part != "base":
            _found_sampled(frozen, contestant, "lake" if part == "all" else part, place, found[k], seen)
    if not total.any():
        return None

    def metric(weight: FloatArray) -> tuple[float, float]:
        episodes = float(weight @ total)
        if episodes <= 0:
            return NAN, NAN
        return float(weight @ found[0]) / episodes, float(weight @ found[1]) / episodes

    return _figure("event_recall", part, "higher", "", int((total > 0).sum()), metric, draws)


def _found_recorded(
    frozen: Frozen, contestant: Contestant, place: dict[str, int], found: FloatArray, total: FloatArray
) -> None:
    rows = frozen.mask("base")
    windows = frozen.windows.take(rows)
    heads = {name: (value, limit) for name, value, limit in contestant.raised_by(len(frozen.windows))}
    for kind in FAILURE_TYPES:
        name = ANOMALY if ANOMALY in heads else kind
        raised = []
        if name in heads:
            value, limit = heads[name]
            raised = alerts(windows, value[rows], limit, contestant.thresholds.decision)
        for held in hold_against(raised, windows, frozen.episodes, kind):
            total[place[held.episode.vehicle_id]] += 1
            found[place[held.episode.vehicle_id]] += held.detected


def _found_sampled(
    frozen: Frozen, contestant: Contestant, part: Part, place: dict[str, int], found: FloatArray, total: FloatArray
) -> None:
    windows = frozen.windows
    heads = {name: (value, limit) for name, value, limit in contestant.raised_by(len(windows))}
    for rows in occasions(windows, frozen.mask(part) & (windows.type_index >= 0)):
        kind = FAILURE_TYPES[int(windows.type_index[rows[0]])]
        name = ANOMALY if ANOMALY in heads else kind
        vehicle = place[str(windows.vehicle[rows[0]])]
        total[vehicle] += 1
        found[vehicle] += name in heads and is_raised(heads[name], rows, contestant.thresholds.decision.k)


def occasions(windows: Windows, chosen: BoolArray) -> list[npt.NDArray[np.intp]]:
    """Return rows of the chosen windows, grouped: one vehicle, one failure type or none, no gap above half an hour."""
    rows = np.flatnonzero(chosen)
    order = np.lexsort((windows.end_s[rows], windows.type_index[rows], windows.vehicle[rows]))
    rows = rows[order]
    if not len(rows):
        return []
    another = (
        (windows.vehicle[rows[1:]] != windows.vehicle[rows[:-1]])
        | (windows.type_index[rows[1:]] != windows.type_index[rows[:-1]])
        | (np.diff(windows.end_s[rows]) > OCCASION_S)
    )
    return list(np.split(rows, np.flatnonzero(another) + 1))


def is_raised(head: tuple[FloatArray, TypeThreshold], rows: npt.NDArray[np.intp], enough: int) -> bool:
    """Whether an occasion's windows `rows` would raise an alert of this head."""
    value, limit = head
    return int((value[rows] >= limit.raise_at).sum()) >= min(enough, len(rows))


def _false_alarms(frozen: Frozen, both: tuple[Contestant, Contestant], draws: npt.NDArray[np.int64]) -> Figure | None:
    """Alert episodes on healthy windows of the recordings as they are, by vehicle-month."""
    mask = frozen.mask("base")
    windows = frozen.windows.take(mask)
    place = {vehicle: i for i, vehicle in enumerate(frozen.vehicles)}
    months = np.zeros(len(place))
    for vehicle in np.unique(windows.vehicle).tolist():
        months[place[vehicle]] = healthy_months(windows.take(windows.vehicle == vehicle))
    wrong = np.zeros((len(both), len(place)))
    for k, contestant in enumerate(both):
        for _, value, limit in contestant.raised_by(len(frozen.windows)):
            raised = alerts(windows, value[mask], limit, contestant.thresholds.decision)
            for alert in false_alarms(raised, windows):
                wrong[k, place[alert.vehicle_id]] += 1
    return _rate("false_alarms", "base", "per vehicle-month", wrong, months, draws)


def _occasions(
    frozen: Frozen, both: tuple[Contestant, Contestant], part: Part, draws: npt.NDArray[np.int64]
) -> Figure | None:
    """Share of the occasions on which a person saw nothing wrong, and the model would raise an alert."""
    windows = frozen.windows
    place = {vehicle: i for i, vehicle in enumerate(frozen.vehicles)}
    total = np.zeros(len(place))
    wrong = np.zeros((len(both), len(place)))
    heads = [c.raised_by(len(windows)) for c in both]
    for rows in occasions(windows, frozen.mask(part) & windows.healthy):
        vehicle = place[str(windows.vehicle[rows[0]])]
        total[vehicle] += 1
        for k, of_contestant in enumerate(heads):
            enough = both[k].thresholds.decision.k
            wrong[k, vehicle] += any(is_raised((value, limit), rows, enough) for _, value, limit in of_contestant)
    return _rate("false_alarms", part, "per healthy occasion", wrong, total, draws)


def _rate(
    name: str, part: Part, unit: str, count: FloatArray, exposure: FloatArray, draws: npt.NDArray[np.int64]
) -> Figure | None:
    if not exposure.any():
        return None

    def metric(weight: FloatArray) -> tuple[float, float]:
        over = float(weight @ exposure)
        return (float(weight @ count[0]) / over, float(weight @ count[1]) / over) if over > 0 else (NAN, NAN)

    worse_on = int((count[1] > count[0]).sum() - (count[1] < count[0]).sum())
    return _figure(name, part, "lower", unit, int((exposure > 0).sum()), metric, draws, worse_on)


def _severity(frozen: Frozen, both: tuple[Contestant, Contestant], draws: npt.NDArray[np.int64]) -> Figure | None:
    """Mean steps between the level said and the true one, told the true type; every vehicle the same."""
    windows = frozen.windows
    rows = np.flatnonzero((windows.severity_index >= 0) & (windows.type_index >= 0) & frozen.mask("all"))
    if not len(rows):
        return None
    vehicle, true = frozen.number[rows], windows.severity_index[rows]
    share = 1.0 / np.bincount(vehicle)[vehicle]
    off = [
        None
        if c.scores.severity is None
        else np.abs(grade(c.scores.severity[rows, windows.type_index[rows]]) - true).astype(np.float64)
        for c in both
    ]

    def metric(weight: FloatArray) -> tuple[float, float]:
        of_window = share * weight[vehicle]
        total = float(of_window.sum())
        first, second = (NAN if o is None or total <= 0 else float(of_window @ o) / total for o in off)
        return first, second

    return _figure("severity_steps_off", "all", "lower", "levels", len(np.unique(vehicle)), metric, draws)

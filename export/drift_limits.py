"""Limits of drift, calibrated on chunks of the training fleet: a healthy vehicle that is not the fleet is no alarm.

One vehicle always differs from the fleet: it has one odometer, one battery, one driver. How much, and how fast it
averages out over vehicles, the training fleet itself shows. Each draw takes v vehicles and from each a run of w windows
in a row, merges them with equal shares, and measures their stability index against a fleet drawn anew from the others:
what chance alone does to both sides. A draw for v above a third of the vehicles cannot leave them out and takes both
sides from all of them (the two-sample bootstrap of Efron and Tibshirani, 1993, section 16.2).

All variables of all strata are one family: the limit of a variable is its own 99 % quantile, stretched by the one
factor that lets the largest of all exceed its limit in only the stated share of draws (the maximum statistic of
Westfall and Young, 1993). So `false_alarm_rate` is that of any alarm at all in one look at healthy vehicles.

However many the draws, they repeat a few dozen vehicles, and a new one may lie outside of what they ever show. The
distance of each variable's quantile from its median, in logarithms, is therefore widened as a prediction limit from n
values is against a known distribution: by t √(1 + 1/n) / z (Hahn and Meeker, Statistical Intervals, 1991). Nothing
here reads a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from edge_agent.contract.bundle import DriftCalibration, DriftReferenceVariable, DriftSize
from edge_agent.contract.drift_measure import psi
from edge_agent.pipeline.drift import bin_of

VEHICLES = (1, 3, 10, 30)
WINDOWS = (60, 240)  # an hour, and four, of driving; a verdict is for at least so many of each vehicle
DRAWS = 2000
LEAST_VEHICLES = 8  # that have so many windows in a stratum; of fewer, chance cannot be told from vehicles
BASE_QUANTILE = 0.99
SMALLEST = 1e-4  # a variable that never moved still has a limit above rounding
SEED = 20_260_101

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Values of some variables over the rows of some vehicles: windows, or sampled frames of windows.

    values     [R, V] float, NaN = missing
    vehicle    [R] str
    stratum    [R] str
    end_s      [R] of the window that the row belongs to
    per_window how many rows a window has on the vehicle that is judged: 60 frames of a stride, or 1
    """

    variables: tuple[DriftReferenceVariable, ...]
    values: npt.NDArray[np.floating]
    vehicle: npt.NDArray[np.str_]
    stratum: npt.NDArray[np.str_]
    end_s: FloatArray
    per_window: int


class _Chunks:
    """Counts of one vehicle's rows in one stratum, in the order of time, so that any run of them is a subtraction."""

    def __init__(self, bins: npt.NDArray[np.int64], width: int, end_s: FloatArray) -> None:
        order = np.argsort(end_s, kind="stable")
        self.end_s = end_s[order]
        held = np.zeros((len(order) + 1, width), np.int32)
        rows = np.repeat(np.arange(1, len(order) + 1), bins.shape[1])
        np.add.at(held, (rows, bins[order].reshape(-1)), 1)
        self.sums = np.cumsum(held, axis=0)

    @property
    def total(self) -> npt.NDArray[np.int32]:
        return np.asarray(self.sums[-1], np.int32)

    def between(self, from_s: FloatArray, to_s: FloatArray) -> npt.NDArray[np.int32]:
        first = np.searchsorted(self.end_s, from_s, side="left")
        last = np.searchsorted(self.end_s, to_s, side="right")
        return np.asarray(self.sums[last] - self.sums[first], np.int32)


class _Pool:
    """One stratum of one group of rows: which vehicles have how many windows, and their counts."""

    def __init__(self, rows: Rows, windows: dict[tuple[str, str], FloatArray], stratum: str) -> None:
        lengths = [len(v.edges) + 2 for v in rows.variables]
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.width = int(self.ends[-1])
        self.per_window = rows.per_window
        self.vehicles: list[str] = []
        self.windows: list[FloatArray] = []  # their ends, in order
        self.chunks: list[_Chunks] = []
        for vehicle in np.unique(rows.vehicle).tolist():
            mine = (rows.vehicle == vehicle) & (rows.stratum == stratum)
            ends = windows.get((vehicle, stratum))
            if ends is None or not mine.any():
                continue
            bins = np.stack(
                [
                    self.starts[i] + bin_of(variable.edges, rows.values[mine, i])
                    for i, variable in enumerate(rows.variables)
                ],
                axis=1,
            )
            self.vehicles.append(vehicle)
            self.windows.append(ends)
            self.chunks.append(_Chunks(bins, self.width, rows.end_s[mine]))

    def indices(self, current: FloatArray, reference: FloatArray) -> FloatArray:
        """Stability index of each variable: [B, width] and [B, width] → [B, V]."""
        return np.stack(
            [psi(reference[:, a:b], current[:, a:b]) for a, b in zip(self.starts, self.ends, strict=True)], axis=1
        )

    def draw(self, vehicles: int, windows: int, random: np.random.Generator, draws: int) -> FloatArray | None:
        """Return the index of each variable in each draw, [B, V]; None where too few vehicles have so many windows."""
        able = [i for i, ends in enumerate(self.windows) if len(ends) >= windows]
        if len(able) < LEAST_VEHICLES:
            return None
        count = len(self.chunks)
        apart = vehicles <= len(able) // 3
        if apart:
            chosen = np.array(able)[random.random((draws, len(able))).argsort(axis=1)[:, :vehicles]]
        else:
            chosen = random.choice(able, size=(draws, vehicles))
        order = random.random((draws, count))
        if apart:
            np.put_along_axis(order, chosen, 2.0, axis=1)  # the drawn ones last: they are not in the other side
        others = order.argsort(axis=1)
        there = np.take_along_axis(others, random.integers(count - vehicles * apart, size=(draws, count)), axis=1)
        weights = np.zeros((draws, count))
        np.add.at(weights, (np.arange(draws)[:, None], there), 1.0)
        reference = weights @ np.stack([chunk.total for chunk in self.chunks]).astype(np.float64)
        current = np.zeros((draws, self.width))
        for i in able:
            drawn = np.nonzero(chosen == i)[0]
            np.add.at(current, drawn, self._runs(i, windows, len(drawn), random))
        return self.indices(current, reference)

    def _runs(self, i: int, windows: int, number: int, random: np.random.Generator) -> FloatArray:
        """Count so many runs of windows of one vehicle, [number, width], as rows of a vehicle that is judged."""
        ends = self.windows[i]
        first = random.integers(len(ends) - windows + 1, size=number)
        counted = self.chunks[i].between(ends[first], ends[first + windows - 1]).astype(np.float64)
        rows = counted[:, self.starts[0] : self.ends[0]].sum(axis=1, keepdims=True)
        return np.asarray(counted * (windows * self.per_window / np.maximum(rows, 1.0)), np.float64)


def calibrate(
    groups: Sequence[Rows],
    windows: dict[tuple[str, str], FloatArray],
    *,
    false_alarm_rate: float,
    draws: int = DRAWS,
) -> tuple[DriftCalibration | None, dict[str, dict[str, tuple[float, ...]]]]:
    """Return what the limits promise, and the limits: variable → stratum → one a size of the calibration.

    `windows` are the ends of every vehicle's windows, in order, by (vehicle, stratum). A stratum for which even the
    shortest runs are too few has no limits; for longer runs that are too few the limit of shorter ones stands, which is
    not below it. (None, {}) where no stratum has enough.
    """
    strata = sorted({stratum for _, stratum in windows})
    pools = {(i, s): _Pool(rows, windows, s) for i, rows in enumerate(groups) for s in strata}
    random = np.random.default_rng(SEED)
    sizes = tuple(DriftSize(vehicles=v, windows=w) for w in WINDOWS for v in VEHICLES)
    limits: dict[tuple[int, str], list[FloatArray]] = {}
    for size in sizes:
        drawn: dict[tuple[int, str], FloatArray] = {}
        for key, pool in pools.items():
            found = pool.draw(size.vehicles, size.windows, random, draws)
            if found is not None:
                drawn[key] = found
        family = _family_limits(drawn, {key: len(pools[key].vehicles) for key in drawn}, false_alarm_rate)
        for key in pools:
            if key in family:
                limits.setdefault(key, []).append(family[key])
            elif key in limits:  # not enough with so many windows
                shorter = VEHICLES.index(size.vehicles) + (WINDOWS.index(size.windows) - 1) * len(VEHICLES)
                limits[key].append(limits[key][shorter])
    named: dict[str, dict[str, tuple[float, ...]]] = {}
    for (i, stratum), held in limits.items():
        for j, variable in enumerate(groups[i].variables):
            named.setdefault(variable.name, {})[stratum] = tuple(float(f"{row[j]:.4g}") for row in held)
    if not named:
        return None, {}
    return DriftCalibration(false_alarm_rate=false_alarm_rate, draws=draws, sizes=sizes), named


def _family_limits(
    drawn: dict[tuple[int, str], FloatArray], vehicles: dict[tuple[int, str], int], false_alarm_rate: float
) -> dict[tuple[int, str], FloatArray]:
    """Stretch every variable's own quantile by the factor that holds the rate for the largest of all of them."""
    if not drawn:
        return {}
    base = {key: np.maximum(np.quantile(found, BASE_QUANTILE, axis=0), SMALLEST) for key, found in drawn.items()}
    largest = np.max([(found / base[key]).max(axis=1) for key, found in drawn.items()], axis=0)
    factor = float(np.quantile(largest, 1.0 - false_alarm_rate))
    limits = {}
    for key, found in drawn.items():
        n = vehicles[key]
        middle = np.maximum(np.median(found, axis=0), SMALLEST)
        wider = stats.t.ppf(BASE_QUANTILE, n - 1) * np.sqrt(1.0 + 1.0 / n) / stats.norm.ppf(BASE_QUANTILE)
        limits[key] = factor * middle * (base[key] / middle) ** wider
    return limits

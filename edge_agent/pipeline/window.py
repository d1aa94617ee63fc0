"""The grid: ordered arrivals become windows of fixed length, or a reason why there is none.

Promises: the value at a grid point is the newest arrival at or before it that is not older than the signal's
`max_age_s`, else NaN; nothing is interpolated. A silence longer than the gap limit, or time running backwards, starts a
new window. A block cut into pieces anywhere gives the same windows. Leaves order to `ingest` and scores to `inference`.

A source that reports more slowly than the grid (every 10 or 30 s on a 1 s grid) is not held: its values stand at their
own grid point, with NaN between, and coverage counts against its `period_s` (design section 3).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import Catalogue, FloatArray
from edge_agent.pipeline.outcomes import Float32Array, NoScore, Window

IntArray = npt.NDArray[np.int64]
_ON_GRID = 1e-6  # of a period: a time stamp that floating point put just above its grid point still belongs to it
_NEVER = -(2**62)
_SPARSE = 1.5  # a source slower than this many periods of the grid is not held


class _Lane:
    """One group of columns on the grid: what arrived, frame by frame, and the newest value from before."""

    def __init__(self, frames: int, columns: int) -> None:
        self.values: Float32Array = np.full((frames, columns), np.nan, np.float32)
        self.carry: Float32Array = np.full(columns, np.nan, np.float32)
        self.carry_index: IntArray = np.full(columns, _NEVER, np.int64)
        self.seen = np.zeros(columns, bool)

    def clear(self) -> None:
        self.values[:] = np.nan
        self.carry[:] = np.nan
        self.carry_index[:] = _NEVER

    def put(self, index: IntArray, rank: IntArray, rows: FloatArray, first: int) -> None:
        """Write rows (sorted by time) into their frames; the newest value of a frame stands."""
        if not rows.shape[1]:
            return
        present = ~np.isnan(rows)
        self.seen |= present.any(axis=0)
        early = int(np.searchsorted(index, first))
        if early:  # only where the stride is longer than the window: frames that no window shows
            self._keep(rows[:early], present[:early], index[:early])
        for r in range(int(rank[early:].max(initial=-1)) + 1):
            chosen = early + np.flatnonzero(rank[early:] == r)
            frames = index[chosen] - first
            self.values[frames] = np.where(present[chosen], rows[chosen], self.values[frames])

    def put_one(self, frame: int, row: FloatArray) -> None:
        """Write one row into one frame: the live path."""
        if row.shape[0]:
            present = ~np.isnan(row)
            self.seen |= present
            self.values[frame][present] = row[present]

    def _keep(self, rows: npt.NDArray[np.floating], present: npt.NDArray[np.bool_], index: IntArray) -> None:
        any_present = present.any(axis=0)
        last = rows.shape[0] - 1 - np.argmax(present[::-1], axis=0)
        columns = np.flatnonzero(any_present)
        self.carry[columns] = rows[last[columns], columns]
        self.carry_index[columns] = index[last[columns]]

    def advance(self, count: int, first: int) -> None:
        """Drop the oldest `count` frames, which begin at grid index `first`, and append as many empty ones."""
        frames = self.values.shape[0]
        dropped = min(count, frames)
        if self.values.shape[1]:
            old = self.values[:dropped]
            self._keep(old, ~np.isnan(old), np.arange(first, first + dropped, dtype=np.int64))
        self.values[: frames - dropped] = self.values[dropped:]
        self.values[frames - dropped :] = np.nan

    def held(self, first: int, hold_frames: IntArray, rows: IntArray) -> Float32Array:
        """Return [len(rows), columns]: at each asked row the newest value not older than its column's hold."""
        frames, columns = self.values.shape
        frame = np.arange(frames, dtype=np.int64)[:, None]
        position = np.where(np.isnan(self.values), np.int64(_NEVER), frame)
        position[0] = np.where(position[0] < 0, np.maximum(self.carry_index - first, _NEVER), position[0])
        position = np.maximum.accumulate(position, axis=0)[rows]
        value = self.values[np.maximum(position, 0), np.arange(columns)]
        value = np.where(position < 0, self.carry, value)
        return np.where(frame[rows] - position > hold_frames, np.float32(np.nan), value).astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class _Hold:
    scalars: IntArray
    cell_voltage: IntArray
    cell_temperature: IntArray


class Windower:
    """Grids the ordered arrivals of one vehicle.

    period_s        how often the source reports (the mapping's); coverage counts against it
    cells, probes   widths of the two vectors, 0 where the source has none
    expected        names of the signals that the source carries; with those that were ever seen they make the coverage.
                    A signal that neither holds cannot block a score
    """

    def __init__(
        self, catalogue: Catalogue, spec: WindowSpec, period_s: float, cells: int, probes: int, *,
        expected: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.catalogue = catalogue
        self.spec = spec
        self.period_s = max(period_s, spec.period_s)
        self._stride = max(1, round(spec.stride_s / spec.period_s))
        self.gap_s = max(spec.gap_limit_s, 3.0 * period_s)
        self._lanes = (
            _Lane(spec.frames, len(catalogue.scalars)),
            _Lane(spec.frames, cells),
            _Lane(spec.frames, probes),
        )
        for name in expected:
            if name in catalogue.scalar_index:
                self._lanes[0].seen[catalogue.scalar_index[name]] = True
        vector_step = max(1, round(spec.vector_period_s / spec.period_s))
        rows = spec.frames - 1 - vector_step * np.arange(spec.vector_frames - 1, -1, -1, dtype=np.int64)
        self._vector_rows: IntArray = np.maximum(rows, 0)
        self._all_rows: IntArray = np.arange(spec.frames, dtype=np.int64)
        self._hold = _Hold(
            _hold_frames(catalogue.scalar_max_age_s, spec.period_s, held=period_s <= _SPARSE * spec.period_s, least=0),
            self._vector_hold("cell_voltage", period_s, vector_step),
            self._vector_hold("cell_temperature", period_s, vector_step),
        )
        self._first: int | None = None  # grid index of the oldest frame kept; None = nothing arrived yet
        self._end = 0  # grid index at which the next window ends
        self._last_s = -np.inf  # time of the newest arrival
        self._last_window_s: float | None = None
        self.stale: tuple[str, ...] = ()
        self.starts = 0

    def _vector_hold(self, role: str, period_s: float, step: int) -> IntArray:
        signal = self.catalogue.role(role)
        age = np.array([0.0 if signal is None else signal.max_age_s])
        return _hold_frames(
            age, self.spec.period_s, held=period_s <= _SPARSE * self.spec.vector_period_s, least=step - 1
        )

    @property
    def warming_s(self) -> float:
        """Seconds of arrivals still needed before the next window can end; the whole length before the first one."""
        if self._first is None:
            return self.spec.length_s
        return max(0.0, self._end * self.spec.period_s - self._last_s)

    def push(self, block: ArrivalBlock) -> list[Window | NoScore]:
        """Take rows sorted by time; return the windows that ended, oldest first."""
        rows = len(block)
        if not rows:
            return []
        if rows == 1:
            return self._push_one(block)
        index = self._index(block.time_s)
        steps = np.diff(block.time_s, prepend=block.time_s[0] if self._first is None else self._last_s)
        breaks = np.flatnonzero((steps > self.gap_s) | (steps < 0))
        group_start = np.concatenate(([True], np.diff(index) != 0))
        rank = np.arange(rows) - np.maximum.accumulate(np.where(group_start, np.arange(rows), 0))
        ended: list[Window | NoScore] = []
        begin = 0
        for stop in (*breaks.tolist(), rows):
            if stop > begin:
                ended += self._segment(block, index, rank, begin, stop)
            if stop < rows:
                ended += self._break()
            begin = stop
        return ended

    def flush(self) -> list[Window | NoScore]:
        """Return the window that ends exactly at the newest arrival, if one does: the source has ended."""
        return self._ended_by(int(self._index(np.array([self._last_s]))[0]) + 1) if self._first is not None else []

    def _index(self, time_s: FloatArray) -> IntArray:
        return np.ceil(time_s / self.spec.period_s - _ON_GRID).astype(np.int64)

    def _push_one(self, block: ArrivalBlock) -> list[Window | NoScore]:
        time = float(block.time_s[0])
        ended: list[Window | NoScore] = []
        if self._first is not None and not 0 <= time - self._last_s <= self.gap_s:
            ended = self._break()
        index = int(np.ceil(time / self.spec.period_s - _ON_GRID))
        if self._first is None:
            self._start(index)
        elif index > self._end:
            ended += self._ended_by(index)
        first = self._first or 0
        if index >= first:
            rows = (block.scalars, block.cell_voltage, block.cell_temperature)
            for lane, values in zip(self._lanes, rows, strict=True):
                lane.put_one(index - first, values[0])
        else:
            self._put(block, np.array([index]), np.zeros(1, np.int64), 0, 1)
        self._last_s = time
        return ended

    def _segment(
        self, block: ArrivalBlock, index: IntArray, rank: IntArray, begin: int, stop: int
    ) -> list[Window | NoScore]:
        """Rows without a break between them: fill up to each window's end, and cut it."""
        if self._first is None:
            self._start(int(index[begin]))
        ended: list[Window | NoScore] = []
        at = begin
        while at < stop:
            upto = begin + int(np.searchsorted(index[begin:stop], self._end, side="right"))
            if upto > at:
                self._put(block, index, rank, at, upto)
                at = upto
            if at < stop:
                ended += self._ended_by(int(index[at]))
        self._last_s = float(block.time_s[stop - 1])
        return ended

    def _put(self, block: ArrivalBlock, index: IntArray, rank: IntArray, at: int, upto: int) -> None:
        first = self._first or 0
        part = slice(at, upto)
        for lane, values in zip(self._lanes, (block.scalars, block.cell_voltage, block.cell_temperature), strict=True):
            lane.put(index[part], rank[part], values[part], first)

    def _start(self, index: int) -> None:
        self._first = index
        self._end = index + self.spec.frames - 1
        self.starts += 1

    def _break(self) -> list[Window | NoScore]:
        """Give the window that ended with the last arrival, then forget: a gap is never bridged."""
        ended = self.flush()
        for lane in self._lanes:
            lane.clear()
        self._first = None
        return ended

    def _ended_by(self, index: int) -> list[Window | NoScore]:
        """Cut every window that ends before grid index `index`."""
        ended: list[Window | NoScore] = []
        while self._end < index:
            ended.append(self._cut())
            first = self._first or 0
            for lane in self._lanes:
                lane.advance(self._stride, first)
            self._first = first + self._stride
            self._end += self._stride
        return ended

    def _cut(self) -> Window | NoScore:
        first = self._first or 0
        scalars, cells, probes = self._lanes
        end_s = self._end * self.spec.period_s
        values = scalars.held(first, self._hold.scalars, self._all_rows)
        cell_voltage = cells.held(first, self._hold.cell_voltage, self._vector_rows)
        cell_temperature = probes.held(first, self._hold.cell_temperature, self._vector_rows)
        coverage, self.stale = self._coverage(values, cell_voltage, cell_temperature)
        if coverage < self.spec.min_coverage or coverage == 0.0:
            named = ", ".join(self.stale[:4]) + (f" and {len(self.stale) - 4} more" if len(self.stale) > 4 else "")
            detail = f"coverage {coverage:.2f} is below {self.spec.min_coverage:.2f}; stale: {named or 'every signal'}"
            return NoScore(end_s, "low_coverage" if coverage else "signal_missing", detail)
        length = self.spec.length_s
        elapsed = length if self._last_window_s is None else min(length, end_s - self._last_window_s)
        self._last_window_s = end_s
        return Window(
            end_s, values, _at_least_one(cell_voltage), _at_least_one(cell_temperature),
            elapsed if elapsed > 0 else length, coverage,
        )  # fmt: skip

    def _coverage(
        self, values: Float32Array, cell_voltage: Float32Array, cell_temperature: Float32Array
    ) -> tuple[float, tuple[str, ...]]:
        """Mean share of expected values over the signals that this source carries, and those below the minimum."""
        expected = self.spec.length_s / self.period_s
        share = np.minimum(1.0, (~np.isnan(values)).sum(axis=0) / expected)
        carried = np.flatnonzero(self._lanes[0].seen)
        shares = {self.catalogue.scalar_names[i]: float(share[i]) for i in carried}
        expected = min(self.spec.vector_frames, self.spec.length_s / self.period_s)
        for role, lane, vector in (
            ("cell_voltage", self._lanes[1], cell_voltage),
            ("cell_temperature", self._lanes[2], cell_temperature),
        ):
            signal = self.catalogue.role(role)
            if signal is not None and lane.seen.any():
                shares[signal.name] = min(1.0, float((~np.isnan(vector)).any(axis=1).sum()) / expected)
        if not shares:
            return 0.0, ()
        stale = tuple(name for name, s in shares.items() if s < self.spec.min_coverage)
        return sum(shares.values()) / len(shares), stale

    def state(self) -> "WindowState":
        """Return what has to be kept so that another instance goes on exactly here."""
        return WindowState(
            first=self._first, end=self._end, last_s=self._last_s, last_window_s=self._last_window_s,
            starts=self.starts, stale=self.stale,
            lanes=tuple(tuple(a.copy() for a in _arrays(lane)) for lane in self._lanes),
            spec=self.spec, period_s=self.period_s,
        )  # fmt: skip

    def restore(self, state: "WindowState", shift_s: float = 0.0) -> None:
        """Go on from `state`; a shift of time that is not a whole number of frames starts a new window.

        Raises `ValueError` when the state is of another shape, window or period: its indices count other frames.
        """
        if (state.spec, state.period_s) != (self.spec, self.period_s):
            raise ValueError("window state of another window or period")
        for lane, arrays in zip(self._lanes, state.lanes, strict=True):
            if any(mine.shape != a.shape for mine, a in zip(_arrays(lane), arrays, strict=True)):
                raise ValueError("window state of another shape")
        for lane, arrays in zip(self._lanes, state.lanes, strict=True):
            for mine, a in zip(_arrays(lane), arrays, strict=True):
                mine[...] = a
        self._first, self._end, self._last_s = state.first, state.end, state.last_s
        self._last_window_s = state.last_window_s
        self.starts, self.stale = state.starts, state.stale
        if shift_s:
            self._last_s += shift_s
            self._last_window_s = None if self._last_window_s is None else self._last_window_s + shift_s
            for lane in self._lanes:
                lane.clear()
            self._first = None


class WindowState(msgspec.Struct, frozen=True, kw_only=True):
    """What `Windower` keeps between two rows."""

    first: int | None
    end: int
    last_s: float
    last_window_s: float | None
    starts: int
    stale: tuple[str, ...]
    lanes: tuple[tuple[npt.NDArray[Any], ...], ...]
    spec: WindowSpec | None = None  # None: kept by an agent that did not say, so no window of ours
    period_s: float = 0.0


def _arrays(lane: _Lane) -> tuple[npt.NDArray[Any], ...]:
    return lane.values, lane.carry, lane.carry_index, lane.seen


def _hold_frames(max_age_s: FloatArray, period_s: float, *, held: bool, least: int) -> IntArray:
    if not held:
        return np.full(max_age_s.shape, least, np.int64)
    return np.maximum(np.floor(max_age_s / period_s + 1e-9).astype(np.int64), least)


def _at_least_one(vector: Float32Array) -> Float32Array:
    """One column of NaN where there is none: GatherElements over zero columns crashes (design section 4)."""
    return vector if vector.shape[1] else np.full((vector.shape[0], 1), np.nan, np.float32)

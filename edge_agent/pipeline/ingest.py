"""Put arrivals in order: reorder within a horizon, drop duplicates, reject what is no time, mask what is no number.

Promises: what comes out is sorted by time; any order of rows in which none comes later than `horizon_s` after a newer
one gives the same output; a block cut into pieces anywhere gives the same rows. Every row or value that does not come
through is counted in `counters`. Memory is bounded by what arrives within the horizon. Leaves gaps, staleness and the
grid to `window`; converting columns and invalid codes was the mapping's work.
"""

from collections import Counter

import msgspec
import numpy as np

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.signals import Catalogue, FloatArray

LATEST_TIME_S = 1e11  # the year 5138: a time stamp in milliseconds or nanoseconds taken for seconds is refused
LARGEST_VALUE = 1e30  # below float32's 3.4e38, with room for squares in double precision
STEP_BACK_ROWS = 30  # so many rows in a row from before the horizon are a clock set back, not stragglers


class Ingest:
    """Orders the arrivals of one vehicle.

    horizon_s     how late a row may be and still be put in its place; every row is held back for as long. 0 for a bus
                  whose rows are stamped at receipt: they pass through at once, and equal times stay separate rows
    catalogue     where given, scalars and vectors outside its range become NaN and are counted

    counters: rows, rows_bad_time (not finite, or beyond the year 5138), rows_late, rows_merged (same time: the larger
    value stands where two differ, as nobody knows which is newer), clock_set_back, values_not_finite,
    values_out_of_range.
    """

    def __init__(self, horizon_s: float = 2.0, catalogue: Catalogue | None = None) -> None:
        if not (np.isfinite(horizon_s) and horizon_s >= 0):
            raise ValueError(f"horizon_s is {horizon_s}; it must be finite and not negative")
        self.horizon_s = horizon_s
        self.counters: Counter[str] = Counter()
        self._limits = None if catalogue is None else _Limits(catalogue)
        self._newest = -np.inf
        self._late_run = 0
        self._pending: list[ArrivalBlock] = []

    @property
    def pending_rows(self) -> int:
        """Return how many rows are held back at present."""
        return sum(len(block) for block in self._pending)

    def push(self, block: ArrivalBlock) -> ArrivalBlock:
        """Take rows in any order; return those that no later row can precede any more, sorted.

        After a clock was set back by more than the horizon for `STEP_BACK_ROWS` rows, what was held is returned and the
        rows of the new time begin with the next call; a receiver sees time run backwards once, between two blocks.
        """
        self.counters["rows"] += len(block)
        block = self._clean(block)
        if not len(block):
            return block
        before = np.maximum.accumulate(np.concatenate(([self._newest], block.time_s)))
        late = block.time_s < before[:-1] - self.horizon_s
        if late.any() or self._late_run:
            return self._push_with_late_rows(block)
        self._newest = float(before[-1])
        self._pending.append(block)
        return self._release()

    def flush(self) -> ArrivalBlock:
        """Return everything that is still held, sorted: the source has ended."""
        held, self._pending = self._pending, []
        if not held:
            return ArrivalBlock.empty(0)
        return self._ordered(ArrivalBlock.concatenate(held))

    def _push_with_late_rows(self, block: ArrivalBlock) -> ArrivalBlock:
        """Row by row: refuse stragglers, or follow a clock that was set back."""
        kept: list[int] = []
        released: list[ArrivalBlock] = []
        for row, time in enumerate(block.time_s.tolist()):
            if time >= self._newest - self.horizon_s:
                self._newest = max(self._newest, time)
                self._late_run = 0
                kept.append(row)
                continue
            self._late_run += 1
            if self._late_run < STEP_BACK_ROWS:
                self.counters["rows_late"] += 1
                continue
            self.counters["clock_set_back"] += 1
            self._pending.append(block.take(np.array(kept, np.intp)))
            released.append(self.flush())
            kept = [row]
            self._newest, self._late_run = time, 0
        self._pending.append(block.take(np.array(kept, np.intp)))
        if released:
            return released[0] if len(released) == 1 else ArrivalBlock.concatenate(released)
        return self._release()

    def _release(self) -> ArrivalBlock:
        if self.horizon_s == 0:
            block = self._pending[0] if len(self._pending) == 1 else ArrivalBlock.concatenate(self._pending)
            self._pending = []
            return block
        limit = self._newest - self.horizon_s
        if not any(bool((b.time_s < limit).any()) for b in self._pending):
            return self._pending[-1].take(slice(0, 0))
        held = self._pending[0] if len(self._pending) == 1 else ArrivalBlock.concatenate(self._pending)
        ready = held.time_s < limit
        self._pending = [] if ready.all() else [held.take(~ready)]
        return self._ordered(held.take(ready))

    def _ordered(self, block: ArrivalBlock) -> ArrivalBlock:
        """Sort, and fold rows of one time into one row."""
        if len(block) < 2 or self.horizon_s == 0:
            return block
        steps = np.diff(block.time_s)
        if not (steps >= 0).all():
            block = block.take(np.argsort(block.time_s, kind="stable"))
            steps = np.diff(block.time_s)
        if (steps > 0).all():
            return block
        starts = np.flatnonzero(np.concatenate(([True], steps > 0)))
        self.counters["rows_merged"] += len(block) - starts.shape[0]

        def fold(values: FloatArray) -> FloatArray:
            return np.fmax.reduceat(values, starts, axis=0) if values.shape[1] else values[starts]

        return ArrivalBlock(
            block.time_s[starts], fold(block.scalars), fold(block.cell_voltage), fold(block.cell_temperature)
        )

    def _clean(self, block: ArrivalBlock) -> ArrivalBlock:
        good = np.abs(block.time_s) <= LATEST_TIME_S  # false for NaN
        if not good.all():
            self.counters["rows_bad_time"] += int((~good).sum())
            block = block.take(good)
        limits = self._limits
        return ArrivalBlock(
            block.time_s,
            self._mask(block.scalars, None if limits is None else limits.scalars),
            self._mask(block.cell_voltage, None if limits is None else limits.cell_voltage),
            self._mask(block.cell_temperature, None if limits is None else limits.cell_temperature),
        )

    def _mask(self, values: FloatArray, limits: tuple[FloatArray, FloatArray] | None) -> FloatArray:
        infinite = np.abs(values) > LARGEST_VALUE
        if infinite.any():
            self.counters["values_not_finite"] += int(infinite.sum())
            values = np.where(infinite, np.nan, values)
        if limits is not None and values.size:
            outside = (values < limits[0]) | (values > limits[1])
            if outside.any():
                self.counters["values_out_of_range"] += int(outside.sum())
                values = np.where(outside, np.nan, values)
        return values

    def state(self) -> "IngestState":
        """Return what has to be kept so that another instance goes on exactly here."""
        held = self._pending
        block = None if not held else held[0] if len(held) == 1 else ArrivalBlock.concatenate(held)
        return IngestState(newest_s=self._newest, late_run=self._late_run, pending=block, counters=dict(self.counters))

    def restore(self, state: "IngestState", shift_s: float = 0.0) -> None:
        """Go on from `state`, with every time moved by `shift_s`."""
        self._newest = state.newest_s + shift_s
        self._late_run = state.late_run
        self.counters = Counter(state.counters)
        self._pending = []
        if state.pending is not None and len(state.pending):
            b = state.pending
            self._pending = [ArrivalBlock(b.time_s + shift_s, b.scalars, b.cell_voltage, b.cell_temperature)]


class IngestState(msgspec.Struct, frozen=True, kw_only=True):
    """What `Ingest` keeps between two rows."""

    newest_s: float
    late_run: int
    pending: ArrivalBlock | None
    counters: dict[str, int]


class _Limits:
    """The catalogue's ranges, as arrays to compare with."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.scalars = (catalogue.scalar_min, catalogue.scalar_max)
        self.cell_voltage = _vector_limits(catalogue, "cell_voltage")
        self.cell_temperature = _vector_limits(catalogue, "cell_temperature")


def _vector_limits(catalogue: Catalogue, role: str) -> tuple[FloatArray, FloatArray] | None:
    signal = catalogue.role(role)
    return None if signal is None else (np.array([signal.min]), np.array([signal.max]))

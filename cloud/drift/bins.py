"""The bins of one release, laid out as one long row, so that a message's counts add up by one vector addition.

Pure. `flatten` says why counts do not fit instead of guessing where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain

import msgspec
import numpy as np
import numpy.typing as npt

from cloud.drift import statistics
from cloud.drift.statistics import Distances
from edge_agent.contract.bundle import DriftReference, DriftReferenceVariable, WindowSpec, parse_drift_reference
from edge_agent.contract.errors import BundleError
from edge_agent.contract.messages import DriftCounts, DriftVariable

IntArray = npt.NDArray[np.int64]


# of one message: a vehicle sends at least once a day of its clock, and makes at most a window a second (86,400)
MOST_WINDOWS = 100_000


class CountsError(ValueError):
    """These counts were not made with these bins; `str()` of it says which variable and why."""


@dataclass(frozen=True)
class Bins:
    """Bins of every variable of a reference, one after the other."""

    reference: DriftReference
    spec: WindowSpec = field(default_factory=WindowSpec)

    @cached_property
    def variables(self) -> tuple[DriftReferenceVariable, ...]:
        """The variables, in the order of their names, which is the order in which vehicles send them."""
        return tuple(sorted(self.reference.variables, key=lambda v: v.name))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the variables, in order."""
        return tuple(v.name for v in self.variables)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of bins of each variable, that of the missing included."""
        return tuple(len(v.edges) + 2 for v in self.variables)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each variable's bins lie in a row."""
        ends = np.cumsum(self.lengths).tolist()
        return {
            name: slice(end - length, end) for name, length, end in zip(self.names, self.lengths, ends, strict=True)
        }

    @cached_property
    def width(self) -> int:
        """Length of a row."""
        return sum(self.lengths)

    @property
    def frames_a_window(self) -> int:
        """Frames that a window adds to each signal: those of its newest stride, as the vehicle counts them."""
        return min(self.spec.frames, max(1, round(self.spec.stride_s / self.spec.period_s)))

    def row(self, told: DriftCounts) -> IntArray:
        """Lay one message's counts out as a row [width]. Raises `CountsError`, also where they do not add up.

        A feature or score is counted once a window, a signal once a frame of the newest stride. A message that counts
        more of one variable would weigh more than its windows, which is what a vehicle's share goes by.
        """
        if told.windows > MOST_WINDOWS:
            raise CountsError(f"more than {MOST_WINDOWS} windows in one message")
        for variable in told.variables:
            kind = self._kinds.get(variable.name)
            due = told.windows * (self.frames_a_window if kind == "signal" else 1)
            if kind is not None and sum(variable.counts) != due:
                each = f"{self.frames_a_window} frames" if kind == "signal" else "one"
                raise CountsError(f"{variable.name[:80]!a}: its counts are not {each} a window")
        return self.flatten(told.variables)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {v.name: v.kind for v in self.variables}

    def flatten(self, counted: Sequence[DriftVariable]) -> IntArray:
        """Lay counts out as a row [width]; a variable that was not counted is zeros. Raises `CountsError`."""
        if tuple(v.name for v in counted) == self.names and tuple(len(v.counts) for v in counted) == self.lengths:
            return np.fromiter(chain.from_iterable(v.counts for v in counted), np.int64, self.width)
        row = np.zeros(self.width, np.int64)
        for variable in counted:
            place = self.slices.get(variable.name)
            if place is None:
                raise CountsError(f"{variable.name[:80]!a} is no variable of this reference")
            if len(variable.counts) != place.stop - place.start:
                raise CountsError(
                    f"{variable.name[:80]!a} has {len(variable.counts)} counts, its bins are {place.stop - place.start}"
                )
            row[place] = variable.counts
        return row

    @cached_property
    def _stacks(self) -> tuple[tuple[IntArray, IntArray], ...]:
        """Variables with the same number of bins, [n], and where their bins lie in a row, [n, K]."""
        lengths, starts = np.array(self.lengths), np.array([s.start for s in self.slices.values()])
        stacks = []
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            stacks.append((chosen, starts[chosen][:, None] + np.arange(length)))
        return tuple(stacks)

    def distances(self, reference: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Distances | None, ...]:
        """Hold a row of counts [width] against a reference's; None for a variable of which one side holds nothing."""
        p, q = np.asarray(reference, np.float64), np.asarray(counts, np.float64)
        found: list[Distances | None] = [None] * len(self.names)
        for variables, places in self._stacks:
            ours, theirs = p[places], q[places]
            known = (ours.sum(axis=1) > 0) & (theirs.sum(axis=1) > 0)
            ours, theirs = ours[known], theirs[known]
            measured = zip(
                statistics.psi(ours, theirs).tolist(), statistics.jensen_shannon(ours, theirs).tolist(),
                statistics.ks(ours, theirs).tolist(), strict=True,
            )  # fmt: skip
            for variable, values in zip(variables[known].tolist(), measured, strict=True):
                found[variable] = Distances(*values)
        return tuple(found)

    def reference_row(self, stratum: str) -> IntArray:
        """Lay the reference's own counts of a stratum out as a row [width]; zeros where it has none."""
        row = np.zeros(self.width, np.int64)
        for variable in self.variables:
            held = variable.counts.get(stratum)
            if held:
                row[self.slices[variable.name]] = held
        return row


@lru_cache(maxsize=16)
def read_bins(body: bytes, window_spec: str) -> Bins:
    """Read `drift_reference.json` and the JSON of its release's `WindowSpec`. Raises `BundleError` when malformed."""
    try:
        spec = msgspec.json.decode(window_spec, type=WindowSpec)
    except msgspec.DecodeError as error:
        raise BundleError(f"drift reference: its window: {error}") from error
    return Bins(parse_drift_reference(body, "drift reference"), spec)

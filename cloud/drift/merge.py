"""Counts of many vehicles become one: each vehicle with its share, no one with too much. Pure.

What is merged of one stratum is Σ share · counts / windows · all windows: as if every vehicle had sent in proportion to
its share. A vehicle's share is that of its windows, but at most `max_vehicle_share`; with fewer than
1 / max_vehicle_share vehicles (20, at 0.05) every vehicle has the same share (`drift_measure.shares`). A vehicle with
fewer than `min_vehicle_windows` in the stratum is left out: its share would be mostly chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud.drift.bins import IntArray
from cloud.drift.limits import Drift
from edge_agent.contract import drift_measure

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Size:
    """How much stands behind a merge of one stratum."""

    windows: int
    vehicles: int
    effective_vehicles: float  # that an equal merge of the same spread would have
    windows_each: float  # likewise, of each of them

    @property
    def effective_windows(self) -> float:
        """Windows that an equal merge of the same spread would have."""
        return self.effective_vehicles * self.windows_each


@dataclass(frozen=True, slots=True)
class Plan:
    """Whom to merge in one stratum, and what one window of each weighs."""

    size: Size
    weights: Mapping[str, float]  # vehicle id → factor of its counts


def plan(windows: Mapping[str, int], limits: Drift) -> Plan:
    """Say what each vehicle's counts weigh, from how many windows [V] each has in the stratum."""
    taken = {vehicle: n for vehicle, n in windows.items() if n >= limits.min_vehicle_windows}
    if not taken:
        return Plan(Size(0, 0, 0.0, 0.0), {})
    held = np.array(list(taken.values()), np.float64)
    share = drift_measure.shares(held, limits.max_vehicle_share)
    vehicles, each = drift_measure.effective(share, held)
    factors = share / held * held.sum()
    return Plan(
        Size(sum(taken.values()), len(taken), vehicles, each),
        {vehicle: float(factor) for vehicle, factor in zip(taken, factors, strict=True)},
    )


class Merge:
    """Adds vehicles up one after the other; holds one row however many there are."""

    def __init__(self, planned: Plan, width: int) -> None:
        self.plan = planned
        self.row: FloatArray = np.zeros(width, np.float64)

    def add(self, vehicle_id: str, row: IntArray) -> None:
        """Add a vehicle's counts [width] with its weight; one that is not planned has none."""
        self.row += self.plan.weights.get(vehicle_id, 0.0) * row

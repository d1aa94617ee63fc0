"""A block of arrivals: what every source hands to the pipeline.

A row is one instant; NaN means "nothing arrived for this signal in this row". A recording gives a row a line, a CAN bus
a row a CAN frame (few values set), so one code path serves a block of one and a block of 100,000.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from edge_agent.contract.signals import FloatArray


@dataclass(frozen=True, slots=True)
class ArrivalBlock:
    """Rows of arrivals in the catalogue's units.

    time_s            [n] seconds on the source's timeline: the host's monotonic clock for a live bus, Unix time for a
                      recording or for telemetry that carries its own time. Need not be sorted: `ingest` does that.
    scalars           [n, S] columns as `Catalogue.scalars`; NaN = nothing arrived, or masked by the mapping.
    cell_voltage      [n, C] volt, C ≥ 0; NaN likewise.
    cell_temperature  [n, P] °C, P ≥ 0; NaN likewise.
    """

    time_s: FloatArray
    scalars: FloatArray
    cell_voltage: FloatArray
    cell_temperature: FloatArray

    def __post_init__(self) -> None:
        rows = self.time_s.shape[0]
        if any(a.ndim != 2 or a.shape[0] != rows for a in (self.scalars, self.cell_voltage, self.cell_temperature)):
            raise ValueError("every array of an ArrivalBlock has one row per time")

    def __len__(self) -> int:
        return int(self.time_s.shape[0])

    def take(self, rows: "slice | np.ndarray[tuple[int], np.dtype[np.intp | np.bool_]]") -> Self:
        """Return the rows selected by a slice, an index array or a mask."""
        return type(self)(self.time_s[rows], self.scalars[rows], self.cell_voltage[rows], self.cell_temperature[rows])

    @classmethod
    def concatenate(cls, blocks: "list[Self]") -> Self:
        """Join blocks of the same widths, in the order given."""
        return cls(
            np.concatenate([b.time_s for b in blocks]),
            np.concatenate([b.scalars for b in blocks]),
            np.concatenate([b.cell_voltage for b in blocks]),
            np.concatenate([b.cell_temperature for b in blocks]),
        )

    @classmethod
    def empty(cls, scalars: int, cells: int = 0, probes: int = 0) -> Self:
        """Return a block of no rows."""
        return cls(np.empty(0), np.empty((0, scalars)), np.empty((0, cells)), np.empty((0, probes)))

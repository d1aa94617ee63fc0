"""The event of a thermal runaway in one cell: what is lost and what heats, second by second after it begins.

Follows the field's kinds of course (docs/adr/0011-faults-are-parameters.md): GB 38031-2025 counts a rise of 1 °C/s
for more than 3 s with a voltage drop above 25 %; in some cars the whole jump lies between two frames and stays flat.
"""

import numpy as np

from edge_agent.contract.signals import FloatArray

PEAK_RISE_K = 420.0
NEIGHBOUR_EVERY_S = 8.0
MOST_CELLS_SHARE = 0.35


def dead_cells(since_s: FloatArray, cells: int) -> FloatArray:
    """Count the cells that have lost their voltage `since_s` after the event (negative: before), [T]."""
    grown = 1.0 + np.floor(np.maximum(since_s, 0.0) / NEIGHBOUR_EVERY_S)
    return np.where(since_s >= 0, np.minimum(grown, np.ceil(MOST_CELLS_SHARE * cells)), 0.0)


def probe_rise_k(since_s: FloatArray, distance: FloatArray, rate_k_per_s: float) -> FloatArray:
    """Rise of probes at `distance` [P] (in probes from the failing cell) after the event, [T, P] K.

    Heat reaches each next probe 40 s later and a third weaker.
    """
    further = distance - distance.min()  # the nearest probe feels it at once
    since = np.maximum(since_s[:, None] - 40.0 * further[None, :], 0.0)
    peak = PEAK_RISE_K * np.exp(-0.4 * further)
    return np.asarray(np.minimum(rate_k_per_s * since, peak[None, :]), dtype=np.float64)

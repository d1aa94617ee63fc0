"""What one vehicle's pipeline hands to its successor of another width or period.

Promises: standing alerts of the guards and of the model, cooldowns, the model's trend where it fits, counters and the
newest time go on; only the window, which is on another grid, begins anew. Widths only ever appear (0 to n), they never
change.
"""

import msgspec
import numpy as np

from edge_agent.contract.signals import FloatArray
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.guards import GuardState
from edge_agent.pipeline.ingest import IngestState
from edge_agent.pipeline.snapshot import decode, encode


def carry_over(before: Pipeline, after: Pipeline) -> bool:
    """Let `after`, which has taken nothing yet, go on from `before`; False when it does not take the state."""
    old, new = decode(before.snapshot()), decode(after.snapshot())
    if old is None or new is None:
        return False
    late = IngestState(newest_s=old.ingest.newest_s, late_run=0, pending=None, counters=old.ingest.counters)
    guards = None if old.guards is None else _wider(old.guards, after.cells, after.probes)
    return after.restore(
        encode(msgspec.structs.replace(old, widths=new.widths, window=new.window, ingest=late, guards=guards))
    )


def _wider(state: GuardState, cells: int, probes: int) -> GuardState:
    """Add cells and probes that nothing is known of; the BMS's own maximum stays the last temperature."""
    more_probes = probes + 1 - state.newest.shape[0]
    more_cells = cells - state.cell.shape[0]

    def add(array: FloatArray, more: int, unknown: float) -> FloatArray:
        return np.concatenate((np.full((*array.shape[:-1], more), unknown), array), axis=-1)

    seconds = [
        msgspec.structs.replace(
            s, value=add(s.value, more_probes, np.nan), time_s=add(s.time_s, more_probes, np.nan)
        )
        for s in state.seconds
    ]  # fmt: skip
    return msgspec.structs.replace(
        state,
        seconds=seconds,
        base_value=add(state.base_value, more_probes, np.nan),
        base_time_s=add(state.base_time_s, more_probes, -np.inf),
        newest=add(state.newest, more_probes, np.nan),
        rise_since_s=add(state.rise_since_s, more_probes, np.inf),
        rise_from=add(state.rise_from, more_probes, np.nan),
        rise_need=add(state.rise_need, more_probes, np.nan),
        hot_since_s=add(state.hot_since_s, more_probes, np.inf),
        cell=add(state.cell, more_cells, np.nan),
        cell_s=add(state.cell_s, more_cells, -np.inf),
        low_since_s=add(state.low_since_s, more_cells, np.inf),
    )

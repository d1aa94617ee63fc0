"""What the agent says of itself: the retained status, and the state it goes on from after a restart.

Pure but for `save_state` and `load_state`. The status speaks plainly of every problem; its last will, published by the
broker when the vehicle vanishes, is only `offline`.
"""

import os
import zlib
from pathlib import Path

import msgspec

from edge_agent.contract import messages
from edge_agent.contract.bundle import Manifest
from edge_agent.contract.messages import Current, Status, finite
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.outcomes import Counted, Scores

STATE_FILE = "pipeline.state"


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline at one moment of one timeline; `wall_offset_s` turned that timeline's times into wall time."""

    timeline: str
    saved_s: float
    wall_offset_s: float
    floor_s: float
    active: dict[str, Current]  # "type|origin" → what is retained of it
    pipeline: bytes
    counted: tuple[Counted, ...] = ()  # drift counts that the outbox's disk refused
    stopped: bool = False  # saved by an agent that ended in order: nothing came after it


def save_state(folder: Path, state: SavedState) -> None:
    """Replace the saved state in one step; a crash leaves the old one. Raises `OSError`."""
    body = msgspec.msgpack.encode(state)
    temporary = folder / (STATE_FILE + ".new")
    with temporary.open("wb") as file:
        file.write(zlib.crc32(body).to_bytes(4, "big") + body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / STATE_FILE)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(folder: Path) -> SavedState | None:
    """Read the saved state; None where there is none, or none that is whole."""
    try:
        data = (folder / STATE_FILE).read_bytes()
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "big"):
            return None
        return msgspec.msgpack.decode(data[4:], type=SavedState)
    except (OSError, msgspec.DecodeError):
        return None


def shift_s(state: SavedState, *, timeline: str, now_s: float, wall_offset_s: float) -> float:
    """Say what to add to the saved times to have them on this timeline; never into the future, whatever the clock says.

    A wall clock that was set back between the two (or starts in 1970) would place the saved state ahead of now.
    """
    if state.timeline == timeline and state.saved_s <= now_s:
        return 0.0
    return min(state.wall_offset_s - wall_offset_s, now_s - state.saved_s)


def offline(boot_id: str) -> bytes:
    """Return the last will."""
    return messages.encode(Status(state="offline", boot_id=boot_id))


def online(
    *,
    boot_id: str,
    time: str,
    clock_trusted: bool,
    agent_version: str,
    make: str,
    source: str,
    bundle: LoadedBundle | None,
    problems: tuple[str, ...],
    last_arrival: str | None,
    counters: dict[str, int],
    outbox: dict[str, int],
    scores: Scores | None,
    state_of_charge_percent: float | None,
    state: str = "online",
) -> bytes:
    """Return the status of a running agent (or, with `state` "offline", the last words of one that stops in order)."""
    manifest = None if bundle is None else bundle.manifest
    return messages.encode(
        Status(
            state="offline" if state == "offline" else "online",
            boot_id=boot_id,
            time=time,
            clock_trusted=clock_trusted,
            agent_version=agent_version,
            make=make,
            source=source,
            model_release=None if manifest is None else manifest.release,
            model_name="" if manifest is None else manifest.name,
            model_sha256="" if bundle is None else bundle.sha256,
            heads=() if manifest is None else manifest.heads,
            problems=problems,
            last_arrival=last_arrival,
            counters=counters,
            outbox=outbox,
            scores=score_table(scores, manifest),
            state_of_charge_percent=finite(state_of_charge_percent),
        )
    )


def score_table(scores: Scores | None, manifest: Manifest | None) -> dict[str, float | None]:
    """Return the newest window's scores by name: failure, each type, anomaly, worst cell and its deviation."""
    if scores is None or manifest is None:
        return {}
    table: dict[str, float | None] = {}
    if scores.failure_probability is not None:
        table["failure_probability"] = finite(scores.failure_probability)
    if scores.type_probability is not None:
        for name, probability in zip(manifest.failure_types, scores.type_probability, strict=False):
            table[name] = finite(probability)
    if scores.anomaly_score is not None:
        table["anomaly_score"] = finite(scores.anomaly_score)
    if scores.worst_cell is not None and scores.worst_cell >= 0:
        table["worst_cell"] = float(scores.worst_cell)
        table["worst_cell_deviation_v"] = finite(scores.worst_cell_deviation_v)
    return table

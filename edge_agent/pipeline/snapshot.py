"""What a pipeline keeps, as bytes: MessagePack with arrays as (dtype, shape, bytes), compressed, with a checksum.

Promises: `decode(encode(state))` is equal to `state`, bit for bit; anything else than such bytes of this version
decodes to None, never to a half state and never to an error. Where the bytes are kept is the owner's business.
"""

import zlib
from typing import Any

import msgspec
import numpy as np

from edge_agent.pipeline.decision import TypeState
from edge_agent.pipeline.drift import DriftState
from edge_agent.pipeline.guards import GuardState
from edge_agent.pipeline.inference import State
from edge_agent.pipeline.ingest import IngestState
from edge_agent.pipeline.sampling import SamplerState
from edge_agent.pipeline.window import WindowState

VERSION = 1
_MAGIC = b"VWPS" + bytes([VERSION])
_DTYPES = ("<f4", "<f8", "<i8", "|b1")
_MAX_BYTES = 64 * 2**20  # decompressed: a thousand cells for a window of an hour stay below


class PipelineState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `chain.Pipeline` remembers. `model` belongs to `state_id`."""

    widths: tuple[int, int, int]
    schema_name: str
    state_id: str
    ingest: IngestState
    window: WindowState
    guards: GuardState | None
    model: State
    decisions: dict[str, TypeState]
    counts: dict[str, int]
    last_arrival_s: float | None
    drift: DriftState | None = None  # None: kept by an agent without a bundle, or by one that did not count
    sampler: SamplerState | None = None


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode(state: PipelineState) -> bytes:
    """Return `state` as bytes."""
    body = zlib.compress(msgspec.msgpack.encode(state, enc_hook=_to_wire), 1)
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def decode(data: bytes) -> PipelineState | None:
    """Return the state, or None for bytes that are damaged or of another version."""
    head, body = data[: len(_MAGIC) + 4], data[len(_MAGIC) + 4 :]
    if head != _MAGIC + zlib.crc32(body).to_bytes(4, "little"):
        return None
    try:
        inflate = zlib.decompressobj()
        plain = inflate.decompress(body, _MAX_BYTES)
        if inflate.unconsumed_tail:
            return None
        return msgspec.msgpack.decode(plain, type=PipelineState, dec_hook=_from_wire)
    except (zlib.error, msgspec.DecodeError, ValueError, RecursionError):
        return None


def with_model(data: bytes, model: bytes) -> bytes:
    """Return the snapshot `data` with the model's own state (and its state_id) as in the snapshot `model`.

    So a vehicle's window, decisions and standing alerts go on under a release that has observed on its own. Where one
    of the two is damaged, `data` comes back as it is.
    """
    state, other = decode(data), decode(model)
    if state is None or other is None or state.widths != other.widths:
        return data
    return encode(msgspec.structs.replace(state, state_id=other.state_id, model=other.model))


def state_id_of(data: bytes) -> str | None:
    """Return which trend a snapshot carries; None for damaged bytes."""
    state = decode(data)
    return None if state is None else state.state_id


def _to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        plain = np.ascontiguousarray(value)
        return _Array(plain.dtype.str, plain.shape, plain.tobytes())
    raise NotImplementedError(f"{type(value)} has no place in a snapshot")


def _from_wire(kind: Any, value: Any) -> Any:
    if getattr(kind, "__origin__", kind) is np.ndarray:
        array = msgspec.convert(value, _Array)
        if array.dtype not in _DTYPES:
            raise ValueError(f"array of {array.dtype!r}")
        return np.frombuffer(array.data, array.dtype).reshape(array.shape).copy()
    raise NotImplementedError(f"{kind} has no place in a snapshot")

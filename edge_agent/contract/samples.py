"""A raw window on its way to training: packed by the vehicle, unpacked by the cloud, here and nowhere else.

A window is kept as int16 with a scale and an offset a column, delta-coded and compressed: what is lost is at most one
65,000th of the column's range in this window (26 µV of a cell that moved by 1.7 V). NaN stays NaN. The model's state
tensors from before the window travel as they are, so that the cloud can compute the vehicle's very features again.
"""

import math
import zlib
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.errors import MessageError

Float32Array = npt.NDArray[np.float32]

FORMAT = 1
MAX_UNPACKED_BYTES = 8 * 2**20  # ten minutes of 200 cells at 10 Hz are a fifth of it; more is an attack
MAX_PARTS = 64
MAX_STATE_DIMENSIONS = 8
MAX_DIMENSION = 100_000  # rows, columns, or one dimension of a state tensor: no window has as many
_LARGEST = 32_767
_MISSING = -32_768


@dataclass(frozen=True, slots=True)
class SampleWindow:
    """One window as it went into the graph.

    signals            names of the columns of `values`
    values             [N, S] float32, NaN = missing
    cell_voltage       [R, C] float32
    cell_temperature   [R, P] float32
    state              the model's state tensors before this window, by name; empty where there were none
    """

    signals: tuple[str, ...]
    values: Float32Array
    cell_voltage: Float32Array
    cell_temperature: Float32Array
    state: dict[str, Float32Array] = field(default_factory=dict)


class _Columns(msgspec.Struct, frozen=True, array_like=True):
    """[N, K] as int16: value = offset + scale * code; column after column, each as differences."""

    rows: int
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    codes: bytes


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    shape: tuple[int, ...]
    data: bytes  # float32, little endian


class _Packed(msgspec.Struct, frozen=True):
    format: int
    signals: tuple[str, ...]
    values: _Columns
    cell_voltage: _Columns
    cell_temperature: _Columns
    state: dict[str, _Tensor]


def pack(window: SampleWindow) -> bytes:
    """Pack one window. Raises `ValueError` when its columns are not as many as its names: that is our own fault."""
    if window.values.ndim != 2 or window.values.shape[1] != len(window.signals):
        raise ValueError(f"values of shape {window.values.shape} for {len(window.signals)} signals")
    packed = _Packed(
        FORMAT, window.signals, _encode(window.values), _encode(window.cell_voltage), _encode(window.cell_temperature),
        {name: _Tensor(tensor.shape, tensor.astype("<f4").tobytes()) for name, tensor in window.state.items()},
    )  # fmt: skip
    return zlib.compress(msgspec.msgpack.encode(packed), 9)


def unpack(data: bytes) -> SampleWindow:
    """Unpack what `pack` made. Raises `MessageError` for bytes that are cut, too many or no packed window."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise MessageError(f"a sample that cannot be decompressed: {error}") from error
    if inflate.unconsumed_tail:
        raise MessageError(f"a sample of more than {MAX_UNPACKED_BYTES} bytes")
    if not inflate.eof:
        raise MessageError(f"a sample that ends in the middle, after {len(data)} bytes")
    try:
        packed = msgspec.msgpack.decode(plain, type=_Packed)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(f"not a packed sample: {str(error)[:200]}") from error
    if packed.format != FORMAT:
        raise MessageError(f"a sample of format {packed.format}; this release reads {FORMAT}")
    values = _decode(packed.values)
    if values.shape[1] != len(packed.signals):
        raise MessageError(f"a sample of {values.shape[1]} columns for {len(packed.signals)} signals")
    return SampleWindow(
        packed.signals, values, _decode(packed.cell_voltage), _decode(packed.cell_temperature),
        {name: _tensor(tensor) for name, tensor in packed.state.items()},
    )  # fmt: skip


def _encode(values: Float32Array) -> _Columns:
    table = values.astype(np.float64)
    known = np.isfinite(table)
    low = np.where(known, table, np.inf).min(axis=0, initial=np.inf)
    high = np.where(known, table, -np.inf).max(axis=0, initial=-np.inf)
    empty = low > high
    low, high = np.where(empty, 0.0, low), np.where(empty, 0.0, high)
    scale = (high - low) / (2 * _LARGEST)
    step = np.where(scale > 0, scale, 1.0)
    codes = np.full(table.shape, _MISSING, np.int16)
    rounded = np.rint((table - low) / step - _LARGEST)
    codes[known] = rounded[known].astype(np.int16)
    moved = np.diff(codes, axis=0, prepend=np.zeros((1, table.shape[1]), np.int16))  # wraps around, and so does the sum
    offset = low + _LARGEST * scale
    return _Columns(len(table), tuple(scale.tolist()), tuple(offset.tolist()), moved.T.astype("<i2").tobytes())


def _decode(columns: _Columns) -> Float32Array:
    width = len(columns.scale)
    bounded = 0 <= columns.rows <= MAX_DIMENSION and width <= MAX_DIMENSION
    if not bounded or len(columns.offset) != width or len(columns.codes) != 2 * columns.rows * width:
        raise MessageError("a sample whose columns do not have the length they state")
    moved = np.frombuffer(columns.codes, "<i2").reshape(width, columns.rows).T
    codes = np.cumsum(moved, axis=0, dtype=np.int16)
    with np.errstate(over="ignore", invalid="ignore"):
        values: npt.NDArray[np.float64] = np.asarray(columns.offset) + np.asarray(columns.scale) * codes
    missing = codes == _MISSING
    if not (np.abs(values[~missing]) <= np.finfo(np.float32).max).all():
        raise MessageError("a sample with a value that is no finite number")
    values[missing] = np.nan
    return values.astype(np.float32)


def _tensor(tensor: _Tensor) -> Float32Array:
    bounded = len(tensor.shape) <= MAX_STATE_DIMENSIONS and all(0 < n <= MAX_DIMENSION for n in tensor.shape)
    if not bounded or len(tensor.data) != 4 * math.prod(tensor.shape):
        raise MessageError("a sample with a state tensor that does not have the length it states")
    values: Float32Array = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise MessageError("a sample with a state tensor that is not finite")
    return values

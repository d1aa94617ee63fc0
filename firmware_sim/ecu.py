"""The vehicle's control units on the bus: frames of signals become CAN frames after `ev.dbc`, with counter and CRC.

Encoding is cantools' with the DBC; this file decides which frame leaves when. Every message has a 4 bit counter and a
CRC-8 SAE J1850 over the low byte of its id followed by its bytes 1 to 7 (the id keeps one message from passing as
another). "No value" is all ones, or the most negative number of a signed signal.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cantools
import numpy as np

from edge_agent.contract import mapping
from firmware_sim.sensors import CATALOGUE, VECTOR_EVERY_S, Float32Array

_HERE = Path(__file__).parent
POLYNOMIAL, INITIAL, FINAL_XOR = 0x1D, 0xFF, 0xFF


@dataclass(frozen=True, slots=True)
class CanFrame:
    """One standard data frame."""

    frame_id: int
    data: bytes


def _crc_table() -> bytes:
    table = bytearray()
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = ((crc << 1) ^ POLYNOMIAL) & 0xFF if crc & 0x80 else crc << 1
        table.append(crc)
    return bytes(table)


_CRC_TABLE = _crc_table()


def crc8(frame_id: int, rest: bytes) -> int:
    """CRC-8 SAE J1850 over the id's low byte and the bytes after the CRC's own."""
    crc = _CRC_TABLE[INITIAL ^ (frame_id & 0xFF)]
    for byte in rest:
        crc = _CRC_TABLE[crc ^ byte]
    return crc ^ FINAL_XOR


@cache
def database() -> Any:
    """Return the cantools database of `ev.dbc`, which comes with this package."""
    text = _HERE.joinpath("ev.dbc").read_text()
    return cantools.database.load_string(text, "dbc")


@cache
def bus_mapping() -> mapping.Mapping:
    """Return `ev_can.toml`: which bus signal carries which signal of the catalogue."""
    text = _HERE.joinpath("ev_can.toml").read_bytes()
    return mapping.parse_mapping(text, "ev_can.toml")


class _Message:
    """One message of the DBC with the columns of frames that fill it."""

    def __init__(self, message: Any, columns: dict[str, int]) -> None:
        self.message = message
        self.frame_id: int = message.frame_id
        self.name: str = message.name
        signals = [s for s in message.signals if s.name in columns]
        self.names = [s.name for s in signals]
        self.columns = [columns[s.name] for s in signals]
        self.scale = np.array([float(s.scale) for s in signals])
        self.offset = np.array([float(s.offset) for s in signals])
        self.absent = np.array([no_value_code(s) for s in signals])
        self.counter = 0

    def raw(self, values: Float32Array) -> list[list[int]]:
        """Raw numbers of rows of values [n, len(names)]."""
        whole = np.rint((values.astype(np.float64) - self.offset) / self.scale)
        return np.where(np.isnan(values), self.absent, whole).astype(np.int64).tolist()  # type: ignore[no-any-return]

    def frame(self, signals: dict[str, int]) -> CanFrame:
        signals[f"{self.name}_Counter"] = self.counter
        signals[f"{self.name}_CRC"] = 0
        self.counter = (self.counter + 1) & 0xF
        rest = bytes(self.message.encode(signals, scaling=False, padding=False, strict=False)[1:])
        return CanFrame(self.frame_id, bytes([crc8(self.frame_id, rest)]) + rest)


def no_value_code(signal: Any) -> int:
    """Raw number that stands for "no value" in a DBC signal."""
    return int(-(1 << (signal.length - 1)) if signal.is_signed else (1 << signal.length) - 1)


class Ecu:
    """Turns reported seconds into the CAN frames of each second; keeps the counters.

    `load` takes ten seconds of frames or fewer; `second` gives the CAN frames of one of them. Cells and probes are
    spread over the ten seconds by their multiplexer.
    """

    def __init__(self, cells: int, probes: int) -> None:
        self._cells, self._probes = cells, probes
        by_column = {rule.column: name for name, rule in bus_mapping().signals.items() if rule.column}
        self._scalars = []
        for message in database().messages:
            columns = {
                s.name: CATALOGUE.scalar_index[by_column[f"{message.name}.{s.name}"]]
                for s in message.signals
                if f"{message.name}.{s.name}" in by_column
            }
            if columns:
                self._scalars.append(_Message(message, columns))
        self._vectors = (
            _Vector(database().get_message_by_name("BMS_Cells"), cells),
            _Vector(database().get_message_by_name("BMS_Probes"), probes),
        )
        self._raw: list[list[list[int]]] = []

    def load(self, scalars: Float32Array, cell_voltage: Float32Array, cell_temperature: Float32Array) -> None:
        """Take the next seconds: scalars [n ≤ 10, S], one row of cells [C] and one of probes [P]."""
        self._raw = [m.raw(scalars[:, m.columns]) for m in self._scalars]
        for vector, values in zip(self._vectors, (cell_voltage, cell_temperature), strict=True):
            vector.load(values)

    def second(self, row: int) -> Iterator[CanFrame]:
        """Yield the CAN frames of one loaded second, in the order in which they leave."""
        if not all(raw[row] == list(m.absent) for m, raw in zip(self._scalars, self._raw, strict=True)):
            for message, raw in zip(self._scalars, self._raw, strict=True):
                yield message.frame(dict(zip(message.names, raw[row], strict=True)))
        for vector in self._vectors:
            yield from vector.due(row)


class _Vector:
    """A multiplexed message: `per_frame` values in each group, all groups within ten seconds."""

    def __init__(self, message: Any, width: int) -> None:
        names = sorted(s.name for s in message.signals if s.multiplexer_ids)
        self.message = _Message(message, {name: i for i, name in enumerate(names)})
        self.mux = f"{message.name}_Mux"
        self.per_frame = sum(1 for s in message.signals if s.multiplexer_ids == [0])
        self.width = width
        self.total = len(names)
        self._groups: deque[dict[str, int]] = deque()
        self._count = 0

    def load(self, values: Float32Array) -> None:
        """Queue one row of values; what was not sent of the row before is dropped."""
        padded = np.full(self.total, np.nan, np.float32)
        padded[: self.width] = values
        order = np.array(self.message.columns)
        raw = self.message.raw(padded[None, order])[0]
        by_index = dict(zip(order.tolist(), zip(self.message.names, raw, strict=True), strict=True))
        groups = -(-self.width // self.per_frame)
        self._groups = deque()
        if not np.isnan(values).all():
            for group in range(groups):
                first = group * self.per_frame
                self._groups.append(
                    {self.mux: group, **dict(by_index[i] for i in range(first, first + self.per_frame))}
                )
        self._count = len(self._groups)

    def due(self, row: int) -> Iterator[CanFrame]:
        """Yield the groups whose turn has come by second `row` of ten."""
        left_after = self._count - -(-self._count * (row + 1) // VECTOR_EVERY_S)
        while len(self._groups) > left_after:
            yield self.message.frame(self._groups.popleft())

"""CAN frames become arrivals: any interface of python-can, decoded by a DBC, checked before it is believed.

Promises: a frame of the wrong length, with a bad checksum, a repeated counter, of an unknown identifier, or an error or
remote frame never becomes a value, and is counted; memory is bounded whatever the bus does; a bus that goes away is
opened again. A signal is named `Message.Signal` for the mapping. Rows are stamped with the host's clock at receipt.

Checks are found by name in the DBC: `<Message>_Counter` counts up by one, `<Message>_CRC` is a whole byte, CRC-8 SAE
J1850 over the low byte of the frame id and then all other bytes.
"""

import fcntl
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import can
import cantools
import numpy as np
from cantools.database.can import Database, Message

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError, FrameError, SourceError
from edge_agent.contract.mapping import BoundMapping, Column, Masked
from edge_agent.logs import event

QUEUE_FRAMES = 20_000  # two seconds of a full 1 Mbit/s bus: more than the pipeline may ever lag
REOPEN_FIRST_S, REOPEN_MAX_S = 0.5, 10.0
RECEIVE_TIMEOUT_S = 0.2

log = logging.getLogger("voltwatch.can")


@dataclass(frozen=True, slots=True)
class CanFrame:
    """What the bus carried, and when it was received, in seconds of the agent's timeline."""

    time_s: float
    frame_id: int
    data: bytes
    is_extended: bool = False
    is_error: bool = False
    is_remote: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    message: Message
    length: int
    counter: str
    counter_modulus: int
    crc_byte: int  # -1 = none
    wanted: tuple[tuple[str, str], ...]  # signal name, column name


class Decoder:
    """Decodes the frames whose messages a mapping needs; keeps the rolling counters.

    counters: frames_decoded, frames_unmapped, frames_missed (gaps of a rolling counter), and one a reason of
    `FrameError`: error_frame, remote_frame, unknown_id, wrong_length, bad_checksum, counter_stuck, undecodable.
    """

    def __init__(self, database: Database, columns: Sequence[str]) -> None:
        wanted = set(columns)
        self._entries: dict[tuple[int, bool], _Entry | None] = {}
        self._last_counter: dict[tuple[int, bool], int] = {}
        self.counters: Counter[str] = Counter()
        for message in database.messages:
            key = (message.frame_id, message.is_extended_frame)
            self._entries[key] = _entry(message, wanted)

    def decode(self, frame: CanFrame) -> dict[str, float]:
        """Return the frame's mapped values by `Message.Signal`; empty for a message nobody asked for.

        Raises `FrameError`, and nothing else, for a frame that must not be believed.
        """
        if frame.is_error:
            raise self._refuse("error_frame", frame, "the bus reports an error")
        if frame.is_remote:
            raise self._refuse("remote_frame", frame, "a request carries no value")
        key = (frame.frame_id, frame.is_extended)
        if key not in self._entries:
            raise self._refuse("unknown_id", frame, "no message of the DBC has it")
        entry = self._entries[key]
        if entry is None:
            self.counters["frames_unmapped"] += 1
            return {}
        if len(frame.data) != entry.length:
            raise self._refuse("wrong_length", frame, f"{len(frame.data)} bytes, the DBC says {entry.length}")
        if entry.crc_byte >= 0 and checksum(frame.frame_id, frame.data, entry.crc_byte) != frame.data[entry.crc_byte]:
            raise self._refuse("bad_checksum", frame, "its checksum does not match")
        try:
            values = cast("dict[str, Any]", entry.message.decode(frame.data, decode_choices=False))
        except (ValueError, KeyError, IndexError, cantools.database.errors.DecodeError) as error:
            raise self._refuse("undecodable", frame, str(error)) from error
        self._check_counter(key, entry, values, frame)
        self.counters["frames_decoded"] += 1
        return {column: float(values[name]) for name, column in entry.wanted if name in values}

    def _check_counter(self, key: tuple[int, bool], entry: _Entry, values: Mapping[str, Any], frame: CanFrame) -> None:
        if entry.counter not in values:  # none, or in another branch of a multiplexed message
            return
        count = int(values[entry.counter])
        last = self._last_counter.get(key)
        if last is not None:
            step = (count - last) % entry.counter_modulus
            if step == 0:  # sent twice, or its sender hangs: then its signals go stale by themselves
                raise self._refuse("counter_stuck", frame, f"its counter stays at {count}")
            self.counters["frames_missed"] += step - 1
        self._last_counter[key] = count

    def _refuse(self, reason: str, frame: CanFrame, why: str) -> FrameError:
        self.counters[reason] += 1
        return FrameError(f"CAN frame {frame.frame_id:#x}: {why}")

    @property
    def refused(self) -> int:
        """How many frames were refused, whatever the reason."""
        return sum(n for name, n in self.counters.items() if not name.startswith("frames_"))


class CanSource:
    """Reads a bus in a thread of its own and hands out blocks of arrivals.

    `open_bus` opens it (again); `now` gives seconds of the agent's timeline. A bus that cannot be opened is tried again
    with growing pauses, whatever its driver raised; `problem` says so in plain words, and is empty while it is open.
    """

    def __init__(
        self,
        open_bus: Callable[[], AbstractContextManager[can.BusABC]],
        decoder: Decoder,
        mapping: BoundMapping,
        now: Callable[[], float],
    ) -> None:
        self._open_bus = open_bus
        self._decoder = decoder
        self._mapping = mapping
        self._now = now
        self._queue: deque[CanFrame] = deque(maxlen=QUEUE_FRAMES)
        self._arrived = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="can", daemon=True)
        self._received = 0
        self._taken = 0
        self._failures = 0
        self._problem = "CAN bus not open yet"
        self.masked = Masked()

    @property
    def problem(self) -> str:
        """Why no frames come, in plain words; empty while the bus is open and read."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return "CAN bus: its reader has ended; restart the agent"
        return self._problem

    @property
    def counters(self) -> dict[str, int]:
        """Counts of the decoder, of frames received, of those dropped as the pipeline lagged, of driver failures."""
        dropped = max(0, self._received - self._taken - len(self._queue))
        counts = {**self._decoder.counters, "frames_received": self._received, "frames_dropped": dropped}
        return {**counts, "reader_failures": self._failures} if self._failures else counts

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def stop(self) -> None:
        """Close the bus; returns within about a second."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def read(self, gather_s: float) -> ArrivalBlock | None:
        """Gather what arrives within `gather_s` of real time; a block of its arrivals, or None where nothing did."""
        if not self._queue and not self._arrived.wait(gather_s):
            return None
        self._stopping.wait(gather_s)
        self._arrived.clear()
        frames = [self._queue.popleft() for _ in range(len(self._queue))]
        self._taken += len(frames)
        return self.convert(frames)

    def convert(self, frames: Sequence[CanFrame]) -> ArrivalBlock | None:
        """Decode frames, one row each; None where none carries a mapped value."""
        rows: list[tuple[float, dict[str, float]]] = []
        for frame in frames:
            try:
                values = self._decoder.decode(frame)
            except FrameError:
                continue  # counted by reason; a line for each would let a bad bus fill the log
            if values:
                rows.append((frame.time_s, values))
        if not rows:
            return None
        columns: dict[str, Column] = {}
        for i, (_, values) in enumerate(rows):
            for name, value in values.items():
                column = columns.get(name)
                if column is None:
                    column = columns[name] = np.full(len(rows), np.nan)
                column[i] = value
        return self._mapping.convert(columns, np.array([time for time, _ in rows]), self.masked)

    def _receive(self) -> None:
        pause_s, traced = REOPEN_FIRST_S, ""
        while not self._stopping.is_set():
            try:
                with self._open_bus() as bus:
                    event(log, "bus", state="open")
                    self._problem, pause_s = "", REOPEN_FIRST_S
                    self._receive_from(bus)
            except (can.CanError, SourceError, OSError, ValueError, TypeError, EOFError) as error:
                # ValueError and TypeError: slcan on a line that was cut in half
                pause_s = self._closed(f"CAN bus: {error}", pause_s)
            except Exception as error:  # a driver's own: termios.error of a line that was cut is no OSError
                self._failures += 1
                problem = f"CAN bus: {type(error).__name__}: {error}"
                if problem != traced:  # once: a bus that opens and fails again would fill the log
                    log.exception("can reader failed")
                traced = problem
                pause_s = self._closed(problem, pause_s)

    def _closed(self, problem: str, pause_s: float) -> float:
        """Say so, once for each new reason, and pause; returns how long to pause next time."""
        if problem != self._problem:
            event(log, "bus", level=logging.WARNING, state="closed", reason=problem.removeprefix("CAN bus: "))
        self._problem = problem
        self._stopping.wait(pause_s)
        return min(2 * pause_s, REOPEN_MAX_S)

    def _receive_from(self, bus: can.BusABC) -> None:
        while not self._stopping.is_set():
            message = bus.recv(RECEIVE_TIMEOUT_S)
            if message is None:
                continue
            self._queue.append(
                CanFrame(
                    self._now(), message.arbitration_id, bytes(message.data), message.is_extended_id,
                    message.is_error_frame, message.is_remote_frame,
                )
            )  # fmt: skip
            self._received += 1
            self._arrived.set()


def load_database(path: Path) -> Database:
    """Read a DBC. Raises `ConfigError` for a file that is absent or cannot be read as one."""
    try:
        database = cantools.database.load_file(path)
    except FileNotFoundError as error:
        raise ConfigError(f"dbc {path}: no such file") from error
    except (OSError, ValueError, cantools.Error) as error:
        raise ConfigError(f"dbc {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(database, Database):
        raise ConfigError(f"dbc {path}: describes no CAN messages")
    return database


def signal_names(database: Database) -> tuple[str, ...]:
    """Every `Message.Signal` of the DBC: what a mapping may name."""
    return tuple(f"{message.name}.{signal.name}" for message in database.messages for signal in message.signals)


def bus_opener(
    interface: str, channel: str, bitrate: int | None, options: Mapping[str, Any]
) -> Callable[[], AbstractContextManager[can.BusABC]]:
    """Return what opens the bus. Raises `ConfigError` at once for an interface python-can does not know."""
    if interface not in can.VALID_INTERFACES:
        near = get_close_matches(interface, can.VALID_INTERFACES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(can.VALID_INTERFACES))}"
        raise ConfigError(f"source.interface: python-can has no interface {interface!r}; {hint}")
    arguments: dict[str, Any] = dict(options)
    if bitrate is not None:
        arguments["bitrate"] = bitrate
    if interface == "slcan":  # the defaults wait two seconds and then poll a thousand times a second
        arguments.setdefault("sleep_after_open", 0)
        arguments.setdefault("timeout", 0.05)

    @contextmanager
    def open_bus() -> Iterator[can.BusABC]:
        device = Path(channel.split("@", maxsplit=1)[0])
        with (
            _claimed(device) if interface == "slcan" else nullcontext(),
            can.Bus(interface=interface, channel=channel, **arguments) as bus,
        ):
            yield bus

    return open_bus


@contextmanager
def _claimed(device: Path) -> Iterator[None]:
    """Hold a serial line for this process alone: two readers would each get half of every line.

    Raises `SourceError` where it is absent or somebody else holds it.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceError(f"{device}: no such device") from error
    except OSError as error:
        raise SourceError(f"{device}: {(error.strerror or str(error)).lower()}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # pyserial's `exclusive`, before anything is sent
        except BlockingIOError as error:
            raise SourceError(f"{device}: another program reads it; end that one, or name another channel") from error
        yield
    finally:
        os.close(descriptor)


def checksum(frame_id: int, data: bytes, skip: int) -> int:
    """CRC-8 SAE J1850 (polynomial 0x1D, initial and final 0xFF) of the id's low byte and all bytes but `skip`."""
    crc = _CRC8[0xFF ^ (frame_id & 0xFF)]
    for i, byte in enumerate(data):
        if i != skip:
            crc = _CRC8[crc ^ byte]
    return crc ^ 0xFF


def _crc8_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc << 1) ^ (0x11D if crc & 0x80 else 0)
        table.append(crc & 0xFF)
    return tuple(table)


_CRC8 = _crc8_table()


def _entry(message: Message, wanted: set[str]) -> _Entry | None:
    """Prepare what decoding one message needs; None where no signal of it is wanted."""
    names = {signal.name: signal for signal in message.signals}
    mapped = tuple((name, f"{message.name}.{name}") for name in names if f"{message.name}.{name}" in wanted)
    if not mapped:
        return None
    counter, crc = names.get(f"{message.name}_Counter"), names.get(f"{message.name}_CRC")
    crc_byte = -1
    if crc is not None:
        # a DBC counts bits from a byte's lowest for little endian, and names the highest for big endian
        edge = 0 if crc.byte_order == "little_endian" else 7
        if crc.length != 8 or crc.start % 8 != edge:
            raise ConfigError(f"dbc: {message.name}_CRC must be one whole byte to be checked")
        crc_byte = crc.start // 8
    return _Entry(
        message, message.length, "" if counter is None else counter.name, 1 if counter is None else 2**counter.length,
        crc_byte, mapped,
    )  # fmt: skip

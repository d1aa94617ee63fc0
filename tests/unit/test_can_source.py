"""CAN frames: what is believed, what is refused, and that nothing else can happen."""

import struct
import termios
import threading
import time
from pathlib import Path
from typing import Self

import can
import cantools
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.errors import ConfigError, FrameError
from edge_agent.contract.mapping import BoundMapping, parse_mapping
from edge_agent.sources.can import (
    QUEUE_FRAMES,
    CanFrame,
    CanSource,
    Decoder,
    bus_opener,
    checksum,
    load_database,
    signal_names,
)
from tests.brokers import wait_for
from tests.vehicles import DBC, MAPPING, Ecu, SlcanPty, catalogue, crc8_j1850, database


def bound() -> BoundMapping:
    return BoundMapping(parse_mapping(MAPPING, "test"), catalogue(), signal_names(database()), "test")


def decoder() -> Decoder:
    return Decoder(database(), bound().columns)


def source(bus: "can.BusABC | None" = None) -> CanSource:
    def no_bus() -> can.BusABC:
        raise OSError("no such bus")

    return CanSource(no_bus if bus is None else lambda: bus, decoder(), bound(), time.monotonic)


def frame(what: tuple[int, bytes], **changes: object) -> CanFrame:
    return CanFrame(**{"time_s": 1.0, "frame_id": what[0], "data": what[1], **changes})  # type: ignore[arg-type]


def test_a_good_frame_becomes_its_mapped_values() -> None:
    assert decoder().decode(frame(Ecu().frame("Pack", Voltage=356.7, Temperature=-4.5))) == {
        "Pack.Voltage": pytest.approx(356.7),
        "Pack.Temperature": pytest.approx(-4.5),
    }


def test_the_checksum_is_sae_j1850s() -> None:
    assert crc8_j1850(b"123456789") == 0x4B  # the catalogue of CRCs' check value
    data = Ecu().frame("Pack", Voltage=1, Temperature=1)[1]
    assert checksum(256, data, 0) == data[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": bytes(7)}, "wrong_length"),
        ({"data": bytes(9)}, "wrong_length"),
        ({"data": b""}, "wrong_length"),
        ({"data": bytes(8)}, "bad_checksum"),
        ({"frame_id": 0x7FF}, "unknown_id"),
        ({"is_extended": True}, "unknown_id"),
        ({"is_error": True}, "error_frame"),
        ({"is_remote": True}, "remote_frame"),
    ],
)
def test_a_frame_that_must_not_be_believed_is_refused_and_counted(changes: dict[str, object], reason: str) -> None:
    tested = decoder()
    with pytest.raises(FrameError, match="CAN frame 0x"):
        tested.decode(frame(Ecu().frame("Pack", Voltage=1, Temperature=1), **changes))
    assert dict(tested.counters) == {reason: 1}
    assert tested.refused == 1


def test_a_stuck_counter_is_refused_so_that_its_signals_go_stale() -> None:
    tested, stuck = decoder(), Ecu().frame("Pack", Voltage=1, Temperature=1)
    tested.decode(frame(stuck))
    for _ in range(5):
        with pytest.raises(FrameError, match="counter stays"):
            tested.decode(frame(stuck))
    assert tested.counters["counter_stuck"] == 5


def test_missed_frames_are_counted_by_the_rolling_counter() -> None:
    tested, ecu = decoder(), Ecu()
    frames = [ecu.frame("Pack", Voltage=v, Temperature=20) for v in range(40)]
    for i in (0, 1, 4, 17, 39):
        tested.decode(frame(frames[i]))
    assert tested.counters["frames_missed"] == 2 + 12 + (22 - 1) % 16


@given(
    st.integers(0, 0x1FFFFFFF) | st.sampled_from([256, 257, 258]), st.binary(max_size=64), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_bytes_decode_to_numbers_or_a_frame_error(
    frame_id: int, data: bytes, extended: bool, error: bool, remote: bool
) -> None:
    tested = decoder()
    try:
        values = tested.decode(CanFrame(0.0, frame_id, data, extended, error, remote))
    except FrameError:
        assert tested.refused == 1
    else:
        assert all(isinstance(v, float) for v in values.values())


def test_multiplexed_cells_land_in_their_columns() -> None:
    tested = source()
    frames = [CanFrame(float(i), *f) for i, f in enumerate(Ecu().second(400.0, 21.0))]
    block = tested.convert(frames)
    assert block is not None
    assert block.time_s.tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_allclose(block.scalars[0], [400.0, 21.0])
    np.testing.assert_allclose(block.cell_voltage[1:], [[3.7, np.nan], [np.nan, 3.6]])
    assert np.isnan(block.scalars[1:]).all()


def test_frames_of_a_message_nobody_mapped_cost_a_count_and_make_no_row() -> None:
    tested = source()
    assert tested.convert([CanFrame(0.0, 258, b"\x01\x02")]) is None
    assert tested.counters["frames_unmapped"] == 1


def test_a_bus_of_python_can_is_read() -> None:
    receiving = can.Bus(interface="virtual", channel="voltwatch-unit")
    tested, ecu = source(receiving), Ecu()
    tested.start()
    with can.Bus(interface="virtual", channel="voltwatch-unit") as sending:
        for frame_id, data in ecu.second(380.0, 25.0):
            sending.send(can.Message(arbitration_id=frame_id, data=data, is_extended_id=False))
        wait_for(lambda: tested.counters["frames_received"] == 3)
    block = tested.read(0.01)
    assert block is not None
    assert block.scalars[0, 0] == pytest.approx(380.0)
    tested.stop()


def test_an_slcan_adapter_is_read_and_found_again_after_it_was_unplugged(tmp_path: Path) -> None:
    path = tmp_path / "tty"
    tested = CanSource(bus_opener("slcan", str(path), None, {}), decoder(), bound(), time.monotonic)
    tested.start()
    wait_for(lambda: "no such device" in tested.problem)
    ecu = Ecu()
    for voltage in (380.0, 390.0):
        adapter = SlcanPty(path)
        wait_for(lambda: tested.problem == "", what="open")
        adapter.send(ecu.second(voltage, 25.0))
        blocks = []
        wait_for(lambda blocks=blocks: blocks.append(tested.read(0.05)) or any(blocks))
        block = next(b for b in blocks if b is not None)
        assert block.scalars[0, 0] == pytest.approx(voltage)
        adapter.close()
        wait_for(lambda: tested.problem != "", what="closed")
    tested.stop()


def test_a_serial_line_that_another_agent_reads_is_left_to_it(tmp_path: Path) -> None:
    adapter = SlcanPty(tmp_path / "tty")
    first, second = (
        CanSource(bus_opener("slcan", str(adapter.path), None, {}), decoder(), bound(), time.monotonic) for _ in "12"
    )
    first.start()
    wait_for(lambda: adapter.opened >= 1, what="the first has opened it")
    second.start()
    wait_for(lambda: "another program reads it" in second.problem, what="the second is refused")
    ecu = Ecu()
    for voltage in (380.0, 381.0, 382.0):
        adapter.send(ecu.second(voltage, 25.0))
    rows: list[float] = []

    def heard() -> bool:
        block = first.read(0.05)
        rows.extend([] if block is None else block.scalars[:, 0][np.isfinite(block.scalars[:, 0])])
        return len(rows) == 3

    wait_for(heard, what="every frame came whole")
    assert adapter.opened == 1, "the second sent the adapter nothing"
    first.stop()
    wait_for(lambda: adapter.opened == 2, what="the second takes over")
    second.stop()
    adapter.close()


class FailingBus:
    """A bus whose driver raises what no list of errors foresees, and that is well from the third opening on."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.openings = error, 0

    def __enter__(self) -> Self:
        self.openings += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def recv(self, timeout_s: float) -> can.Message | None:
        if self.openings < 3:
            raise self.error
        time.sleep(timeout_s / 10)
        frame_id, data = Ecu().second(380.0, 25.0)[0]
        return can.Message(arbitration_id=frame_id, data=data, is_extended_id=False)


@pytest.mark.parametrize("error", [termios.error(5, "Input/output error"), struct.error("short"), KeyError("x")])
def test_whatever_a_driver_raises_is_counted_and_the_bus_is_opened_again(error: Exception) -> None:
    bus = FailingBus(error)
    tested = source(bus)  # type: ignore[arg-type]
    tested.start()
    wait_for(lambda: type(error).__name__ in tested.problem, what="the problem is told")
    wait_for(lambda: tested.counters["frames_received"] > 0, what="it is read again")
    assert tested.problem == ""
    assert tested.counters["reader_failures"] == 2
    tested.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_has_ended_is_a_problem() -> None:
    tested = source(FailingBus(SystemExit("a driver may do even this")))  # type: ignore[arg-type]
    tested.start()
    wait_for(lambda: not tested._thread.is_alive(), what="the end of the reader")
    assert "its reader has ended" in tested.problem
    tested.stop()


def test_a_counter_in_another_branch_of_a_multiplexed_message_is_no_counter() -> None:
    dbc = """VERSION ""
BU_: A
BO_ 100 M: 8 A
 SG_ Mux M : 0|8@1+ (1,0) [0|255] "" A
 SG_ M_Counter m0 : 8|4@1+ (1,0) [0|15] "" A
 SG_ V m0 : 16|8@1+ (1,0) [0|255] "" A
 SG_ W m1 : 16|8@1+ (1,0) [0|255] "" A
"""
    tested = Decoder(cantools.database.load_string(dbc), ["M.V", "M.W"])
    for _ in range(3):
        assert tested.decode(CanFrame(0.0, 100, bytes([1, 0, 5, 0, 0, 0, 0, 0]))) == {"M.W": 5.0}
    assert tested.decode(CanFrame(0.0, 100, bytes([0, 1, 7, 0, 0, 0, 0, 0]))) == {"M.V": 7.0}
    with pytest.raises(FrameError, match="counter stays"):
        tested.decode(CanFrame(0.0, 100, bytes([0, 1, 7, 0, 0, 0, 0, 0])))


def test_a_flood_is_bounded_in_memory_and_counted() -> None:
    tested, ecu = source(), Ecu()
    frames = ecu.second(380.0, 25.0)
    for _ in range(QUEUE_FRAMES):
        tested._queue.append(CanFrame(0.0, *frames[0]))
        tested._received += 1
    tested._queue.extend(CanFrame(0.0, *f) for f in frames * 100)
    tested._received += 300
    assert len(tested._queue) == QUEUE_FRAMES
    assert tested.counters["frames_dropped"] == 300


def test_a_silent_bus_is_no_block_and_no_busy_loop() -> None:
    tested = source()
    began, cpu = time.monotonic(), time.thread_time()
    assert tested.read(0.2) is None
    assert time.monotonic() - began >= 0.2
    assert time.thread_time() - cpu < 0.05


def test_stopping_is_quick_while_the_bus_is_silent() -> None:
    tested = source(can.Bus(interface="virtual", channel="voltwatch-silent"))
    tested.start()
    began = time.monotonic()
    tested.stop()
    assert time.monotonic() - began < 1.0
    assert not any(t.name == "can" and t.is_alive() for t in threading.enumerate())


def test_an_unknown_interface_is_refused_at_once_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'slcan'"):
        bus_opener("slcn", "x", None, {})


def test_a_missing_or_malformed_dbc_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_database(tmp_path / "none.dbc")
    (tmp_path / "bad.dbc").write_text("BO_ this is no dbc")
    with pytest.raises(ConfigError, match=r"bad\.dbc") as error:
        load_database(tmp_path / "bad.dbc")
    assert "\n" not in str(error.value)


def test_a_dbc_whose_checksum_is_no_whole_byte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.dbc").write_text(DBC.replace("Pack_CRC : 0|8@1+", "Pack_CRC : 1|7@1+"))
    with pytest.raises(ConfigError, match="whole byte"):
        Decoder(load_database(tmp_path / "odd.dbc"), bound().columns)

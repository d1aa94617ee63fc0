"""The simulated vehicle on the bus: its DBC, its frames, and the adapter on a pty."""

import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import can
import numpy as np
import pytest

from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.mapping import BoundMapping, Masked
from firmware_sim import ecu, sensors
from firmware_sim.bus import open_bus
from firmware_sim.ecu import CanFrame, Ecu, bus_mapping, crc8, database
from firmware_sim.ride import Block, RideSpec, blocks
from firmware_sim.sensors import CATALOGUE
from firmware_sim.slcan import MAX_BACKLOG_BYTES, SlcanPty, line

SPEC = RideSpec(vehicle_id="EV_001", seed=1, start_s=1_767_600_000.0)


def ten_seconds(spec: RideSpec = SPEC, skip: int = 12) -> Block:
    return next(islice(blocks(spec), skip, None))


def columns() -> list[str]:
    return [f"{m.name}.{s.name}" for m in database().messages for s in m.signals]


def decoded(frames: list[CanFrame]) -> dict[str, float]:
    """The newest value of each bus signal, as a gateway would see them."""
    values: dict[str, float] = {}
    for frame in frames:
        message = database().get_message_by_frame_id(frame.frame_id)
        signals = message.decode(frame.data, decode_choices=False)
        values.update({f"{message.name}.{name}": value for name, value in signals.items()})
    return values


def test_the_checksum_is_sae_j1850s() -> None:
    """The catalogued check value: CRC-8/SAE-J1850 of "123456789" is 0x4B."""
    assert crc8(ord("1"), b"23456789") == 0x4B


def test_what_goes_over_the_bus_is_exactly_what_the_sensors_reported() -> None:
    block = ten_seconds()
    units = Ecu(block.cell_voltage.size, block.cell_temperature.size)
    units.load(block.scalars, block.cell_voltage, block.cell_temperature)
    bound = BoundMapping(bus_mapping(), CATALOGUE, columns(), "ev_can.toml")
    assert bound.missing() == (), "every signal of the catalogue is on the bus"
    seen: list[CanFrame] = []
    for row in range(10):
        now = list(units.second(row))
        seen += now
        values = {name: np.array([value]) for name, value in decoded(now).items()}
        arrivals = bound.convert(values, np.zeros(1), Masked())
        np.testing.assert_array_equal(arrivals.scalars[0].astype(np.float32), block.scalars[row])
    values = {name: np.array([value]) for name, value in decoded(seen).items()}
    arrivals = bound.convert(values, np.zeros(1), Masked())
    cells, probes = block.cell_voltage.size, block.cell_temperature.size
    np.testing.assert_array_equal(arrivals.cell_voltage[0, :cells].astype(np.float32), block.cell_voltage)
    np.testing.assert_array_equal(arrivals.cell_temperature[0, :probes].astype(np.float32), block.cell_temperature)
    assert np.isnan(arrivals.cell_voltage[0, cells:]).all(), "cells that this make does not have are no values"


def test_no_value_is_all_ones_on_the_bus_and_masked_by_the_mapping() -> None:
    block = ten_seconds()
    units = Ecu(block.cell_voltage.size, block.cell_temperature.size)
    nothing = np.full_like(block.scalars, np.nan)
    nothing[:, 0] = 50.0  # one signal left: the units are not silent
    units.load(nothing, block.cell_voltage, block.cell_temperature)
    bound = BoundMapping(bus_mapping(), CATALOGUE, columns(), "ev_can.toml")
    values = {name: np.array([value]) for name, value in decoded(list(units.second(0))).items()}
    masked = Masked()
    arrivals = bound.convert(values, np.zeros(1), masked)
    assert np.isnan(arrivals.scalars[0, 1:]).all()
    assert arrivals.scalars[0, 0] == 50.0
    assert masked.total() >= len(CATALOGUE.scalars) - 1


def test_a_silent_bus_sends_nothing_at_all() -> None:
    units = Ecu(96, 24)
    units.load(np.full((10, len(CATALOGUE.scalars)), np.nan, np.float32), np.full(96, np.nan), np.full(24, np.nan))
    assert [frame for row in range(10) for frame in units.second(row)] == []


def test_every_message_has_a_counter_that_goes_up_and_a_checksum_that_fits() -> None:
    first = next(blocks(SPEC))
    units = Ecu(first.cell_voltage.size, first.cell_temperature.size)
    counters: dict[int, list[int]] = {}
    total = 0
    for block in islice(blocks(SPEC), 4):
        units.load(block.scalars, block.cell_voltage, block.cell_temperature)
        for row in range(10):
            for frame in units.second(row):
                assert len(frame.data) == 8
                assert crc8(frame.frame_id, frame.data[1:]) == frame.data[0]
                message = database().get_message_by_frame_id(frame.frame_id)
                signals = message.decode(frame.data)
                assert signals[f"{message.name}_CRC"] == frame.data[0]
                counters.setdefault(frame.frame_id, []).append(signals[f"{message.name}_Counter"])
                total += 1
    for counted in counters.values():
        assert counted == [i % 16 for i in range(len(counted))]
    assert 9 <= total / 40 <= 10, "about ten frames a second of simulated time"


def test_the_bus_has_the_sensors_resolution_and_every_no_value_code_lies_beyond_the_range() -> None:
    carried = Counter(rule.column or rule.columns for rule in bus_mapping().signals.values())
    assert max(carried.values()) == 1
    for name, rule in bus_mapping().signals.items():
        if rule.column is None:
            continue
        message, signal = rule.column.split(".")
        wire = database().get_message_by_name(message).get_signal_by_name(signal)
        assert float(wire.scale) == sensors.STEP[name]
        code = ecu.no_value_code(wire) * float(wire.scale) + float(wire.offset)
        assert not CATALOGUE[name].min <= code <= CATALOGUE[name].max
        for value in (CATALOGUE[name].min, CATALOGUE[name].max):
            raw = round((value - float(wire.offset)) / float(wire.scale))
            low = -(1 << (wire.length - 1)) if wire.is_signed else 0
            high = (1 << (wire.length - wire.is_signed)) - 1
            assert low <= raw <= high, f"{name} does not fit its {wire.length} bits"


# ---- the adapter on a pty


def open_host(link: Path) -> can.BusABC:
    return can.Bus(interface="slcan", channel=str(link), bitrate=500_000, sleep_after_open=0)


def pump(port: SlcanPty) -> None:
    time.sleep(0.02)
    port.poll()


def test_python_can_reads_what_the_adapter_sends(tmp_path: Path) -> None:
    port = SlcanPty(tmp_path / "can")
    try:
        host = open_host(tmp_path / "can")
        pump(port)
        sent = [CanFrame(0x100 + i, bytes([i] * 8)) for i in range(50)]
        for frame in sent:
            port.send(frame)
        got = [host.recv(1.0) for _ in sent]
        assert [(m.arbitration_id, bytes(m.data)) for m in got if m] == [(f.frame_id, f.data) for f in sent]
        assert (port.sent, port.dropped) == (50, 0)
        host.shutdown()
    finally:
        port.close()


def test_with_the_channel_closed_frames_are_dropped_and_counted(tmp_path: Path) -> None:
    port = SlcanPty(tmp_path / "can")
    try:
        for _ in range(7):
            port.send(CanFrame(0x100, b"\0" * 8))
        host = open_host(tmp_path / "can")
        pump(port)
        assert host.recv(0.05) is None, "nothing of the time before it opened"
        host.shutdown()
        pump(port)
        port.send(CanFrame(0x100, b"\0" * 8))
        assert (port.sent, port.dropped) == (0, 8)
    finally:
        port.close()


def test_a_reader_that_does_not_read_never_blocks_the_vehicle_and_gets_whole_frames_later(tmp_path: Path) -> None:
    port = SlcanPty(tmp_path / "can")
    fd = os.open(tmp_path / "can", os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, b"O\r")
        pump(port)
        frame = CanFrame(0x123, bytes(range(8)))
        begun = time.monotonic()
        while not port.dropped:
            port.send(frame)
        assert time.monotonic() - begun < 5
        assert port.sent * len(line(frame)) >= MAX_BACKLOG_BYTES - len(line(frame))
        text, wanted = b"", 1 + port.sent * len(line(frame))  # the reply to O, then the frames
        while len(text) < wanted:
            text += os.read(fd, 4096)
            port.poll()
        assert text == b"\r" + line(frame) * port.sent
    finally:
        os.close(fd)
        port.close()


def test_a_session_begins_at_a_lines_beginning_with_nothing_of_the_one_before(tmp_path: Path) -> None:
    """An agent that was killed in the middle of a line leaves its rest in the queue."""
    port = SlcanPty(tmp_path / "can")
    try:
        fd = os.open(tmp_path / "can", os.O_RDWR | os.O_NOCTTY)
        os.write(fd, b"O\r")
        pump(port)
        for _ in range(20):
            port.send(CanFrame(0x111, b"\1" * 8))
        os.read(fd, 30)
        os.close(fd)
        host = open_host(tmp_path / "can")
        pump(port)
        port.send(CanFrame(0x222, b"\2" * 8))
        message = host.recv(1.0)
        assert message is not None
        assert message.arbitration_id == 0x222
        host.shutdown()
    finally:
        port.close()


def test_unknown_and_endless_commands_are_refused_and_forgotten(tmp_path: Path) -> None:
    port = SlcanPty(tmp_path / "can")
    fd = os.open(tmp_path / "can", os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, b"Q\rV\r" + b"z" * 2000)
        pump(port)
        assert os.read(fd, 100) == b"\aV1013\r"
        assert len(port._command) <= 64
    finally:
        os.close(fd)
        port.close()


def test_the_link_goes_away_with_the_adapter_and_a_stale_one_is_taken_over(tmp_path: Path) -> None:
    link = tmp_path / "can"
    link.symlink_to("/dev/pts/999999")  # what a killed run leaves
    port = SlcanPty(link)
    assert str(link.readlink()).startswith("/dev/pts/")
    assert link.exists()
    port.close()
    assert not link.is_symlink()


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "can").write_text("precious")
    with pytest.raises(UnavailableError, match="is no link"):
        SlcanPty(tmp_path / "can")
    assert (tmp_path / "can").read_text() == "precious"


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("nonsense", ConfigError, "INTERFACE:CHANNEL"),
        ("nosuch:can0", ConfigError, "no such interface 'nosuch'"),
        ("slcan:/dev/does-not-exist", UnavailableError, "/dev/does-not-exist"),
        ("slcan-pty:/does/not/exist/can", UnavailableError, "cannot make the CAN port"),
    ],
)
def test_a_bus_that_cannot_be_opened_is_one_clear_line(target: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        open_bus(target, 500_000)
    assert "\n" not in str(caught.value)


def test_any_interface_of_python_can_carries_the_vehicle() -> None:
    output = open_bus("virtual:simulator-test", 500_000)
    listener = can.Bus(interface="virtual", channel="simulator-test")
    try:
        output.second(ten_seconds(), 0)
        first = listener.recv(1.0)
        assert first is not None
        assert crc8(first.arbitration_id, bytes(first.data[1:])) == first.data[0]
    finally:
        listener.shutdown()
        output.close()

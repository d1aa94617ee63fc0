"""A small vehicle on a bus: a DBC of two messages, frames with counters and checksums, an slcan adapter on a pty.

Small enough to be read at once, and nobody's real DBC: what is tested with it is the agent, not the simulator.
"""

import os
import pty
import select
import threading
import tty
from pathlib import Path

import cantools
import msgspec

from edge_agent.contract.signals import Catalogue, Schema, Signal, parse_schema

DBC = """VERSION ""
NS_ :
BS_:
BU_: ECU
BO_ 256 Pack: 8 ECU
 SG_ Pack_CRC : 0|8@1+ (1,0) [0|255] "" ECU
 SG_ Pack_Counter : 8|4@1+ (1,0) [0|15] "" ECU
 SG_ Voltage : 16|16@1+ (0.1,0) [0|1000] "V" ECU
 SG_ Temperature : 32|16@1- (0.1,0) [-45|200] "degC" ECU
BO_ 257 Cells: 8 ECU
 SG_ Cells_CRC : 0|8@1+ (1,0) [0|255] "" ECU
 SG_ Cells_Counter : 8|4@1+ (1,0) [0|15] "" ECU
 SG_ Mux M : 12|4@1+ (1,0) [0|15] "" ECU
 SG_ Cell_1 m0 : 16|16@1+ (0.001,0) [0|5] "V" ECU
 SG_ Cell_2 m1 : 16|16@1+ (0.001,0) [0|5] "V" ECU
BO_ 258 Unmapped: 2 ECU
 SG_ Nothing : 0|16@1+ (1,0) [0|65535] "" ECU
"""
MAPPING = """
[source]
period_s = 1.0
[signals."Pack.Voltage"]
column = "Pack.Voltage"
[signals."Pack.Temperature"]
column = "Pack.Temperature"
[signals."Pack.Cells"]
columns = "Cells.Cell_*"
"""
SCHEMA = Schema(
    schema_name="small",
    signals=(
        Signal(name="Pack.Voltage", unit="V", min=0, max=1000, max_age_s=5, role="pack_voltage"),
        Signal(name="Pack.Temperature", unit="celsius", min=-45, max=200, max_age_s=5,
               role="battery_temperature_max"),
        Signal(name="Pack.Cells", unit="V", min=0, max=4.8, max_age_s=60, role="cell_voltage", kind="vector"),
    ),
)  # fmt: skip


def catalogue() -> Catalogue:
    return parse_schema(msgspec.json.encode(SCHEMA), "small")


def database() -> cantools.database.can.Database:
    return cantools.database.load_string(DBC, "dbc")


class Ecu:
    """Builds frames as a sender does: the counter goes up, the checksum fits."""

    def __init__(self) -> None:
        self.database = database()
        self.counters = {"Pack": 0, "Cells": 0}

    def frame(self, name: str, **values: float) -> tuple[int, bytes]:
        message = self.database.get_message_by_name(name)
        self.counters[name] = (self.counters[name] + 1) % 16
        data = bytearray(
            message.encode({**values, f"{name}_CRC": 0, f"{name}_Counter": self.counters[name]}, strict=False)
        )
        data[0] = crc8_j1850(bytes([message.frame_id & 0xFF]) + bytes(data[1:]))
        return message.frame_id, bytes(data)

    def second(self, voltage: float, temperature: float) -> list[tuple[int, bytes]]:
        return [
            self.frame("Pack", Voltage=voltage, Temperature=temperature),
            self.frame("Cells", Mux=0, Cell_1=3.7),
            self.frame("Cells", Mux=1, Cell_2=3.6),
        ]


def crc8_j1850(data: bytes) -> int:
    """Bit by bit, as the standard writes it: the agent's table is held against it."""
    crc = 0xFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = ((crc << 1) ^ 0x1D) & 0xFF if crc & 0x80 else (crc << 1) & 0xFF
    return crc ^ 0xFF


class SlcanPty:
    """An slcan adapter on the master side of a pty; whoever opens `path` sees a serial CAN adapter."""

    def __init__(self, path: Path) -> None:
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        path.symlink_to(os.ttyname(self._slave))
        self.path = path
        self.opened = 0  # how often a host has sent the command that opens the channel
        self._closing = False
        self._drain = threading.Thread(target=self._read_commands, daemon=True)
        self._drain.start()

    def _read_commands(self) -> None:
        while not self._closing:  # a read that blocked would keep the line up after `close`
            if select.select([self.master], [], [], 0.05)[0]:
                self.opened += os.read(self.master, 256).count(b"O\r")

    def send(self, frames: list[tuple[int, bytes]]) -> None:
        text = "".join(f"t{frame_id:03X}{len(data)}{data.hex().upper()}\r" for frame_id, data in frames)
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.path.unlink()
        self._closing = True
        self._drain.join()
        os.close(self._slave)
        os.close(self.master)


def write_files(folder: Path) -> None:
    (folder / "small.dbc").write_text(DBC)
    (folder / "small.toml").write_text(MAPPING)
    (folder / "small.json").write_bytes(msgspec.json.encode(SCHEMA))


def write_config(folder: Path, *, port: int, channel: Path | str, bundle: str = "", extra: str = "") -> Path:
    write_files(folder)
    path = folder / "agent.toml"
    path.write_text(
        f"""vehicle_id = "EV_7"
data_dir = "data"
schema = "small.json"
bundle = "{bundle}"
{extra}
[source]
mapping = "small.toml"
dbc = "small.dbc"
interface = "slcan"
channel = "{channel}"
[mqtt]
port = {port}
keepalive_s = 5
"""
    )
    return path

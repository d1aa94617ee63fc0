"""Outputs of a drive onto a CAN bus: our own slcan adapter on a pty, or any interface of python-can."""

from collections.abc import Callable
from pathlib import Path

import can

from edge_agent.contract.errors import ConfigError, UnavailableError
from firmware_sim.ecu import CanFrame, Ecu
from firmware_sim.ride import Block
from firmware_sim.slcan import SlcanPty

SLCAN_PTY = "slcan-pty"


class CanOutput:
    """Sends each second's CAN frames to `send`; `close` is what ends the bus."""

    def __init__(self, send: Callable[[CanFrame], None], close: Callable[[], None], port: SlcanPty | None) -> None:
        self._send, self._close, self._port = send, close, port
        self._ecu: Ecu | None = None
        self._block: Block | None = None
        self.frames = 0

    def fileno(self) -> int | None:
        """Descriptor to wake up for, if there is one."""
        return self._port.fileno() if self._port else None

    def poll(self) -> None:
        """Answer the peer's commands."""
        if self._port:
            self._port.poll()

    def second(self, block: Block, row: int) -> None:
        """Send one reported second."""
        if self._ecu is None:
            self._ecu = Ecu(block.cell_voltage.size, block.cell_temperature.size)
        if block is not self._block:
            self._block = block
            self._ecu.load(block.scalars, block.cell_voltage, block.cell_temperature)
        for frame in self._ecu.second(row):
            self._send(frame)
            self.frames += 1

    def flush(self) -> None:
        """Nothing is held back: every second left when it was due."""

    def summary(self) -> dict[str, int]:
        """Counters for the report line."""
        if self._port:
            return {"can_sent": self._port.sent, "can_dropped": self._port.dropped}
        return {"can_sent": self.frames}

    def close(self) -> None:
        """Close the bus; a pty's link goes away."""
        self._close()


def open_bus(target: str, bitrate: int) -> CanOutput:
    """Open `slcan-pty:LINK` or `INTERFACE:CHANNEL`.

    Raises `ConfigError` for a target of another form or an interface python-can does not know, `UnavailableError` when
    the bus is not there.
    """
    interface, _, channel = target.partition(":")
    if not interface or not channel:
        raise ConfigError(f"--can {target!r}: expected slcan-pty:PATH or INTERFACE:CHANNEL, as socketcan:can0")
    if interface == SLCAN_PTY:
        port = SlcanPty(Path(channel))
        return CanOutput(port.send, port.close, port)
    known = sorted(can.VALID_INTERFACES)
    if interface not in known:
        raise ConfigError(f"--can {target!r}: no such interface {interface!r}; there are slcan-pty, {', '.join(known)}")
    try:
        bus = can.Bus(interface=interface, channel=channel, bitrate=bitrate)
    except (can.CanError, OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(
            f"--can {target}: {reason}; is the interface up and the channel's name right?"
        ) from error

    def send(frame: CanFrame) -> None:
        try:
            bus.send(can.Message(arbitration_id=frame.frame_id, data=frame.data, is_extended_id=False), timeout=0.2)
        except can.CanError as error:
            raise UnavailableError(f"--can {target}: the bus does not take frames any more: {error}") from error

    return CanOutput(send, bus.shutdown, None)

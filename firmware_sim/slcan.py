"""The adapter's end of a serial CAN line (Lawicel's ASCII protocol) on a pseudo-terminal.

To whoever opens the link it is a CAN adapter: it answers S, O, L, C, V, N, F and sends every frame as a `t` line while
the channel is open. It never blocks: with the channel closed a frame is dropped, with a reader that does not read the
queue fills and then frames are dropped, always whole ones. All are counted.
"""

import contextlib
import errno
import os
import pty
import termios
import tty
from pathlib import Path

from edge_agent.contract.errors import UnavailableError
from firmware_sim.ecu import CanFrame

MAX_BACKLOG_BYTES = 32_768  # two simulated minutes of one vehicle, beside the kernel's own 4 kB
MAX_COMMAND_BYTES = 64  # the longest is an extended frame, 27
_OK, _ERROR = b"\r", b"\a"


def line(frame: CanFrame) -> bytes:
    """Return the `t` line of a standard data frame."""
    return b"t%03X%d%s\r" % (frame.frame_id, len(frame.data), frame.data.hex().upper().encode())


class SlcanPty:
    """An slcan adapter whose tty stands at `link`. Raises `UnavailableError` when the link cannot be made."""

    def __init__(self, link: Path) -> None:
        self.link = link
        self.sent = self.dropped = 0
        if link.exists() and not link.is_symlink():
            raise UnavailableError(f"{link} exists and is no link: name a path that is free for the CAN port")
        self._open = False
        self._command = b""
        self._backlog = bytearray()
        self._master, self._slave = pty.openpty()
        # We keep the tty's end open too: a reader that leaves and comes back is no hang-up.
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self._tty = os.ttyname(self._slave)
        try:
            fresh = link.with_name(f".{link.name}.{os.getpid()}")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(self._tty)
            fresh.replace(link)  # one that a killed run left behind is taken over
        except OSError as error:
            self._close_ends()
            raise UnavailableError(
                f"cannot make the CAN port {link}: {error.strerror}; choose a folder that exists and may be written"
            ) from error

    def fileno(self) -> int:
        """Descriptor that becomes readable when the host has sent a command."""
        return self._master

    @property
    def channel_open(self) -> bool:
        """Whether the host has opened the CAN channel."""
        return self._open

    def poll(self) -> None:
        """Read and answer what the host has sent, and write what the queue still holds."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._master, 4096):
                self._command += chunk
                *whole, self._command = self._command.split(b"\r")
                for command in whole:
                    self._answer(command)
        self._command = self._command[-MAX_COMMAND_BYTES:]
        self._flush()

    def _answer(self, command: bytes) -> None:
        reply = _OK
        match command[:1]:
            case b"O" | b"L":
                # What nobody read belongs to an earlier session; a session starts at a line's beginning.
                self._forget()
                self._open = True
            case b"C":
                self._open = False
                self._forget()
            case b"V":
                reply = b"V1013\r"
            case b"N":
                reply = b"NVSIM\r"
            case b"F":
                reply = b"F00\r"
            case b"t":
                reply = b"z\r"  # taken, and heard by nobody: the simulated units listen to no one
            case b"S" | b"s" | b"Z" | b"X" | b"m" | b"M" | b"Y" | b"":
                pass
            case _:
                reply = _ERROR
        self._queue(reply)

    def _forget(self) -> None:
        self._backlog.clear()
        termios.tcflush(self._slave, termios.TCIFLUSH)

    def send(self, frame: CanFrame) -> None:
        """Send a frame, or drop and count it: channel closed, or nobody reads."""
        if not self._open:
            self.dropped += 1
        elif self._queue(line(frame)):
            self.sent += 1
        else:
            self.dropped += 1

    def _queue(self, data: bytes) -> bool:
        self._flush()
        if len(self._backlog) + len(data) > MAX_BACKLOG_BYTES:
            return False
        self._backlog += data
        self._flush()
        return True

    def _flush(self) -> None:
        while self._backlog:
            try:
                written = os.write(self._master, self._backlog)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EIO:
                    return
                raise
            del self._backlog[:written]

    def _close_ends(self) -> None:
        os.close(self._master)
        os.close(self._slave)

    def close(self) -> None:
        """Take the link away, if it is still ours, and close both ends."""
        with contextlib.suppress(OSError):
            if self.link.is_symlink() and str(self.link.readlink()) == self._tty:
                self.link.unlink()
        self._close_ends()

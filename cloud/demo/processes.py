"""The demo's child processes: started with a log each, watched, and all gone when the demo is.

Each child leads its own session, so Ctrl-C reaches the demo alone and the order of stopping is ours: what writes stops
before what it writes to. A child is also told by the kernel to stop when the demo dies without a chance to say so.
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from edge_agent.contract.errors import UnavailableError

_PR_SET_PDEATHSIG = 1  # prctl(2)
_STOP_WITHIN_S = 8.0


@dataclass(slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    handle: IO[bytes]


@dataclass(slots=True)
class Processes:
    """A context that stops every child at its end, last started first."""

    logs: Path
    _children: list[_Child] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start `command`; its output goes to `NAME.log`. Raises `UnavailableError` where it cannot be run."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.log"
        handle = log.open("wb")
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_die_with_parent if os.name == "posix" else None,  # noqa: PLW1509 - no thread runs yet
            )  # fmt: skip
        except OSError as error:
            handle.close()
            raise UnavailableError(f"cannot start {command[0]}: {error}") from error
        self._children.append(_Child(name, process, log, handle))

    def named(self, name: str) -> subprocess.Popen[bytes]:
        """Return a child's process by its name."""
        return next(child.process for child in self._children if child.name == name)

    def check(self) -> None:
        """Raise `UnavailableError` for a child that has ended, with the last line it wrote."""
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                lines = child.log.read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it wrote nothing"
                raise UnavailableError(f"{child.name} ended with exit code {code}: {last} (all of it: {child.log})")

    def wait_for(self, what: str, ready: Callable[[], bool], within_s: float) -> None:
        """Wait until `ready()`; raises `UnavailableError` when a child ends or the time is up."""
        deadline = time.monotonic() + within_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise UnavailableError(f"{what} within {within_s:.0f} s; see {self.logs}")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.terminate()
                try:
                    child.process.wait(_STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()
            child.handle.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(port: int) -> bool:
    """Tell whether somebody accepts connections on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0

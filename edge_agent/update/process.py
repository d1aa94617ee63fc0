"""When the updater's process is started, and what it said when it ended. It is never waited for.

A desired release is tried at once, and again after a failure with growing pauses; a refusal is tried again only when
the next poll is due, or another release is desired. Without one that is known, a poll lets the updater ask the cloud.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from edge_agent.contract.messages import Desired
from edge_agent.update.outcome import UpdateResult

RETRY_S = 30.0
KILL_AFTER_S = 120.0  # beyond its own limit
MAX_RESULT_BYTES = 65_536


class UpdaterProcess:
    """Runs `edge-agent update` for the configuration at `config`; `now` is monotonic real time, `jitter` in [0, 1)."""

    def __init__(
        self, config: Path, *, poll_s: float, timeout_s: float, now: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config = config
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._now = now
        self._jitter = jitter
        self._desired: Desired | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._began_s = 0.0
        self._retry_s = RETRY_S
        self._due_s = now() + poll_s * (0.5 + 0.5 * jitter())  # not every vehicle of a fleet at the same second

    def want(self, desired: Desired) -> None:
        """Take what the cloud desires; the same again changes nothing."""
        known = self._desired
        if known is None or (known.target, known.counter) != (desired.target, desired.counter):
            self._due_s = self._now()
            self._retry_s = RETRY_S
        self._desired = desired

    def step(self) -> UpdateResult | None:
        """Start what is due; return what a process that has ended said."""
        if self._process is not None:
            return self._ended()
        if self._now() >= self._due_s:
            self._start()
        return None

    @property
    def running(self) -> bool:
        """Whether a process is at work."""
        return self._process is not None

    def stop(self) -> None:
        """End it: an updater may be killed anywhere."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "edge_agent", "update", "--config", str(self._config)]
        if self._desired is not None:
            command += ["--target", self._desired.target, "--counter", str(self._desired.counter)]
            command += ["--rollout", self._desired.rollout_id] if self._desired.rollout_id else []
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        self._began_s = self._now()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._output)

    def _ended(self) -> UpdateResult | None:
        process, output = self._process, self._output
        if process is None or output is None:
            return None
        if process.poll() is None:
            if self._now() > self._began_s + self._timeout_s + KILL_AFTER_S:
                process.kill()
            return None
        self._process = self._output = None
        output.seek(0)
        said = output.read(MAX_RESULT_BYTES)
        output.close()
        try:
            result = msgspec.json.decode(said, type=UpdateResult)
        except msgspec.DecodeError:
            result = UpdateResult(
                ending="failed", reason="no_trial", detail=f"the updater ended with code {process.returncode}"
            )
        self._plan(result)
        return result

    def _plan(self, result: UpdateResult) -> None:
        pause_s = self._poll_s * (0.9 + 0.2 * self._jitter())
        if result.ending == "failed":
            pause_s = min(self._retry_s, pause_s)
            self._retry_s *= 2
        else:
            self._retry_s = RETRY_S
        self._due_s = self._now() + pause_s

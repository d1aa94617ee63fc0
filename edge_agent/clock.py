"""Time, handed in: nothing else in the agent asks the operating system for it.

`monotonic()` counts through suspend, so that a night in the garage is a gap and not a jump of values. The wall clock of
a gateway without a battery starts anywhere (a Raspberry Pi: 1970): it is trusted once it is past the persisted floor,
which only peers with a clock of their own raise, and while it agrees with what they last said.
"""

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

RELEASE_FLOOR_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()  # no agent of this code ran before
PEER_TOLERANCE_S = 300.0  # a collector's ack may have waited on a slow link


class Clock(Protocol):
    """What the agent needs to know of time."""

    @property
    def boot_id(self) -> str:
        """Which boot of this machine it is: monotonic times of two boots do not compare."""

    @property
    def trusted_rate(self) -> bool:
        """False when seconds are not real ones (a scaled clock): its wall time is never to be trusted."""

    def wall(self) -> float:
        """Return Unix seconds, right or not."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


class SystemClock:
    """The operating system's."""

    def __init__(self) -> None:
        self._boot_id = read_boot_id()

    @property
    def boot_id(self) -> str:
        """The kernel's."""
        return self._boot_id

    @property
    def trusted_rate(self) -> bool:
        """Seconds are seconds."""
        return True

    def wall(self) -> float:
        """Return Unix seconds as the system has them."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since boot, suspend included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class ScaledClock:
    """Another clock, `speed` times as fast from its making on: for demonstrations and long tests."""

    def __init__(self, clock: Clock, speed: float) -> None:
        if not speed > 0:
            raise ValueError("speed must be above 0")
        self._clock = clock
        self._speed = speed
        self._wall_s = clock.wall()
        self._start_s = clock.monotonic()

    @property
    def boot_id(self) -> str:
        """The boot of the clock that is scaled."""
        return self._clock.boot_id

    @property
    def trusted_rate(self) -> bool:
        """Only at speed 1."""
        return self._speed == 1.0 and self._clock.trusted_rate

    def wall(self) -> float:
        """Return Unix seconds of the simulated day."""
        return self._wall_s + (self._clock.monotonic() - self._start_s) * self._speed

    def monotonic(self) -> float:
        """Return simulated seconds."""
        return self._start_s + (self._clock.monotonic() - self._start_s) * self._speed


@dataclass(slots=True)
class TimeFloor:
    """The earliest time it can be, and what the last peer that said the time makes of the monotonic clock."""

    floor_s: float = RELEASE_FLOOR_S
    peer_offset_s: float | None = None

    def heard(self, peer_s: float, monotonic_s: float) -> None:
        """Take a collector's time; it raises the floor and never lowers it."""
        self.floor_s = max(self.floor_s, peer_s)
        self.peer_offset_s = peer_s - monotonic_s

    def trusts(self, wall_s: float, monotonic_s: float) -> bool:
        """Tell whether the wall clock may be believed now; a step away from the peer's time ends that at once."""
        if self.peer_offset_s is not None and abs(wall_s - monotonic_s - self.peer_offset_s) > PEER_TOLERANCE_S:
            return False
        return wall_s >= self.floor_s - PEER_TOLERANCE_S


def from_iso(text: str) -> float:
    """Read an ISO 8601 time with a zone as Unix seconds. Raises `ValueError`."""
    stamp = datetime.fromisoformat(text)
    if stamp.tzinfo is None:
        raise ValueError(f"time {text!r} has no zone")
    return stamp.timestamp()


def read_boot_id() -> str:
    """Return the kernel's id of this boot, or one drawn for this process where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.urandom(16).hex()

"""Runs one vehicle against the clock: sends each simulated second when it is due, `speed` times as fast as real ones.

Second k is due at start + k / speed, counted from the start: a late wake-up sends what has become due and nothing
drifts. SIGINT and SIGTERM end it within one second; whatever ends it, the output is closed and its link is gone.
"""

import json
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from firmware_sim.driver import AC, DC, DRIVING, PARKED
from firmware_sim.ride import BLOCK_S, Block, RideSpec, blocks
from firmware_sim.sensors import CATALOGUE

REPORT_EVERY_S = 60
MODES = {PARKED: "parked", DRIVING: "driving", AC: "charging AC", DC: "charging DC"}


class Output(Protocol):
    """Where the seconds go."""

    def fileno(self) -> int | None:
        """Descriptor that `poll` should be called for when readable, or None."""

    def poll(self) -> None:
        """Serve the peer."""

    def second(self, block: Block, row: int) -> None:
        """Take one reported second."""

    def flush(self) -> None:
        """Send what `second` has collected; called once a wake-up."""

    def summary(self) -> dict[str, Any]:
        """Counters for the report line."""

    def close(self) -> None:
        """End."""


class StopSignal:
    """SIGINT and SIGTERM as a descriptor to wait on, so that no sleep outlives them."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        self.is_set = False

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._read

    def _on_signal(self, *_: object) -> None:
        self.is_set = True

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Catch both signals inside the block, and put back what was there before."""
        wake = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wake)
            os.close(self._read)
            os.close(self._write)


def report(spec: RideSpec, block: Block, row: int, second: int, counters: dict[str, Any], *, as_json: bool) -> str:
    """One line on the vehicle's state."""
    value = dict(zip(CATALOGUE.scalar_names, (float(v) for v in block.scalars[row]), strict=True))
    pack = "Vehicle.Powertrain.TractionBattery."
    state = {
        "vehicle_id": spec.vehicle_id,
        "simulated_s": second,
        "mode": MODES[block.mode],
        "speed_kmh": value["Vehicle.Speed"],
        "soc_percent": value[pack + "StateOfCharge.Displayed"],
        "pack_v": value[pack + "CurrentVoltage"],
        "pack_a": value[pack + "CurrentCurrent"],
        "inverter_c": value["Vehicle.Powertrain.Inverter.Temperature"],
        "vibration_g": value["Vehicle.Powertrain.ElectricMotor.Vibration.RMS"],
        "fault": spec.fault,
        "fault_level": round(block.level, 2),
    }
    if as_json:
        known = {k: _rounded(v) for k, v in state.items()}
        return json.dumps({**known, **counters})
    fault = f"{spec.fault} {block.level:.1f}/4" if spec.fault else "healthy"
    if math.isnan(value["Vehicle.Speed"]):  # the bus itself was silent for this second
        return f"{spec.vehicle_id}  {second // 60:4d} min  {state['mode']:<11}  no values this second  {fault}"
    return (
        f"{spec.vehicle_id}  {second // 60:4d} min  {state['mode']:<11}  {state['speed_kmh']:5.1f} km/h  "
        f"SOC {state['soc_percent']:4.1f} %  {state['pack_v']:5.1f} V {state['pack_a']:+7.1f} A  "
        f"inverter {state['inverter_c']:5.1f} °C  vibration {state['vibration_g']:.3f} g  {fault}  "
        + "  ".join(f"{name} {count}" for name, count in counters.items())
    )


def _rounded(value: object) -> object:
    if not isinstance(value, float):
        return value
    return round(value, 3) if math.isfinite(value) else None


def run(
    spec: RideSpec,
    output: Output,
    *,
    speed: float,
    duration_s: float | None,
    say: Callable[[str], None],
    as_json: bool = False,
) -> int:
    """Drive until `duration_s` simulated seconds have passed (None: without end) or a signal comes.

    Closes `output` whatever happens. Returns the number of simulated seconds sent.
    """
    try:
        with StopSignal().installed() as stop:
            return _run(spec, output, stop, speed=speed, duration_s=duration_s, say=say, as_json=as_json)
    finally:
        output.close()


def _run(
    spec: RideSpec,
    output: Output,
    stop: StopSignal,
    *,
    speed: float,
    duration_s: float | None,
    say: Callable[[str], None],
    as_json: bool,
) -> int:
    reports = blocks(spec)
    block = next(reports)
    last = float("inf") if duration_s is None else duration_s
    second, start = 0, time.monotonic()
    while second < last:
        due = min(int((time.monotonic() - start) * speed) + 1, last)
        while second < due and not stop.is_set:
            row = second % BLOCK_S
            output.second(block, row)
            second += 1
            if second % REPORT_EVERY_S == 0:
                output.flush()
                say(report(spec, block, row, second, output.summary(), as_json=as_json))
            if second % BLOCK_S == 0:
                block = next(reports)
        output.flush()
        if not _wait(stop, output, start + second / speed):
            break
    return second


def _wait(stop: StopSignal, output: Output, until: float) -> bool:
    """Wait for the next second, serving the output's peer meanwhile; False once a signal has come."""
    port = output.fileno()
    watched = [stop.fileno()] if port is None else [stop.fileno(), port]
    while not stop.is_set:
        left = until - time.monotonic()
        ready, _, _ = select.select(watched, [], [], max(left, 0.0))
        if port in ready:
            output.poll()
        if left <= 0:
            return not stop.is_set
    return False

"""One vehicle's ride, and the clock that paces it."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firmware_sim.drive import run
from firmware_sim.driver import AC, DC, DRIVING
from firmware_sim.faults import SEVERITIES
from firmware_sim.ride import RAMP_S, Block, RideSpec, blocks
from firmware_sim.sensors import CATALOGUE

START_S = 1_767_600_000.0


def spec(fault: str = "", severity: str = "critical", after_s: float = 60.0, number: int = 1) -> RideSpec:
    return RideSpec(
        vehicle_id=f"EV_{number:03d}", seed=1, start_s=START_S, fault=fault, severity=severity, fault_after_s=after_s
    )


def scalars(of: RideSpec, seconds: int) -> np.ndarray:
    return np.concatenate([b.scalars for b in islice(blocks(of), seconds // 10)])


def test_the_same_vehicle_and_seed_drive_the_same_again() -> None:
    np.testing.assert_array_equal(scalars(spec(), 600), scalars(spec(), 600))


def test_the_fault_begins_when_it_was_told_to_and_reaches_its_severity_within_two_minutes() -> None:
    for severity, level in zip(SEVERITIES, range(1, 5), strict=True):
        levels = [b.level for b in islice(blocks(spec("inverter_overheating", severity, after_s=100)), 60)]
        assert max(levels[:10]) == 0
        assert levels[(100 + int(RAMP_S)) // 10 + 1] == pytest.approx(level)
        assert levels[-1] == pytest.approx(level)


def test_before_its_fault_a_failing_vehicle_is_a_healthy_one() -> None:
    healthy, ill = scalars(spec(), 300), scalars(spec("motor_bearing_wear", after_s=300.0), 300)
    np.testing.assert_array_equal(healthy, ill)


def test_time_goes_on_second_by_second_across_trips() -> None:
    time_s = np.concatenate([b.time_s for b in islice(blocks(spec("inverter_overheating")), 400)])
    np.testing.assert_array_equal(time_s, START_S + np.arange(4000))


def test_a_failing_vehicle_drives_all_the_time_and_one_with_a_charging_fault_charges() -> None:
    modes = [b.mode for b in islice(blocks(spec("inverter_overheating")), 300)]
    assert set(modes) == {DRIVING}
    charging = [b.mode for b in islice(blocks(spec("charging_fault")), 300)]
    assert sum(m in (AC, DC) for m in charging) > 60


def test_an_endless_drive_charges_before_the_pack_is_empty() -> None:
    soc = scalars(spec("motor_bearing_wear"), 6 * 3600)[:, CATALOGUE.column("state_of_charge")]
    assert np.nanpercentile(soc, 1) > 3


class Recorder:
    """An output that notes when each second came."""

    def __init__(self, stall_at: int = -1) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.closed = False
        self.stall_at = stall_at

    def fileno(self) -> int | None:
        return None

    def poll(self) -> None:
        raise AssertionError("there is nothing to poll")

    def second(self, block: Block, row: int) -> None:
        if len(self.seconds) == self.stall_at:
            time.sleep(0.5)
        self.seconds.append((time.monotonic(), float(block.time_s[row])))

    def flush(self) -> None:
        pass

    def summary(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


def test_the_pace_does_not_drift_and_a_stall_is_caught_up() -> None:
    """Second k is due at start + k / speed; after half a second's stall it is again."""
    output, said = Recorder(stall_at=60), []
    sent = run(spec(), output, speed=60.0, duration_s=180, say=said.append)
    assert sent == 180
    assert [s for _, s in output.seconds] == [START_S + i for i in range(180)]
    begun = output.seconds[0][0]
    late = [at - begun - i / 60 for i, (at, _) in enumerate(output.seconds)]
    assert min(late) > -0.02, "none is early"
    assert np.median(late[120:]) < 0.1, "the stall is made good"
    assert len(said) == 3
    assert output.closed


def test_an_output_that_fails_is_closed_all_the_same(tmp_path: Path) -> None:
    class Broken(Recorder):
        def second(self, block: Block, row: int) -> None:
            raise OSError("gone")

    output = Broken()
    with pytest.raises(OSError, match="gone"):
        run(spec(), output, speed=60.0, duration_s=10, say=print)
    assert output.closed

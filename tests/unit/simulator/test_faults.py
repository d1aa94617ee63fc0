"""The five failures: parameters that grow with severity, and the signals that follow from them alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES
from firmware_sim import driver, duty, faults, vehicle
from firmware_sim.driver import DRIVING, Activity
from firmware_sim.faults import NEVER, TABLE, Episode
from firmware_sim.plant import Plant
from firmware_sim.sensors import CATALOGUE, Frames, Sensors

PACK = "Vehicle.Powertrain.TractionBattery."
MOTOR = "Vehicle.Powertrain.ElectricMotor."
SECONDS = 900
VARIANTS = [(kind, variant) for kind in FAILURE_TYPES for variant in TABLE[kind]]


def at_level(kind: str, variant: str, level: int, *, failure_s: float = NEVER) -> Episode:
    """A fault that stands at one level all the time."""
    reached = tuple(-1.0 if i < level else NEVER for i in range(4))
    return Episode(
        failure_type=kind,
        variant=variant,
        onset_s=-2.0,
        reached_s=(reached[0], reached[1], reached[2], reached[3]),
        failure_s=failure_s,
        end_s=NEVER,
        cell=40,
        regime="minutes" if np.isfinite(failure_s) else "",
    )


def frames(episode: Episode | None, *, mode: int = DRIVING, seconds: int = SECONDS) -> Frames:
    """The same vehicle, driver and weather each time; only the episode differs."""
    made = replace(vehicle.build(11, 4, "EV_004"), episode=episode)
    rng = vehicle.generator(11, 4, vehicle.DUTY)
    whole = duty.build(made, rng, [Activity(mode, seconds)], start_s=0.0, day=0)
    (truth,) = Plant([made], np.array([0.6]), np.array([15.0])).run([whole])
    return Sensors(made).read(truth, whole.time_s, [], vehicle.generator(11, 4, vehicle.SENSE))


def of(reported: Frames, name: str) -> np.ndarray:
    return reported.scalars[:, CATALOGUE.scalar_index[name]].astype(float)


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
def test_each_severity_has_its_documented_parameter_values(kind: str, variant: str) -> None:
    for level, severity in enumerate(SEVERITIES, start=1):
        episode = faults.sudden(kind, severity, after_s=100, ramp_s=50, cell=0, variant=variant)
        at = np.array([0.0, 99.0, 150.0, 5000.0])
        for name, values in episode.parameters(at).items():
            table = TABLE[kind][variant][name]
            np.testing.assert_allclose(values, [table[0], table[0], table[level], table[level]])
            assert table[0] == faults.HEALTHY[name], "before it begins the vehicle is healthy"


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
def test_a_fault_grows_without_jumps_back_from_onset_to_critical(kind: str, variant: str) -> None:
    episode = faults.sudden(kind, "critical", after_s=10, ramp_s=1000, cell=0, variant=variant)
    level = episode.level(np.arange(0.0, 1100.0))
    assert (np.diff(level) >= 0).all()
    assert level[9] == 0
    assert level[-1] == 4


def test_after_its_repair_a_vehicle_is_healthy() -> None:
    episode = replace(at_level("inverter_overheating", "solder", 4), end_s=500.0)
    values = episode.parameters(np.array([499.0, 500.0]))["inverter_resistance_factor"]
    assert values[0] > 3
    assert values[1] == 1.0


@pytest.mark.parametrize("variant", TABLE["inverter_overheating"])
def test_a_bad_inverter_shows_as_a_residual_against_load_and_leaves_the_pack_alone(variant: str) -> None:
    healthy = frames(None)
    residual = []
    for level in range(5):
        ill = frames(at_level("inverter_overheating", variant, level) if level else None)
        rise = of(ill, "Vehicle.Powertrain.Inverter.Temperature") - of(ill, MOTOR + "CoolantTemperature")
        residual.append(rise[200:].mean())
        np.testing.assert_array_equal(of(ill, MOTOR + "Vibration.RMS"), of(healthy, MOTOR + "Vibration.RMS"))
    assert all(b > a * 1.08 for a, b in pairwise(residual)), residual
    assert residual[3] > 1.8 * residual[0], "high severity is seen within five minutes of ordinary driving"


@pytest.mark.parametrize("variant", ["inner_race", "outer_race"])
def test_a_worn_race_multiplies_the_vibration_two_to_six_times(variant: str) -> None:
    healthy = of(frames(None), MOTOR + "Vibration.RMS")
    turning = of(frames(None), MOTOR + "Speed") > 500
    factors = []
    for level in range(1, 5):
        worn = of(frames(at_level("motor_bearing_wear", variant, level)), MOTOR + "Vibration.RMS")
        factors.append(np.median(worn[turning] / healthy[turning]))
    assert factors == sorted(factors)
    assert 1.4 < factors[0] < 2.0
    assert 4.0 < factors[-1] < 6.5


def test_a_worn_ball_is_nearly_invisible() -> None:
    healthy, worn = frames(None), frames(at_level("motor_bearing_wear", "ball", 2))
    turning = of(healthy, MOTOR + "Speed") > 500
    factor = of(worn, MOTOR + "Vibration.RMS")[turning] / of(healthy, MOTOR + "Vibration.RMS")[turning]
    assert np.median(factor) < 1.5


def test_a_failing_cell_leaves_the_pack_on_the_low_side_alone() -> None:
    """Some tens of millivolts at first, 100 and more in the end; its neighbours stay."""
    base = frames(None).cell_voltage
    lows = []
    for level in range(1, 5):
        cells = frames(at_level("battery_degradation", "cell", level)).cell_voltage
        moved = np.median(cells - base, axis=0)
        lows.append(-1e3 * moved[40])
        assert np.abs(np.delete(moved, 40)).max() < 2e-3
    assert lows == sorted(lows)
    assert 10 < lows[0] < 60
    assert lows[3] > 100


def test_a_worn_pack_has_more_resistance_and_less_charge() -> None:
    healthy, worn = frames(None), frames(at_level("battery_degradation", "pack", 3))
    soc = PACK + "StateOfCharge.Displayed"
    assert of(worn, soc)[0] - of(worn, soc)[-1] >= of(healthy, soc)[0] - of(healthy, soc)[-1]
    assert np.std(of(worn, PACK + "CurrentVoltage")) > 1.4 * np.std(of(healthy, PACK + "CurrentVoltage"))
    assert of(worn, PACK + "StateOfHealth")[0] < of(healthy, PACK + "StateOfHealth")[0]


def test_a_runaway_rises_faster_than_one_degree_a_second_and_takes_a_quarter_of_the_voltage() -> None:
    """GB 38031-2025: dT/dt ≥ 1 °C/s for more than 3 s, and a voltage drop above 25 %, within five minutes."""
    ill = frames(replace(at_level("thermal_runaway_risk", "short", 4, failure_s=300.0), event_rate_k_per_s=4.0))
    hottest, volts = of(ill, PACK + "Temperature.Max"), of(ill, PACK + "CurrentVoltage")
    rise = hottest[304:310] - hottest[303:309]
    assert (rise >= 1).all()
    assert volts[590:600].mean() < 0.75 * volts[290:300].mean()
    assert of(ill, "Vehicle.Speed")[320:].max() < 1, "the vehicle comes to a halt"
    assert of(ill, PACK + "CellVoltage.Min")[310] < 0.5


def test_a_runaway_whose_jump_lies_between_two_frames_stays_flat_after_it() -> None:
    ill = frames(replace(at_level("thermal_runaway_risk", "short", 4, failure_s=300.0), event_rate_k_per_s=500.0))
    hottest = of(ill, PACK + "Temperature.Max")
    assert hottest[301] - hottest[300] > 60
    assert np.ptp(hottest[302:400]) <= 1


def test_a_runaway_without_precursor_is_healthy_to_its_last_second() -> None:
    episode = replace(
        at_level("thermal_runaway_risk", "short", 4, failure_s=300.0),
        onset_s=300.0,
        reached_s=(300.0, 300.0, 300.0, 300.0),
        regime="none",
    )
    assert not episode.predictable
    healthy, ill = frames(None), frames(episode)
    np.testing.assert_array_equal(ill.scalars[:300], healthy.scalars[:300])


@pytest.mark.parametrize("variant", ["contact", "no_current"])
def test_a_charging_fault_delivers_less_than_was_requested(variant: str) -> None:
    shares = []
    for level in (0, 2, 4):
        ill = frames(at_level("charging_fault", variant, level) if level else None, mode=driver.AC)
        watt = of(ill, PACK + "CurrentVoltage") * of(ill, PACK + "CurrentCurrent")
        asked = 1e3 * of(ill, PACK + "Charging.RequestedPower")
        shares.append(watt.sum() / asked.sum())
    assert shares[0] > 0.75
    assert shares[2] < shares[1] < shares[0]
    assert shares[2] < 0.5


def test_a_worn_contact_heats_the_inlet() -> None:
    healthy = of(frames(None, mode=driver.DC), PACK + "Charging.InletTemperature").max()
    worn = replace(at_level("charging_fault", "contact", 1))
    assert of(frames(worn, mode=driver.DC), PACK + "Charging.InletTemperature").max() > healthy


def test_lost_isolation_falls_below_the_legal_limit_at_critical_only() -> None:
    """100 Ω/V DC, 500 Ω/V combined."""
    for level in range(5):
        ill = frames(at_level("charging_fault", "isolation", level) if level else None)
        ohm_per_volt = (
            1e3 * np.median(of(ill, PACK + "InsulationResistance")) / np.median(of(ill, PACK + "CurrentVoltage"))
        )
        assert (ohm_per_volt < 100) == (level == 4)
        assert (ohm_per_volt < 500) == (level >= 3)

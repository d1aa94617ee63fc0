"""The healthy vehicle's numbers stand where measurements of real vehicles put them."""

import numpy as np
import pytest

from firmware_sim import driver, duty, fleet, powertrain, vehicle
from firmware_sim.battery import Battery, PackConstants, charge_acceptance_w
from firmware_sim.driver import DRIVING, Activity
from firmware_sim.plant import Plant, Truth
from firmware_sim.sensors import CATALOGUE

PACK = "Vehicle.Powertrain.TractionBattery."


def battery(temperature_c: float, soc: float = 0.6) -> Battery:
    one = np.ones(1)
    return Battery(
        PackConstants(
            cells=96 * one,
            capacity_ah=94 * one,
            resistance_ohm=0.072 * one,
            heat_capacity_j_per_k=4.6e5 * one,
            liquid_cooled=0 * one,
            charge_power_w=50e3 * one,
        ),
        soc * one,
        temperature_c * one,
    )


def hold(pack: Battery, power_w: list[float], air_c: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    power = np.array(power_w, dtype=float)[:, None]
    one = np.ones_like(power)
    trace = pack.run(power, ambient_c=air_c * one, resistance_factor=one, capacity_factor=one, extra_heat_w=0 * one)
    return trace.voltage_v[:, 0], trace.current_a[:, 0], trace.temperature_c[:, 0]


@pytest.mark.parametrize(("celsius", "milliohm"), [(2.0, 177), (8.5, 123), (16.0, 92), (27.0, 72)])
def test_a_cold_pack_has_the_resistance_that_was_measured(celsius: float, milliohm: float) -> None:
    volts, amperes, _ = hold(battery(celsius), [0.0] * 5 + [20_000.0] * 5, celsius)
    assert -1e3 * (volts[5] - volts[4]) / (amperes[5] - amperes[4]) == pytest.approx(milliohm, rel=0.03)


def test_a_full_and_an_empty_small_pack_have_the_voltages_that_were_measured() -> None:
    assert hold(battery(25.0, 0.99), [0.0], 25.0)[0][0] == pytest.approx(392, abs=4)
    assert hold(battery(25.0, 0.01), [0.0], 25.0)[0][0] == pytest.approx(328, abs=15)


def test_charge_counts_and_an_empty_pack_gives_nothing() -> None:
    pack = battery(25.0)
    _, amperes, _ = hold(pack, [10_000.0] * 600, 25.0)
    assert 0.6 - pack.soc[0] == pytest.approx(amperes.sum() / 3600 / 94, rel=1e-6)
    empty = battery(25.0, 0.005)
    assert np.abs(hold(empty, [30_000.0] * 10, 25.0)[1]).max() < 1e-6


def test_charging_tapers_when_full_and_is_slow_when_cold() -> None:
    soc, cold = np.array([0.3, 0.85, 0.995]), np.array([-10.0])
    power = charge_acceptance_w(np.full(3, 50e3), soc, np.full(3, 25.0))
    assert power[0] == 50e3
    assert power[1] < 0.6 * 50e3
    assert power[2] == 0.0
    assert charge_acceptance_w(np.full(1, 50e3), soc[:1], cold)[0] < 0.2 * 50e3


def test_the_power_modules_rise_follows_the_square_of_the_current_and_its_sensor_lags() -> None:
    """At the same coolant temperature twice the torque gives more than twice the rise."""
    rises = []
    for torque in (110.0, 220.0):
        constants = constants_of(vehicle.build(1, 1, "EV_001"))
        train = powertrain.Powertrain(constants, np.array([25.0]))
        n = 120
        phase = torque * constants.phase_a_per_nm[0]
        loss = np.full((n, 1), 90 + 0.9 * phase + 0.0085 * phase**2)
        zero, one = np.zeros((n, 1)), np.ones((n, 1))
        asked = powertrain.Demand(zero, zero, zero, loss, zero)
        trace = train.run(
            asked, speed_kmh=80 * one, ambient_c=25 * one, resistance_factor=one, flow_factor=one, charger_loss_w=zero
        )
        early = trace.module_sensor_c[5, 0] - 25.0
        rises.append(trace.module_sensor_c[-1, 0] - trace.coolant_c[-1, 0])
        assert early < 0.2 * rises[-1]
    assert rises[1] > 2.4 * rises[0]


def constants_of(made: vehicle.Vehicle) -> powertrain.PowertrainConstants:
    return Plant([made], np.array([0.7]), np.array([20.0]))._powertrain.constants


def test_a_new_bearing_vibrates_as_measured_and_a_standing_one_hardly() -> None:
    rng = np.random.default_rng(0)
    n, one = 4000, np.ones(4000)
    rms, kurtosis = powertrain.vibration(
        rng, 1750 * one, 0 * one, healthy_g=0.073, rms_factor=one, fault_kurtosis=2.9 * one
    )
    assert np.median(rms) == pytest.approx(0.073, rel=0.05)
    assert np.median(kurtosis) == pytest.approx(2.9, abs=0.1)
    still, _ = powertrain.vibration(
        rng, np.zeros(n), np.zeros(n), healthy_g=0.073, rms_factor=6 * one, fault_kurtosis=2.9 * one
    )
    assert still.max() < 0.02


@pytest.fixture(scope="module")
def healthy() -> np.ndarray:
    """Frames of fifteen healthy vehicles over a day and a half of waking, [n, S]."""
    spec = fleet.FleetSpec(vehicles=15, days=2, hours=2.0, seed=3, faulty=0.0)
    made = [fleet.build_vehicle(spec, n, None) for n in range(1, 16)]
    return np.concatenate([f.scalars for period in fleet.simulate(spec, made) for f in period if f is not None])


def of(frames: np.ndarray, name: str) -> np.ndarray:
    return frames[:, CATALOGUE.scalar_index[name]]


def test_the_spread_between_cells_grows_with_load_as_measured(healthy: np.ndarray) -> None:
    spread = 1e3 * (of(healthy, PACK + "CellVoltage.Max") - of(healthy, PACK + "CellVoltage.Min"))
    ampere = of(healthy, PACK + "CurrentCurrent")
    rest = np.nanmedian(spread[np.abs(ampere) < 5])
    load = np.nanmedian(spread[(ampere < -40) & (ampere > -100)])
    heavy = np.nanmedian(spread[ampere < -100])
    assert 8 < rest < 20  # measured: 13
    assert 15 < load < 36  # 22
    assert 25 < heavy < 70  # 40
    assert rest < load < heavy


def test_driving_uses_as_much_energy_as_real_vehicles_do(healthy: np.ndarray) -> None:
    plugged = of(healthy, PACK + "Charging.IsChargingCableConnected") == 1
    watt = -of(healthy, PACK + "CurrentVoltage") * of(healthy, PACK + "CurrentCurrent")
    kwh = np.nansum(watt[~plugged]) / 3.6e6
    km = np.nansum(of(healthy, "Vehicle.Speed")) / 3600
    assert 10 < 100 * kwh / km < 24


def test_ten_minutes_of_driving_warm_the_pack_by_a_few_degrees_at_most(healthy: np.ndarray) -> None:
    warm = of(healthy, PACK + "Temperature.Max")
    plugged = of(healthy, PACK + "Charging.IsChargingCableConnected")
    rises = [
        np.nanmedian(warm[at + 580 : at + 600]) - np.nanmedian(warm[at : at + 20])
        for start in range(0, len(warm) - 3600, 3600)  # a waking period is 3600 s: no window crosses a night
        for at in range(start, start + 3000, 300)
        if (plugged[at : at + 600] == 0).all()
    ]
    assert np.median(rises) <= 1
    assert np.percentile(rises, 99) <= 4


def test_every_signal_stays_within_the_catalogue_and_has_its_resolution(healthy: np.ndarray) -> None:
    finite = np.where(np.isnan(healthy), CATALOGUE.scalar_min.astype(np.float32), healthy)
    assert (finite >= CATALOGUE.scalar_min.astype(np.float32)).all()
    assert (finite <= CATALOGUE.scalar_max.astype(np.float32)).all()
    volts = of(healthy, PACK + "CurrentVoltage").astype(float)
    assert np.nanmax(np.abs(volts * 10 - np.rint(volts * 10))) < 1e-3


def run_in_parts(made: vehicle.Vehicle, whole: duty.Duty, length: int) -> list[Truth]:
    plant = Plant([made], np.array([0.8]), whole.ambient_c[:1])
    return [plant.run([whole.part(at, at + length)])[0] for at in range(0, len(whole), length)]


def test_a_duty_cut_into_ten_second_parts_gives_the_same_physics() -> None:
    """`drive` runs in parts what `generate` runs whole: both must see one distribution."""
    made = vehicle.build(5, 5, "EV_005")
    rng = vehicle.generator(5, 5, vehicle.DUTY)
    whole = duty.build(made, rng, [Activity(DRIVING, 900), Activity(driver.AC, 300)], start_s=0.0, day=0)
    (once,) = run_in_parts(made, whole, 1200)
    parts = run_in_parts(made, whole, 10)
    for name in ("pack_v", "pack_a", "module_sensor_c", "coolant_c", "inlet_c", "odometer_km"):
        joined = np.concatenate([getattr(p, name) for p in parts])
        np.testing.assert_allclose(joined, getattr(once, name), rtol=0, atol=1e-9)


def test_a_drive_begins_and_ends_at_rest_and_asks_no_impossible_acceleration() -> None:
    for seed in range(20):
        trip = driver.drive(np.random.default_rng(seed), 700, driver.Style(vigour=1.4))
        assert trip.speed_kmh[0] == 0
        assert trip.speed_kmh[-1] < 12
        assert np.abs(trip.acceleration_m_per_s2).max() < 4.5
        assert trip.speed_kmh.max() < 145


def test_a_plan_fills_the_waking_period_exactly() -> None:
    for seed in range(30):
        todo = driver.plan(np.random.default_rng(seed), 2700, driver.Style(), soc=0.2 + seed / 50, km_range=250)
        assert sum(a.seconds for a in todo) == 2700

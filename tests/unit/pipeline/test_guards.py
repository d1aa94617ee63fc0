"""GB 38031 by hand: what must fire, what must not, and that neither depends on how the arrivals are cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.pipeline.guards import HOT_CODES_C, GuardLimits, Guards
from edge_agent.pipeline.outcomes import AlertChange
from tests.telemetry import CATALOGUE, PUMP, column, cut, quiet

THERMAL = "thermal_runaway_risk"
MAX = column("battery_temperature_max")


def check(block: ArrivalBlock, cuts: list[int] | None = None) -> list[AlertChange]:
    guards = Guards(CATALOGUE)
    changes: list[AlertChange] = []
    for piece in cut(block, cuts or []):
        changes += guards.check(piece)
    return changes


def raised(changes: list[AlertChange]) -> list[tuple[str, str]]:
    return [(c.failure_type, c.rule) for c in changes if c.transition == "raised"]


def without_max(block: ArrivalBlock) -> ArrivalBlock:
    block.scalars[:, MAX] = np.nan
    return block


def steady(seconds: int = 120, period_s: float = 1.0, **more: int) -> ArrivalBlock:
    return without_max(quiet(1e9 + np.arange(0, seconds, period_s), **more))


# --- what must fire ---


def test_one_degree_a_second_for_more_than_three_seconds_fires() -> None:
    block = steady()
    block.cell_temperature[60:, 1] = 25.5 + np.minimum(np.arange(60), 30)
    changes = check(block)
    assert raised(changes) == [(THERMAL, "gb38031_temperature_rise")]
    assert changes[0].time_s - 1e9 <= 66, "some seconds, far below GB 38031's five minutes"
    assert changes[0].origin == "guard"
    assert changes[0].evidence[0].name.endswith("CellTemperature[1]")


@pytest.mark.parametrize("period_s", [1.0, 10.0, 30.0])
def test_a_jump_between_two_arrivals_and_flat_afterwards_fires(period_s: float) -> None:
    block = steady(1200, period_s)
    n = len(block)
    block.cell_temperature[n // 2 :, 2] = 55.0
    changes = check(block)
    assert raised(changes) == [(THERMAL, "temperature_jump" if period_s > 6 else "gb38031_temperature_rise")]
    assert changes[0].time_s == block.time_s[n // 2 + 1], "on the second arrival that shows it"
    assert changes[0].since_s == block.time_s[n // 2]


def test_a_jump_of_the_maximum_alone_fires_where_no_probe_is_known() -> None:
    block = quiet(1e9 + np.arange(0, 1200.0, 10.0), probes=0, cells=0)
    block.scalars[60:, MAX] = 48.0
    assert raised(check(block)) == [(THERMAL, "temperature_jump")]


@pytest.mark.parametrize(("rise", "fires"), [(20.0, True), (8.0, False)])
def test_a_jump_that_lies_in_a_silence_of_minutes_fires_if_no_healthy_pack_could(rise: float, fires: bool) -> None:
    block = without_max(quiet(np.concatenate((np.arange(0, 600.0, 10.0), 840 + np.arange(0, 600.0, 10.0)))))
    block.cell_temperature[60:, 2] += rise
    assert raised(check(block)) == [(THERMAL, "temperature_jump")] * fires


def test_two_probes_that_agree_fire_on_one_arrival() -> None:
    block = steady(600, 10.0)
    block.cell_temperature[30:, 1] = 47.0
    block.cell_temperature[30:, 2] = 52.0
    changes = check(block)
    assert changes[0].time_s == block.time_s[30]
    assert changes[0].severity == "critical"


def test_a_probe_and_a_cell_that_agree_fire_on_one_arrival() -> None:
    block = steady(600, 10.0)
    block.cell_temperature[30:, 1] = 47.0
    block.cell_voltage[30:, 3] = 2.4
    changes = check(block)
    assert changes[0].time_s == block.time_s[30]
    assert changes[0].severity == "critical"


def test_over_temperature_fires_however_slowly_it_came_and_escalates() -> None:
    block = steady(12_000)
    block.cell_temperature[:, 1] = np.linspace(25, 90, len(block))
    changes = check(block)
    assert [(c.transition, c.rule, c.severity) for c in changes] == [
        ("raised", "over_temperature", "high"),
        ("escalated", "over_temperature", "critical"),
    ]
    assert changes[0].key == changes[1].key


def test_a_cell_a_quarter_below_the_pack_fires() -> None:
    block = steady()
    block.cell_voltage[60:, 5] = 2.7
    changes = check(block)
    assert raised(changes) == [(THERMAL, "gb38031_voltage_drop")]
    assert "CellVoltages[5]" in changes[0].evidence[0].name


def test_a_lowest_cell_a_quarter_below_the_highest_fires_where_no_cell_is_known() -> None:
    block = quiet(np.arange(100.0), cells=0, probes=0)
    block.scalars[50:, column("cell_voltage_min")] = 2.5
    assert raised(check(block)) == [(THERMAL, "gb38031_voltage_drop")]


def test_isolation_below_a_hundred_ohm_per_volt_fires() -> None:
    block = steady()
    block.scalars[60:, column("insulation_resistance")] = 35.0  # kOhm; 100 Ω/V of 360 V is 36
    assert raised(check(block)) == [("charging_fault", "isolation_loss")]
    block.scalars[60:, column("insulation_resistance")] = 37.0
    assert check(block) == []


@pytest.mark.parametrize(
    ("role", "value", "found"),
    [
        ("inverter_temperature", 130.0, ("inverter_overheating", "inverter_over_temperature")),
        ("inlet_temperature", 95.0, ("charging_fault", "inlet_over_temperature")),
    ],
)
def test_a_part_too_hot_fires(role: str, value: float, found: tuple[str, str]) -> None:
    block = steady()
    block.scalars[60:, column(role)] = value
    assert raised(check(block)) == [found]
    block.scalars[61:, column(role)] = 50.0
    assert check(block) == [], "one arrival is a glitch"


def test_fires_on_single_can_frames_that_carry_one_value_each() -> None:
    n = 4000
    block = ArrivalBlock(
        1e4 + np.arange(n) * 0.01,
        np.full((n, len(CATALOGUE.scalars)), np.nan),
        np.full((n, 8), np.nan),
        np.full((n, 4), np.nan),
    )
    probe = np.arange(n) % 20 == 0  # five readings a second
    rise = np.clip(block.time_s - 1e4 - 20, 0, None) * 1.5
    block.cell_temperature[probe, 2] = (25 + rise)[probe]
    assert raised(check(block, list(range(n)))) == [(THERMAL, "gb38031_temperature_rise")]


# --- what must not ---


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 90), st.integers(0, 3), st.floats(-45, 200), st.sampled_from([1.0, 10.0, 30.0]), st.booleans())
def test_a_glitch_of_one_probe_never_fires(at: int, probe: int, value: float, period_s: float, beside: bool) -> None:
    block = steady(int(120 * period_s), period_s)
    block.cell_temperature[at, probe] = value
    if beside:  # and the maximum that a BMS makes of it
        block.scalars[:, MAX] = block.cell_temperature.max(axis=1)
    assert check(block) == []


@pytest.mark.parametrize("code", HOT_CODES_C.tolist())
@pytest.mark.parametrize("probes", [1, 4])
def test_an_undecoded_invalid_code_never_fires(code: float, probes: int) -> None:
    block = steady(400)
    block.cell_temperature[100:, :probes] = code
    assert check(block) == []
    block.cell_temperature[200:, :probes] = 25.0
    assert check(block) == []


@pytest.mark.parametrize("code", [-45.0, -40.0, 0.0])
def test_probes_that_come_back_from_a_code_to_a_warm_pack_do_not_fire(code: float) -> None:
    block = steady(400)
    block.cell_temperature[:] += 20.0
    block.cell_temperature[100:200] = code
    assert check(block) == []


def test_a_probe_that_comes_back_from_any_low_value_does_not_fire() -> None:
    block = steady(400)
    block.cell_temperature[100:200, 1] = 7.0
    assert check(block) == []


def test_a_dead_sense_wire_does_not_fire_nor_vouch_for_a_glitch() -> None:
    block = steady(600)
    block.cell_voltage[100:, 3] = 0.0
    block.cell_temperature[500, 1] = 120.0
    assert check(block) == []


def test_a_glitch_of_one_cell_never_fires() -> None:
    block = steady()
    block.cell_voltage[60, 3] = 1.5
    assert check(block) == []


def test_the_whole_pack_sagging_is_no_cell_fault() -> None:
    block = steady()
    block.cell_voltage[60:80] *= 0.8
    assert check(block) == []


def test_warming_over_a_stop_is_no_rise() -> None:
    block = without_max(quiet(np.concatenate((np.arange(100.0), 1000 + np.arange(100.0)))))
    block.cell_temperature[100:] += 15.0
    assert check(block) == []


def test_charging_warmth_of_a_real_pack_is_no_rise() -> None:
    block = steady(3600)
    block.cell_temperature[:] += np.round(np.arange(3600) / 100)[
        :, None
    ]  # 36 °C an hour in whole degrees: 6 times a real one
    block.cell_temperature[:] = np.minimum(block.cell_temperature, 50)
    assert check(block) == []


def test_isolation_is_not_judged_while_high_voltage_is_off() -> None:
    block = steady()
    block.scalars[:, column("pack_voltage")] = 50.0
    block.scalars[60:, column("insulation_resistance")] = 0.0
    assert check(block) == []


def test_a_schema_without_these_parts_has_no_rule() -> None:
    block = ArrivalBlock(np.arange(100.0), np.full((100, 2), 7.0), np.empty((100, 0)), np.empty((100, 0)))
    assert Guards(PUMP).check(block) == []


# --- life of an alarm ---


def test_an_alarm_is_cleared_after_recovery_and_repeats_only_after_the_cooldown() -> None:
    block = steady(7200)
    hot = np.zeros(7200, bool)
    hot[100:200] = hot[600:700] = hot[3000:3100] = True
    block.scalars[hot, column("inverter_temperature")] = 130.0
    changes = check(block)
    assert [(c.transition, c.time_s - 1e9) for c in changes] == [
        ("raised", 101.0), ("cleared", 260.0), ("raised", 3001.0), ("cleared", 3160.0),
    ]  # fmt: skip
    assert changes[0].key == changes[1].key != changes[2].key


def test_a_rise_in_severity_passes_the_cooldown() -> None:
    block = steady(2000)
    inverter = column("inverter_temperature")
    block.scalars[100:200, inverter] = 130.0
    block.scalars[600:700, inverter] = 155.0
    assert [(c.transition, c.severity) for c in check(block)] == [
        ("raised", "high"), ("cleared", "high"), ("raised", "critical"), ("cleared", "critical"),
    ]  # fmt: skip


def test_a_sensor_that_burns_does_not_end_its_alarm() -> None:
    block = steady(3000)
    block.cell_temperature[100:120, 1] = 70.0
    block.cell_temperature[120:, 1] = np.nan
    assert [c.transition for c in check(block)] == ["raised"]


def test_limits_of_a_maker_replace_ours() -> None:
    block = steady()
    block.cell_temperature[:, 1] = 52.0
    assert check(block) == []
    assert raised(Guards(CATALOGUE, GuardLimits(battery_c=50.0)).check(block)) == [(THERMAL, "over_temperature")]


# --- however it is cut, whenever it is interrupted ---


def eventful(seed: int) -> ArrivalBlock:
    rng = np.random.default_rng(seed)
    block = without_max(quiet(1e9 + np.cumsum(rng.choice([0.2, 1.0, 1.0, 10.0], 700))))
    n = len(block)
    for _ in range(int(rng.integers(1, 5))):
        at, probe = int(rng.integers(20, n)), int(rng.integers(0, 4))
        length = int(rng.choice([1, 2, 30, 400]))
        block.cell_temperature[at : at + length, probe] = rng.choice([-40.0, 12.0, 48.0, 70.0, 90.0, 87.5])
    at = int(rng.integers(20, n))
    block.cell_voltage[at : at + int(rng.integers(1, 20)), 2] = 2.0
    at = int(rng.integers(20, n))
    block.scalars[at : at + 50, column("inverter_temperature")] = rng.choice([126.0, 160.0])
    block.cell_temperature[rng.random(block.cell_temperature.shape) < 0.4] = np.nan
    return block


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 700), max_size=6))
def test_a_block_cut_anywhere_gives_the_same_alarms(seed: int, cuts: list[int]) -> None:
    block = eventful(seed)
    whole = check(block)
    assert check(block, cuts) == whole
    assert check(block, list(range(0, 700, 7))) == whole


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 699))
def test_state_restored_in_other_guards_goes_on_exactly(seed: int, at: int) -> None:
    block = eventful(seed)
    first, second = Guards(CATALOGUE), Guards(CATALOGUE)
    changes = first.check(block.take(slice(0, at)))
    second.restore(first.state())
    assert changes + second.check(block.take(slice(at, None))) == check(block)


def test_a_clock_set_back_neither_fires_nor_silences() -> None:
    block = steady(300)
    block.time_s[150:] -= 1e8
    block.cell_temperature[150:] += 8.0
    assert check(block) == []
    block.cell_temperature[250:, 1] = 70.0
    assert raised(check(block)) == [(THERMAL, "gb38031_temperature_rise")]

"""The feature graph, run as it ships: in onnxruntime, one window at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import parse_schema
from edge_agent.pipeline.outcomes import Window
from export import trend
from export.features import FeatureGraph, FeatureRunner, graph_inputs

PUMP = {
    "schema_name": "pump",
    "signals": [
        {"name": f"Pump.S{i}", "unit": "bar", "min": 0, "max": 100, "max_age_s": 5, "kind": "scalar"} for i in range(8)
    ],
}


def outputs(runner: FeatureRunner, window: Window, state: dict) -> dict:
    session = runner._session
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {**graph_inputs(window), **state}), strict=True))


def features(runner: FeatureRunner, window: Window, state: dict | None = None) -> dict[str, float]:
    cells, probes = window.cell_voltage.shape[1], window.cell_temperature.shape[1]
    values, _, _ = runner.run(window, state or runner.initial_state(cells, probes))
    return dict(zip(runner.feature_names, values.tolist(), strict=True))


def quiet(catalogue, cells: int = 6, probes: int = 3, elapsed_s: float = 300.0) -> Window:
    """A window of a vehicle at rest: nothing arrived but the cells, all of 3.7 V."""
    return Window(
        0.0,
        np.full((300, len(catalogue.scalars)), np.nan, np.float32),
        np.full((30, cells), 3.7, np.float32),
        np.full((30, probes), 20.0, np.float32),
        elapsed_s,
        1.0,
    )


def put(catalogue, window: Window, **columns) -> Window:
    values = window.values.copy()
    for role, column in columns.items():
        values[:, catalogue.column(role)] = column
    return replace(window, values=values)


def test_names_are_unique_and_few_enough_for_a_millisecond(graph):
    assert len(set(graph.feature_names)) == len(graph.feature_names) <= 220


def test_statistics_agree_with_numpy_on_windows_with_gaps(runner, catalogue, drive):
    window = drive(5).window(3)
    values = window.values.copy()
    values[np.random.default_rng(0).random(values.shape) < 0.4] = np.nan
    found = features(runner, replace(window, values=values))
    x = values.astype(np.float64)
    t = np.arange(300.0)
    for i, name in enumerate(catalogue.scalar_names):
        known = ~np.isnan(x[:, i])
        column = x[known, i]
        scale = max(1.0, float(np.abs(column).max()))
        expected = {
            "mean": column.mean(),
            "std": column.std(),
            "min": column.min(),
            "max": column.max(),
            "median": np.median(column),
            "slope_per_s": np.polyfit(t[known], column, 1)[0],
            "present": known.mean(),
        }
        for statistic, value in expected.items():
            assert found[f"{name}.{statistic}"] == pytest.approx(value, rel=1e-4, abs=1e-5 * scale), (name, statistic)


def test_a_signal_absent_for_the_whole_window_is_nan_in_its_features_and_nowhere_else(runner, catalogue, drive):
    window = drive(1).window(0)
    base = outputs(runner, window, runner.initial_state(12, 4))
    for i, name in enumerate(catalogue.scalar_names):
        values = window.values.copy()
        values[:, i] = np.nan
        found = outputs(runner, replace(window, values=values), runner.initial_state(12, 4))
        by_name = dict(zip(runner.feature_names, found["features"][0], strict=True))
        assert np.isnan(by_name[f"{name}.mean"])
        assert by_name[f"{name}.present"] == 0
        others = [n for n in catalogue.scalar_names if n != name]
        assert all(np.isfinite(by_name[f"{n}.{s}"]) for n in others for s in ("mean", "std", "median", "slope_per_s"))
        for output, answer in found.items():
            if output not in ("features", "pooled"):
                assert np.isfinite(answer).all(), (name, output)
        assert base["features"].shape == found["features"].shape


def test_a_window_of_nothing_gives_no_infinity_and_a_finite_state(runner, catalogue):
    window = quiet(catalogue, 1, 1)
    empty = replace(
        window,
        cell_voltage=np.full((30, 1), np.nan, np.float32),
        cell_temperature=np.full((30, 1), np.nan, np.float32),
    )
    found = outputs(runner, empty, runner.initial_state(0, 0))
    assert found["worst_cell"].tolist() == [-1]
    assert found["worst_cell_deviation_v"].tolist() == [0.0]
    assert all(np.isfinite(found[f"{s.name}_out"]).all() for s in runner.state_specs)
    present = [n.endswith(".present") for n in runner.feature_names]
    assert np.isnan(found["features"][0][~np.array(present)]).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    special=st.lists(
        st.sampled_from([np.nan, np.inf, -np.inf, 1e-42, -1e-42, 3.4e38, -3.4e38, 1e9, -1e9, 0.0, 1e-30]), min_size=1
    ),
    cells=st.integers(1, 5),
    elapsed_s=st.sampled_from([0.0, 1.0, 60.0, 300.0, 1e12, np.nan, -5.0]),
)
def test_no_input_makes_an_infinity_or_poisons_the_state(runner, seed, special, cells, elapsed_s):
    random = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        values = random.normal(0, 10.0 ** random.integers(-5, 8), shape)
        where = random.random(shape) < random.random()
        values[where] = random.choice(special, size=int(where.sum()))
        return values.astype(np.float32)

    state = runner.initial_state(cells, 2)
    for _ in range(2):
        window = Window(0.0, noise(300, 23), noise(30, cells), noise(30, 2), elapsed_s, 1.0)
        found = outputs(runner, window, state)
        assert not np.isinf(found["features"]).any()
        assert not np.isinf(found["pooled"]).any()
        state = {s.name: found[f"{s.name}_out"] for s in runner.state_specs}
        assert all(np.isfinite(x).all() for x in state.values())
        assert np.isfinite(found["worst_cell_deviation_v"]).all()


def test_an_odometer_of_a_million_kilometres_has_no_spread_of_its_own(runner, catalogue):
    found = features(runner, put(catalogue, quiet(catalogue), odometer=np.full(300, 1_234_567.0)))
    assert found["Vehicle.TraveledDistance.std"] == 0.0
    assert found["Vehicle.TraveledDistance.slope_per_s"] == 0.0


@pytest.mark.parametrize("period_s", [1, 10, 30])
def test_pack_resistance_is_found_whatever_the_report_rate(runner, catalogue, period_s):
    random = np.random.default_rng(1)
    current = random.uniform(-100, 40, 300)
    voltage = 370 + 0.085 * current
    window = put(catalogue, quiet(catalogue), pack_current=current, pack_voltage=voltage)
    values = window.values.copy()
    values[np.arange(300) % period_s != 0] = np.nan
    found = features(runner, replace(window, values=values))
    assert found["pack_resistance_ohm"] == pytest.approx(0.085, rel=1e-3)


def test_a_cold_pack_is_not_a_resistive_one(runner, catalogue):
    """Measured packs: 177 mΩ below 5 °C, 72 at 20 to 35 °C, the same pack."""
    current = np.random.default_rng(1).uniform(-100, 40, 300)
    by_temperature = {}
    for celsius, ohm in ((0.0, 0.177), (28.0, 0.072)):
        window = put(
            catalogue,
            quiet(catalogue),
            pack_current=current,
            pack_voltage=370 + ohm * current,
            battery_temperature_max=np.full(300, celsius),
        )
        by_temperature[celsius] = features(runner, window)["pack_resistance_25c_ohm"]
    assert by_temperature[0.0] == pytest.approx(by_temperature[28.0], rel=0.15)


def test_a_hot_inverter_under_load_is_not_an_overheating_one(runner, catalogue):
    """The signature is the rise against load: twice the load with four times the rise is healthy."""

    def rise_per_load(torque_nm: float, ohm_like: float) -> float:
        rise = ohm_like * (torque_nm / 100) ** 2
        window = put(
            catalogue,
            quiet(catalogue),
            motor_torque=np.full(300, torque_nm),
            coolant_temperature=np.full(300, 30.0),
            inverter_temperature=np.full(300, 30.0 + rise),
        )
        return features(runner, window)["inverter_rise_per_load_c"]

    assert rise_per_load(200, 5.0) == pytest.approx(rise_per_load(100, 5.0), rel=1e-3)
    assert rise_per_load(100, 6.5) == pytest.approx(1.3 * rise_per_load(100, 5.0), rel=1e-3)


def test_charging_below_request_plugged_idle_and_hot_inlet_show(runner, catalogue):
    charging = put(
        catalogue,
        quiet(catalogue),
        pack_current=np.full(300, 8.0),
        pack_voltage=np.full(300, 400.0),
        charge_power_requested=np.full(300, 11.0),
        is_charging=np.ones(300),
        cable_connected=np.ones(300),
        state_of_charge=np.full(300, 50.0),
        ambient_temperature=np.full(300, 20.0),
        inlet_temperature=np.full(300, 60.0),
    )
    found = features(runner, charging)
    assert found["charge_power_ratio"] == pytest.approx(3.2 / 11, rel=1e-4)
    assert found["charge_deficit_kw"] == pytest.approx(7.8, rel=1e-4)
    assert found["inlet_rise_c"] == pytest.approx(40.0)
    assert found["plugged_idle_share"] == 0.0
    idle = put(catalogue, charging, pack_current=np.zeros(300))
    assert features(runner, idle)["plugged_idle_share"] == 1.0
    full = put(catalogue, idle, state_of_charge=np.full(300, 100.0))
    assert features(runner, full)["plugged_idle_share"] == 0.0


def test_isolation_is_in_ohm_per_volt_and_vibration_per_speed(runner, catalogue):
    window = put(
        catalogue,
        quiet(catalogue),
        insulation_resistance=np.full(300, 40.0),
        pack_voltage=np.full(300, 400.0),
        vibration_rms=np.full(300, 0.3),
        motor_speed=np.full(300, -6000.0),
    )
    found = features(runner, window)
    assert found["isolation_ohm_per_v"] == pytest.approx(100.0)
    assert found["vibration_per_krpm_g"] == pytest.approx(0.05, rel=1e-4)


def test_the_worst_cell_is_the_lone_low_one_and_not_a_group_that_shifted_high(runner, catalogue):
    window = put(catalogue, quiet(catalogue, 9), pack_current=np.zeros(300), state_of_charge=np.full(300, 50.0))
    volts = window.cell_voltage.copy()
    volts[:, :3] += 0.05  # a module that stands high
    volts[:, 7] -= 0.03
    found = outputs(runner, replace(window, cell_voltage=volts), runner.initial_state(9, 3))
    assert found["worst_cell"].tolist() == [7]
    assert found["worst_cell_deviation_v"][0] == pytest.approx(-0.03, abs=1e-5)


@pytest.mark.parametrize("cells", [1, 2])
def test_fewer_than_three_cells_have_no_worst_one(runner, catalogue, cells):
    volts = np.full((30, cells), 3.7, np.float32)
    volts[:, 0] -= 0.2
    found = outputs(runner, replace(quiet(catalogue), cell_voltage=volts), runner.initial_state(cells, 3))
    assert found["worst_cell"].tolist() == [-1]


def test_rest_outweighs_load_in_the_slow_state(runner, catalogue):
    """Under load a weak contact bends a cell's voltage; a window of rest corrects an hour of driving."""
    state = runner.initial_state(6, 3)
    volts = np.full((30, 6), 3.7, np.float32)
    volts[:, 2] -= 0.04
    loaded = put(
        catalogue,
        replace(quiet(catalogue), cell_voltage=volts),
        pack_current=np.full(300, -80.0),
        state_of_charge=np.full(300, 50.0),
    )
    for _ in range(10):
        _, _, state = runner.run(loaded, state)
    at_rest = put(catalogue, quiet(catalogue), pack_current=np.zeros(300), state_of_charge=np.full(300, 50.0))
    found = outputs(runner, at_rest, state)
    assert -0.005 < found["worst_cell_deviation_v"][0] < 0


def test_the_slow_state_takes_the_newest_stride_only(runner, catalogue, drive):
    window = drive(2).window(5)  # elapsed 60 s
    state = runner.initial_state(12, 4)
    _, _, after = runner.run(window, state)
    old = replace(
        window,
        values=window.values.copy(),
        cell_voltage=window.cell_voltage.copy(),
        cell_temperature=window.cell_temperature,
    )
    old.cell_voltage[:24, 3] -= 0.2
    old.values[:200, catalogue.column("vibration_rms")] *= 5
    _, _, again = runner.run(old, state)
    for name, x in after.items():
        np.testing.assert_array_equal(x, again[name])
    old.cell_voltage[24:, 3] -= 0.2
    _, _, moved = runner.run(old, state)
    assert moved["cell_trend"][0, 3, 0] < after["cell_trend"][0, 3, 0] - 0.01


def test_overlapping_windows_count_each_row_once(runner, catalogue):
    window = put(catalogue, quiet(catalogue), pack_current=np.zeros(300), state_of_charge=np.full(300, 50.0))
    _, _, state = runner.run(window, runner.initial_state(6, 3))
    assert state["cell_trend"][0, 0, 9] == pytest.approx(30)  # the baseline's denominator does not decay
    for _ in range(5):
        _, _, state = runner.run(replace(window, elapsed_s=60.0), state)
    assert state["cell_trend"][0, 0, 9] == pytest.approx(30 + 5 * 6)
    assert state["observed_s"][0] == pytest.approx(300 + 5 * 60)


def test_sums_decay_with_their_horizon_and_the_baseline_stands_after_the_first_hours(runner, catalogue):
    window = put(catalogue, quiet(catalogue), pack_current=np.zeros(300), state_of_charge=np.full(300, 50.0))
    state = runner.initial_state(6, 3)
    while state["observed_s"][0] < trend.BASELINE_S:
        _, _, state = runner.run(window, state)
    before = state["cell_trend"][0, 0].copy()
    nothing = replace(window, cell_voltage=np.full((30, 6), np.nan, np.float32))
    _, _, state = runner.run(nothing, state)
    after = state["cell_trend"][0, 0]
    for h, horizon_s in enumerate(trend.HORIZONS_S):
        assert after[4 + h] / before[4 + h] == pytest.approx(np.exp(-300 / horizon_s), rel=1e-4)
    low = window.cell_voltage.copy()
    low[:, 4] -= 0.1
    changed = replace(window, cell_voltage=low)
    _, _, state = runner.run(changed, state)
    np.testing.assert_array_equal(state["cell_trend"][0, :, 8:], np.stack([before[8:]] * 6))
    for _ in range(12):
        values, _, state = runner.run(changed, state)
    found = dict(zip(runner.feature_names, values.tolist(), strict=True))
    assert found["cells.lowest_change_v.1h"] < -0.05
    assert found["cells.lowest_change_v.168h"] > found["cells.lowest_change_v.1h"]


def test_a_corrupt_state_starts_anew_instead_of_leaking(runner, drive):
    window = drive(3).window(4)
    fresh = outputs(runner, window, runner.initial_state(12, 4))
    spoiled = {name: np.full_like(x, np.nan) for name, x in runner.initial_state(12, 4).items()}
    found = outputs(runner, window, spoiled)
    for name in fresh:
        np.testing.assert_array_equal(fresh[name], found[name])


@pytest.mark.parametrize(("cells", "probes"), [(1, 1), (2, 1), (3, 2), (87, 23), (96, 24)])
def test_any_number_of_cells_and_probes(runner, drive, cells, probes):
    window = drive(0, cells=cells, probes=probes).window(0)
    _, pooled, state = runner.run(window, runner.initial_state(cells, probes))
    assert state["cell_trend"].shape == (1, cells, trend.WIDTH)
    assert pooled.shape == (60, 23)


def test_pooled_are_means_of_five_seconds_of_what_was_there(runner, catalogue, drive):
    window = drive(4).window(1)
    values = window.values.copy()
    values[10:15, 3] = np.nan
    _, pooled, _ = runner.run(replace(window, values=values), runner.initial_state(12, 4))
    assert np.isnan(pooled[2, 3])
    expected = np.nanmean(values.reshape(60, 5, 23)[:2], axis=1)
    np.testing.assert_allclose(pooled[:2], expected, rtol=1e-5, atol=1e-6)


def test_onnx_answers_as_torch_does(runner, graph, drive):
    simulated = drive(8, "battery_degradation")
    state = runner.initial_state(12, 4)
    for k in range(4):
        inputs = {**graph_inputs(simulated.window(k)), **state}
        with torch.no_grad():
            expected = graph(*(torch.from_numpy(x) for x in inputs.values()))
        found = runner._session.run(None, inputs)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=2e-4, atol=1e-4)
        state = dict(zip(state, found[2 : 2 + len(state)], strict=True))


def test_another_schema_without_any_known_role_has_features_and_a_slow_state():
    catalogue = parse_schema(json.dumps(PUMP), "pump")
    spec = WindowSpec(frames=120, period_s=0.5, stride_s=10, vector_period_s=60)
    runner = FeatureRunner(catalogue, spec)
    random = np.random.default_rng(0)
    nan = np.full((spec.vector_frames, 1), np.nan, np.float32)
    state = runner.initial_state(0, 0)
    for _ in range(3):
        window = Window(0.0, random.random((120, 8)).astype(np.float32), nan, nan, 10.0, 1.0)
        values, pooled, state = runner.run(window, state)
    assert np.isfinite(values).all()
    assert pooled.shape == (12, 8)
    assert {s.name for s in runner.state_specs} == {"vehicle_trend", "observed_s"}
    assert runner.state_id != FeatureGraph(catalogue, WindowSpec()).state_id


def test_the_state_id_is_that_of_its_meaning(graph, catalogue, spec):
    assert FeatureGraph(catalogue, spec).state_id == graph.state_id
    assert FeatureGraph(catalogue, WindowSpec(stride_s=30)).state_id == graph.state_id  # the stride is an input
    assert FeatureGraph(catalogue, WindowSpec(period_s=2)).state_id != graph.state_id

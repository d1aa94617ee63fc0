import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract import messages
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.topics import ANOMALY
from edge_agent.pipeline.alerts import alert_message
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import AlertChange, Counted, NoScore, Outcome, Sampled, Scored
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE, PUMP, column, cut, quiet

SPEED, INVERTER = 0, column("inverter_temperature")
FIRST_TYPE = "battery_degradation"  # the tiny bundle's first type: the share of the window with speed above 125 km/h


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    return load_bundle(build_bundle(tmp_path_factory.mktemp("bundle"), CATALOGUE), CATALOGUE)


def pipeline(bundle: LoadedBundle | None, **more: object) -> Pipeline:
    return Pipeline(CATALOGUE, vehicle_id="EV_1", cells=8, probes=4, bundle=bundle, **more)  # type: ignore[arg-type]


def run(target: Pipeline, blocks: list[ArrivalBlock]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for block in blocks:
        outcomes += target.push(block)
    return outcomes + target.flush()


def brief(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """What outcomes say, comparable: arrays as bytes."""
    found: list[tuple[object, ...]] = []
    for o in outcomes:
        if isinstance(o, Scored):
            found.append((o.window.end_s, o.window.values.tobytes(), o.window.cell_voltage.tobytes(), o.stratum,
                          o.scores.features.tobytes(), o.scores.anomaly_score))  # fmt: skip
        elif isinstance(o, NoScore):
            found.append((o.end_s, o.reason, o.detail))
        elif isinstance(o, Counted | Sampled):
            found.append(dataclasses.astuple(o))
        else:
            found.append((o.time_s, o.since_s, o.failure_type, o.transition, o.severity, o.origin, o.rule, o.key))
    return found


def eventful(n: int = 2400) -> ArrivalBlock:
    block = quiet(1.6e9 + np.arange(n))
    block.scalars[:, column("ambient_temperature")] = 0.0
    block.scalars[600:1200, SPEED] = 200.0
    block.scalars[700:900, INVERTER] = 130.0
    block.cell_voltage[np.arange(n) % 10 != 0] = np.nan
    return block


def changes(outcomes: list[Outcome], origin: str = "model") -> list[tuple[str, str, float]]:
    return [
        (o.failure_type, o.transition, o.time_s - 1.6e9)
        for o in outcomes
        if isinstance(o, AlertChange) and o.origin == origin
    ]


def test_telemetry_becomes_windows_scores_alerts_and_their_end(bundle: LoadedBundle) -> None:
    target = pipeline(bundle)
    outcomes = run(target, [eventful()])
    assert changes(outcomes) == [(FIRST_TYPE, "raised", 839.0), (FIRST_TYPE, "cleared", 1679.0)]
    assert changes(outcomes, "guard") == [
        ("inverter_overheating", "raised", 701.0), ("inverter_overheating", "cleared", 960.0),
    ]  # fmt: skip
    times = [
        o.end_s if isinstance(o, NoScore) else o.window.end_s if isinstance(o, Scored) else o.time_s
        for o in outcomes
        if not isinstance(o, Counted | Sampled)
    ]
    assert times == sorted(times)
    assert target.counters["frames"] == 2400
    assert target.counters["windows_scored"] == 36
    assert sum(o.windows for o in outcomes if isinstance(o, Counted)) == 36


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2400), max_size=8))
def test_a_stream_cut_anywhere_has_the_same_outcomes(bundle: LoadedBundle, cuts: list[int]) -> None:
    assert brief(run(pipeline(bundle), cut(eventful(), cuts))) == brief(run(pipeline(bundle), [eventful()]))


def test_row_by_row_as_it_comes_live_has_the_same_outcomes(bundle: LoadedBundle) -> None:
    live = run(pipeline(bundle, horizon_s=0.0), cut(eventful(1500), list(range(1500))))
    assert brief(live) == brief(run(pipeline(bundle), [eventful(1500)]))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_shuffled_within_the_horizon_has_the_same_outcomes(bundle: LoadedBundle, seed: int) -> None:
    block = eventful(1500)
    order = np.argsort(block.time_s + np.random.default_rng(seed).uniform(-0.99, 0.99, 1500), kind="stable")
    assert brief(run(pipeline(bundle), [block.take(order)])) == brief(run(pipeline(bundle), [block]))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2399), st.sampled_from([0.0, 2.0]))
def test_a_restored_snapshot_goes_on_exactly(bundle: LoadedBundle, at: int, horizon_s: float) -> None:
    block = eventful()
    first = pipeline(bundle, horizon_s=horizon_s)
    outcomes = first.push(block.take(slice(0, at)))
    data = first.snapshot()
    second = pipeline(bundle, horizon_s=horizon_s)
    assert second.restore(data)
    assert second.snapshot() == data
    outcomes += run(second, [block.take(slice(at, None))])
    assert brief(outcomes) == brief(run(pipeline(bundle, horizon_s=horizon_s), [block]))
    assert second.counters["frames"] == 2400


def test_a_damaged_or_foreign_snapshot_is_refused_and_counted(bundle: LoadedBundle) -> None:
    good = pipeline(bundle)
    good.push(eventful(700))
    data = good.snapshot()
    other = Pipeline(CATALOGUE, vehicle_id="EV_1", cells=9, probes=4, bundle=bundle).snapshot()
    bad = [b"", b"VWPS", data[:-1], data[:40], b"\x00" + data[1:], data[:4] + b"\x63" + data[5:], other]
    bad += [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(0, len(data), 997)]
    for wrong in bad:
        fresh = pipeline(bundle)
        assert not fresh.restore(wrong)
        assert fresh.counters["snapshot_refused"] == 1
        assert fresh.push(quiet([1.0])) == []


def test_a_model_with_another_state_id_starts_its_own_state_and_keeps_the_rest(
    bundle: LoadedBundle, tmp_path: Path
) -> None:
    block = eventful()
    first = pipeline(bundle)
    first.push(block.take(slice(0, 1000)))
    data = first.snapshot()
    same = load_bundle(build_bundle(tmp_path / "same", CATALOGUE, release=2), CATALOGUE)
    new = load_bundle(build_bundle(tmp_path / "new", CATALOGUE, release=3, state_id="tiny-2"), CATALOGUE)
    inherits, begins = pipeline(same), pipeline(new)
    assert inherits.restore(data)
    assert begins.restore(data)
    assert inherits._model_state["seconds"][0, 0] > 0
    assert begins._model_state["seconds"][0, 0] == 0
    assert begins.counters["model_state_refused"] == 1
    rest = [block.take(slice(1000, None))]
    assert changes(run(begins, rest)) == [(FIRST_TYPE, "cleared", 1679.0)], "the alert that stood is still known"


def test_a_boot_in_between_keeps_the_alert_its_key_and_the_trend(bundle: LoadedBundle) -> None:
    wall = eventful()
    before = ArrivalBlock(wall.time_s - 1.5e9, wall.scalars, wall.cell_voltage, wall.cell_temperature)
    after = ArrivalBlock(wall.time_s - 1.6e9, wall.scalars, wall.cell_voltage, wall.cell_temperature)
    first = pipeline(bundle, horizon_s=0.0, timeline="boot-1")
    outcomes = first.push(before.take(slice(0, 1000)))
    second = pipeline(bundle, horizon_s=0.0, timeline="boot-2")
    assert second.restore(first.snapshot(), shift_s=1.5e9 - 1.6e9)
    outcomes += run(second, [after.take(slice(1000, None))])
    alerts = [o for o in outcomes if isinstance(o, AlertChange) and o.origin == "model"]
    assert [a.transition for a in alerts] == ["raised", "cleared"]
    assert alerts[0].key == alerts[1].key
    assert alerts[0].key.startswith("boot-1/")
    ids = {alert_message(a, vehicle_id="EV_1", manifest=bundle.manifest)[0] for a in alerts}
    assert len(ids) == 1
    assert alerts[1].since_s + 1.6e9 == alerts[0].since_s + 1.5e9
    assert second._model_state["seconds"][0, 0] > first._model_state["seconds"][0, 0]


def test_without_a_bundle_the_guards_still_alarm() -> None:
    target = pipeline(None)
    outcomes = run(target, [eventful()])
    assert [t for _, t, _ in changes(outcomes, "guard")] == ["raised", "cleared"]
    assert target.no_score_reasons == {"no_bundle": 36}


def test_a_bundle_of_the_anomaly_head_alone_alerts_as_anomaly(tmp_path: Path) -> None:
    loaded = load_bundle(build_bundle(tmp_path, PUMP, anomaly_only=True), PUMP)
    nothing = np.empty((120, 0))
    every_ten = ArrivalBlock(np.arange(0, 1200, 10.0), np.ones((120, 2)), nothing, nothing)
    target = Pipeline(PUMP, vehicle_id="P_1", bundle=loaded, period_s=10.0)  # nine frames of ten are missing: score 0.9
    alerts = [o for o in run(target, [every_ten]) if isinstance(o, AlertChange)]
    assert [(a.failure_type, a.transition, a.severity) for a in alerts] == [(ANOMALY, "raised", "medium")]
    assert alerts[0].scores is not None
    assert alerts[0].scores.anomaly_score == pytest.approx(0.9)
    every_one = ArrivalBlock(np.arange(120) * 1.0, np.ones((120, 2)), nothing, nothing)
    assert run(Pipeline(PUMP, vehicle_id="P_1", bundle=loaded), [every_one]) == []


def test_a_block_of_other_widths_is_our_own_fault(bundle: LoadedBundle) -> None:
    with pytest.raises(ValueError, match="widths"):
        pipeline(bundle).push(quiet([0.0], cells=3))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.9))
def test_whatever_arrives_every_message_can_be_encoded(bundle: LoadedBundle, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    block = eventful(900)
    hostile = np.array([np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e-40, 65535.0, -1.0, 0.0])
    for values in (block.scalars, block.cell_voltage, block.cell_temperature):
        spoiled = rng.random(values.shape) < share
        values[spoiled] = rng.choice(hostile, int(spoiled.sum()))
    target = pipeline(bundle)
    for outcome in run(target, [block]):
        if isinstance(outcome, Scored):
            assert np.isfinite(outcome.scores.feature_deviation).all()
            assert not np.isinf(outcome.scores.features).any()
        elif isinstance(outcome, AlertChange):
            _, _, alert = alert_message(outcome, vehicle_id="EV_1", manifest=bundle.manifest)
            assert messages.encode(alert)
    assert sum(target.no_score_reasons.values()) + target.counters["windows_scored"] == 11

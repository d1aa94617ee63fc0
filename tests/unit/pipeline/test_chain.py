import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract import messages
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.samples import unpack
from edge_agent.contract.topics import ANOMALY
from edge_agent.pipeline.alerts import alert_message
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.inference import Scorer
from edge_agent.pipeline.outcomes import AlertChange, Counted, NoScore, Outcome, Sampled, Scored, Scores, Window
from edge_agent.pipeline.sampling import SamplingLimits
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE, PUMP, column, cut, quiet

SPEED, INVERTER = 0, column("inverter_temperature")
FIRST_TYPE = "battery_degradation"  # the tiny bundle's first type: the share of the window with speed above 125 km/h


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    return load_bundle(build_bundle(tmp_path_factory.mktemp("bundle"), CATALOGUE), CATALOGUE)


def pipeline(bundle: LoadedBundle | None, **more: Any) -> Pipeline:
    """One whose counts leave every ten minutes and that samples a fifth of the windows: else a test sees too few."""
    more = {"publish_s": 600.0, "sampling": SamplingLimits(10**8, 0.2), **more}
    return Pipeline(CATALOGUE, vehicle_id="EV_1", cells=8, probes=4, bundle=bundle, **more)


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


def counts(outcomes: list[Outcome]) -> list[Counted]:
    return [o for o in outcomes if isinstance(o, Counted)]


def samples(outcomes: list[Outcome]) -> list[Sampled]:
    return [o for o in outcomes if isinstance(o, Sampled)]


def test_counts_leave_by_the_hour_of_the_source_and_at_its_end_and_add_up_to_the_scored_windows(
    bundle: LoadedBundle,
) -> None:
    target = pipeline(bundle, publish_s=600.0)
    outcomes = run(target, [eventful()])
    found = counts(outcomes)
    assert [(c.first_s - 1.6e9, c.last_s - 1.6e9, c.windows) for c in found] == [
        (299.0, 839.0, 10), (899.0, 1439.0, 10), (1499.0, 2039.0, 10), (2099.0, 2399.0, 6),
    ]  # fmt: skip
    assert target.counters["drift_messages"] == 4
    assert target.counters["drift_windows"] == target.counters["windows_scored"] == 36
    for c in found:
        assert all(sum(v.counts) in (c.windows, 60 * c.windows) for v in c.variables)


def test_a_sample_lets_the_very_features_be_computed_again(bundle: LoadedBundle) -> None:
    outcomes = run(pipeline(bundle), [eventful()])
    scored = {o.window.end_s: o for o in outcomes if isinstance(o, Scored)}
    scorer = Scorer(bundle, CATALOGUE)
    chosen = samples(outcomes)
    assert {s.reason for s in chosen} == {"alert", "random"}
    for sample in chosen:
        raw = unpack(sample.packed)
        window = Window(
            sample.end_s, raw.values, raw.cell_voltage, raw.cell_temperature, sample.elapsed_s, sample.coverage
        )
        again, _ = scorer.score(window, raw.state)
        assert isinstance(again, Scores)
        np.testing.assert_allclose(again.features, scored[sample.end_s].scores.features, rtol=1e-6)
        assert sample.stratum == scored[sample.end_s].stratum


def test_samples_stand_around_the_models_and_the_guards_alerts(bundle: LoadedBundle) -> None:
    chosen = samples(run(pipeline(bundle, sampling=SamplingLimits(10**8, 0.0)), [eventful()]))
    # the guard's alert at 701 s, in the window that ends at 719 s; the model's at 839 s, so soon after it that only its
    # own window is new; 1139 s is the first that does not overlap that
    assert [(s.failure_type, s.end_s - 1.6e9) for s in chosen] == [
        ("inverter_overheating", 719.0), ("inverter_overheating", 299.0), (FIRST_TYPE, 839.0), (FIRST_TYPE, 1139.0),
    ]  # fmt: skip


def test_a_silence_lets_counts_leave_that_the_next_arrival_would_have_brought(bundle: LoadedBundle) -> None:
    block = eventful(1200)
    later = quiet(1.6e9 + 20_000 + np.arange(400))
    told = pipeline(bundle, horizon_s=0.0)
    before = told.push(block)
    newest_s = float(block.time_s[-1])
    assert told.idle(newest_s + 100.0) == [], "no gap yet: the window may still grow"
    left = told.idle(newest_s + 700.0)
    assert counts(left)
    assert told.idle(newest_s + 900.0) == []
    silent = pipeline(bundle, horizon_s=0.0)
    assert sorted(brief(before + left + run(told, [later])), key=repr) == sorted(
        brief(run(silent, [block, later])), key=repr
    )


def test_counts_against_other_bins_are_not_taken_from_a_snapshot(bundle: LoadedBundle, tmp_path: Path) -> None:
    first = pipeline(bundle)
    first.push(eventful(700))
    build_bundle(tmp_path / "new", CATALOGUE, release=2)
    reference = tmp_path / "new" / "drift_reference.json"
    data = reference.read_bytes().replace(b"10.0", b"11.0")
    reference.write_bytes(data)
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_bytes())
    manifest["files"]["drift_reference.json"] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest))
    second = pipeline(load_bundle(tmp_path / "new", CATALOGUE))
    assert second.restore(first.snapshot())
    assert second.counters["drift_windows_refused"] == first.open_counts[0].windows > 0
    assert second.open_counts == ()


def test_without_a_bundle_a_guards_alert_still_brings_its_window() -> None:
    chosen = samples(run(pipeline(None), [eventful()]))
    assert {(s.failure_type, s.reason, s.model_release, s.state_id) for s in chosen} == {
        ("inverter_overheating", "alert", None, "")
    }
    assert 719.0 in {s.end_s - 1.6e9 for s in chosen}

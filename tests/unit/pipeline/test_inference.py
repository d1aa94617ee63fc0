import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.errors import BundleError
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.inference import Scorer
from edge_agent.pipeline.outcomes import NoScore, Scores, Window
from tests.bundles import build_bundle, rewrite_manifest
from tests.telemetry import CATALOGUE, PUMP, quiet


def window(cells: int = 8, probes: int = 4) -> Window:
    block = quiet(range(300), cells=cells, probes=probes)
    return Window(
        299.0,
        block.scalars.astype(np.float32),
        block.cell_voltage[::10].astype(np.float32),
        block.cell_temperature[::10].astype(np.float32),
        60.0,
        1.0,
    )


def scorer(path: Path, **options: object) -> Scorer:
    return Scorer(load_bundle(build_bundle(path, CATALOGUE, **options), CATALOGUE), CATALOGUE)  # type: ignore[arg-type]


def test_a_window_becomes_finite_scores_and_a_next_state(tmp_path: Path) -> None:
    target = scorer(tmp_path)
    state = target.initial_state(8, 4)
    assert state["cells_seen"].shape == (1, 8)
    scores, after = target.score(window(), state)
    assert isinstance(scores, Scores)
    assert scores.type_probability is not None
    assert scores.type_probability.shape == (5,)
    assert scores.severity is not None
    assert scores.severity.shape == (5, 4)
    assert scores.reconstruction_error is not None
    assert scores.reconstruction_error.shape == (len(CATALOGUE.scalars),)
    assert scores.features.shape == scores.feature_deviation.shape == (2,)
    assert scores.worst_cell is None
    assert after["seconds"][0, 0] == 60.0
    assert state["seconds"][0, 0] == 0.0, "the old state is as it was"


def test_signals_are_matched_by_name_in_the_bundles_own_order(tmp_path: Path) -> None:
    names = ("Vehicle.Powertrain.TractionBattery.CurrentVoltage", "Vehicle.Speed")
    scores, _ = scorer(tmp_path, signals=names, failure_types=("battery_degradation", "charging_fault")).score(
        window(), scorer(tmp_path / "again", signals=names).initial_state(8, 4)
    )
    assert isinstance(scores, Scores)
    assert scores.type_probability is not None
    assert scores.type_probability.tolist() == [0.0, 0.0]
    fast = window()
    fast.values[:, CATALOGUE.scalar_index["Vehicle.Speed"]] = 250.0  # above the middle of its range
    target = scorer(tmp_path, signals=names, failure_types=("battery_degradation", "charging_fault"))
    scores, _ = target.score(fast, target.initial_state(8, 4))
    assert isinstance(scores, Scores)
    assert scores.type_probability is not None
    assert scores.type_probability.tolist() == [0.0, 1.0]


def test_a_score_that_is_not_finite_is_no_score_and_the_state_stays(tmp_path: Path) -> None:
    target = scorer(tmp_path, poison=True)
    state = target.initial_state(8, 4)
    answer, after = target.score(window(), state)
    assert isinstance(answer, NoScore)
    assert answer.reason == "not_finite"
    assert "anomaly_score" in answer.detail
    assert after is state


def test_a_window_of_nothing_but_nan_is_answered(tmp_path: Path) -> None:
    target = scorer(tmp_path)
    nothing = window()
    nothing.values[:] = np.nan
    nothing.cell_voltage[:] = np.nan
    answer, _ = target.score(nothing, target.initial_state(8, 4))
    assert isinstance(answer, Scores)
    assert answer.anomaly_score == 1.0


def test_a_vehicle_without_cells_is_scored(tmp_path: Path) -> None:
    target = scorer(tmp_path)
    none = np.full((30, 1), np.nan, np.float32)
    w = window()
    answer, _ = target.score(Window(299.0, w.values, none, none, 60.0, 1.0), target.initial_state(0, 0))
    assert isinstance(answer, Scores)


def test_a_bundle_with_the_anomaly_head_alone_leaves_the_others_none(tmp_path: Path) -> None:
    target = Scorer(load_bundle(build_bundle(tmp_path, PUMP, anomaly_only=True), PUMP), PUMP)
    none = np.full((30, 1), np.nan, np.float32)
    answer, _ = target.score(
        Window(299.0, np.ones((300, 2), np.float32), none, none, 60.0, 1.0), target.initial_state(0, 0)
    )
    assert isinstance(answer, Scores)
    assert answer.type_probability is answer.severity is answer.failure_probability is None
    assert answer.anomaly_score == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"states": []}, "inputs"),
        ({"states": [{"name": "other", "shape": [1, 1]}]}, "inputs"),
        ({"window": {"frames": 200}}, "window is"),
    ],
)
def test_a_graph_that_is_not_its_manifests_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    build_bundle(tmp_path, CATALOGUE)
    rewrite_manifest(tmp_path, **changes)
    loaded = load_bundle(tmp_path, CATALOGUE)
    with pytest.raises(BundleError, match=words):
        Scorer(loaded, CATALOGUE)


def test_a_model_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    loaded = load_bundle(build_bundle(tmp_path, CATALOGUE), CATALOGUE)
    with pytest.raises(BundleError, match="does not load") as caught:
        Scorer(dataclasses.replace(loaded, model_bytes=b"not a model"), CATALOGUE)
    assert "\n" not in str(caught.value)


def test_another_grid_is_scored(tmp_path: Path) -> None:
    spec = WindowSpec(frames=60, period_s=0.5, stride_s=10, vector_period_s=5)
    target = Scorer(load_bundle(build_bundle(tmp_path, PUMP, spec=spec, anomaly_only=True), PUMP), PUMP)
    none = np.full((6, 1), np.nan, np.float32)
    answer, _ = target.score(
        Window(0.0, np.ones((60, 2), np.float32), none, none, 10.0, 1.0), target.initial_state(0, 0)
    )
    assert isinstance(answer, Scores)
    assert answer.anomaly_score == 0.0

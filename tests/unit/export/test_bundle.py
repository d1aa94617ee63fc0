"""A bundle is written whole or not at all, says what it is, and does not survive being altered."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightgbm as lgb
import msgspec
import numpy as np
import pytest

from edge_agent.contract import bundle as contract
from edge_agent.contract.bundle import Thresholds
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES, Catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.drift import DriftCounter
from edge_agent.pipeline.inference import Scorer
from edge_agent.pipeline.outcomes import NoScore, Scored, Scores
from export import __main__ as command
from export import bundle, golden
from export.drift_reference import edges_of

CREATED = "2026-01-01T00:00:00.000Z"


def build(trained, catalogue, output: Path, models: Path | None = None, datasets: Path | None = None, release: int = 1):
    return bundle.build(
        models or trained.models,
        datasets or trained.datasets,
        output,
        catalogue=catalogue,
        release=release,
        created=CREATED,
    )


@pytest.fixture(scope="module")
def built(trained, catalogue, tmp_path_factory):
    return build(trained, catalogue, tmp_path_factory.mktemp("built") / "bundle", release=7)


@pytest.fixture
def copy(trained, tmp_path) -> tuple[Path, Path]:
    return (
        Path(shutil.copytree(trained.models, tmp_path / "models")),
        Path(shutil.copytree(trained.datasets, tmp_path / "datasets")),
    )


def test_a_bundle_has_every_member_and_says_what_it_is(built, graph, catalogue):
    manifest = load_bundle(built.path, catalogue).manifest
    assert {p.name for p in built.path.iterdir()} == {contract.MANIFEST, *contract.MEMBERS}
    assert manifest.release == 7
    assert manifest.created == CREATED
    assert manifest.heads == ("failure", "type", "severity", "anomaly", "cells")
    assert manifest.features == graph.feature_names
    assert manifest.state_id == graph.state_id
    assert [(s.name, s.unit) for s in manifest.signals] == [(s.name, s.unit) for s in catalogue.scalars]
    assert set(manifest.vectors) == {"cell_voltage", "cell_temperature"}
    assert built.sha256 == load_bundle(built.path, catalogue).sha256
    assert all(check.passed for check in built.checks)


def test_the_agents_own_scorer_runs_it_and_carries_the_state(built, catalogue, drive):
    scorer = Scorer(load_bundle(built.path, catalogue), catalogue)
    state, simulated = scorer.initial_state(12, 4), drive(1, "inverter_overheating")
    for k in range(3):
        scores, state = scorer.score(simulated.window(k), state)
        assert isinstance(scores, Scores), scores
    assert scores.type_probability is not None
    assert scores.type_probability.shape == (5,)
    assert state["observed_s"][0] == 300 + 2 * 60


def test_signals_are_found_by_name_in_a_catalogue_of_another_order(built, catalogue, drive):
    turned = Catalogue("turned", tuple(reversed(tuple(catalogue))))
    window = drive(3).window(2)
    one = Scorer(load_bundle(built.path, catalogue), catalogue)
    two = Scorer(load_bundle(built.path, turned), turned)
    other = replace(window, values=window.values[:, [catalogue.scalar_index[n] for n in turned.scalar_names]])
    a, _ = one.score(window, one.initial_state(12, 4))
    b, _ = two.score(other, two.initial_state(12, 4))
    assert isinstance(a, Scores)
    assert isinstance(b, Scores)
    np.testing.assert_array_equal(a.features, b.features)
    assert a.failure_probability == b.failure_probability


def test_golden_vectors_replay_to_the_last_bit_and_cover_gaps_and_carried_states(built, catalogue):
    _, cases, worst = bundle.verify(built.path, catalogue)
    assert cases >= 24
    assert worst == 0.0
    with np.load(built.path / "golden.npz") as stored:
        assert any(np.isnan(stored[f"{k:03d}.in.window"]).all(axis=1).any() for k in range(cases))
        assert any(stored[f"{k:03d}.in.observed_s"][0] > 0 for k in range(cases))


def test_golden_vectors_notice_another_model(built, trained, catalogue, copy, tmp_path):
    """A whole, well hashed bundle whose graph is not the one that its golden vectors were made with."""
    models, _ = copy
    other = lgb.train(
        {"objective": "binary", "verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5, "seed": 1},
        lgb.Dataset(trained.features, np.arange(len(trained.features)) % 2),
        8,
    )
    other.save_model(str(models / "lgbm_failure_predictor.txt"))
    second = build(trained, catalogue, tmp_path / "second", models=models)
    shutil.copy(built.path / "golden.npz", second.path / "golden.npz")
    manifest = json.loads((second.path / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = msgspec.to_builtins(bundle.entry_of((second.path / "golden.npz").read_bytes()))
    (second.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"golden case .* differs"):
        bundle.verify(second.path, catalogue)


@pytest.mark.parametrize("name", [*contract.MEMBERS])
def test_one_flipped_bit_of_any_member_is_refused(built, catalogue, tmp_path, name):
    path = Path(shutil.copytree(built.path, tmp_path / "b"))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        bundle.verify(path, catalogue)


def test_a_missing_member_and_a_mix_of_two_releases_are_refused(built, trained, catalogue, tmp_path):
    second = build(trained, catalogue, tmp_path / "second", release=8)
    path = Path(shutil.copytree(built.path, tmp_path / "b"))
    shutil.copy(second.path / "model_card.md", path / "model_card.md")
    with pytest.raises(BundleError, match="hash does not match"):
        bundle.verify(path, catalogue)
    (path / "model_card.md").unlink()
    with pytest.raises(BundleError, match="is missing"):
        bundle.verify(path, catalogue)


def test_the_same_models_give_the_same_bytes(built, trained, catalogue, tmp_path):
    again = build(trained, catalogue, tmp_path / "again", release=7)
    assert again.sha256 == built.sha256


def test_building_again_replaces_the_bundle_and_leaves_nothing_beside_it(trained, catalogue, tmp_path):
    first = build(trained, catalogue, tmp_path / "bundle", release=1)
    second = build(trained, catalogue, tmp_path / "bundle", release=2)
    assert first.sha256 != second.sha256
    assert bundle.verify(tmp_path / "bundle", catalogue)[0].release == 2
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_failed_parity_writes_nothing_and_keeps_the_bundle_that_was_there(trained, catalogue, tmp_path, monkeypatch):
    build(trained, catalogue, tmp_path / "bundle", release=1)
    monkeypatch.setattr("export.parity.INT8_MEAN_LIMIT", 1e-12)
    with pytest.raises(BundleError, match="parity failed: autoencoder in int8"):
        build(trained, catalogue, tmp_path / "bundle", release=2)
    assert bundle.verify(tmp_path / "bundle", catalogue)[0].release == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_keeps_the_bundle_that_was_there(trained, catalogue, tmp_path, monkeypatch):
    build(trained, catalogue, tmp_path / "bundle", release=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="cannot be written"):
        build(trained, catalogue, tmp_path / "bundle", release=2)
    monkeypatch.undo()
    assert bundle.verify(tmp_path / "bundle", catalogue)[0].release == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(trained, catalogue, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match="no bundle"):
        build(trained, catalogue, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "name",
    ["dataset.json", "normalization_stats.json", "golden_windows.npz", "signal_sample.parquet", "train_full.parquet"],
)
def test_a_missing_or_broken_dataset_file_is_one_line(trained, catalogue, copy, tmp_path, name):
    _, datasets = copy
    (datasets / name).write_bytes(b"PAR1 broken")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")) as refused:
        build(trained, catalogue, tmp_path / "bundle", datasets=datasets)
    assert "\n" not in str(refused.value)
    (datasets / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        build(trained, catalogue, tmp_path / "bundle", datasets=datasets)
    assert not (tmp_path / "bundle").exists()


def test_a_type_never_seen_in_training_cannot_alarm(built, catalogue):
    thresholds = load_bundle(built.path, catalogue).thresholds
    assert set(thresholds.policy.types) == set(FAILURE_TYPES)
    assert thresholds.policy.types["charging_fault"].raise_at > 1
    assert thresholds.policy.types["motor_bearing_wear"].raise_at == 0.8
    assert "charging_fault | never" in (built.path / "model_card.md").read_text()


def test_a_trained_type_without_a_threshold_is_refused(trained, catalogue, copy, tmp_path):
    models, _ = copy
    thresholds = msgspec.json.decode((models / "thresholds.json").read_bytes(), type=Thresholds)
    policy = msgspec.structs.replace(thresholds.policies["budget"], types={})
    poor = msgspec.structs.replace(thresholds, policies={"budget": policy})
    (models / "thresholds.json").write_bytes(msgspec.json.encode(poor))
    with pytest.raises(BundleError, match="has no threshold for"):
        build(trained, catalogue, tmp_path / "bundle", models=models)


def test_a_bundle_of_the_anomaly_detector_alone(trained, catalogue, copy, tmp_path, drive):
    models, _ = copy
    for path in (*models.glob("lgbm_*.txt"), models / "calibration.json"):
        path.unlink()
    built = build(trained, catalogue, tmp_path / "bundle", models=models)
    assert built.manifest.heads == ("anomaly", "cells")
    loaded = load_bundle(built.path, catalogue)
    scores, _ = Scorer(loaded, catalogue).score(drive(0).window(0), Scorer(loaded, catalogue).initial_state(12, 4))
    assert not isinstance(scores, NoScore)
    assert scores.type_probability is None
    assert scores.anomaly_score is not None


def test_drift_is_counted_on_the_vehicle_against_the_very_bins_of_the_reference(built, catalogue, drive):
    loaded = load_bundle(built.path, catalogue)
    manifest = loaded.manifest
    scorer = Scorer(loaded, catalogue)
    counter = DriftCounter(
        loaded.drift_reference, catalogue, features=manifest.features, failure_types=manifest.failure_types
    )
    window = drive(2).window(1)
    scores, _ = scorer.score(window, scorer.initial_state(12, 4))
    assert isinstance(scores, Scores)
    counter.add(Scored(window, scores, "driving"))
    (taken,) = counter.take()
    reference = {v.name: v for v in loaded.drift_reference.variables}
    assert {v.name for v in taken.variables} == set(reference)
    assert {"failure_probability", "anomaly_score", "type_probability.motor_bearing_wear"} <= set(reference)
    for variable in taken.variables:
        assert len(variable.counts) == len(reference[variable.name].edges) + 2
        assert sum(variable.counts) == (60 if reference[variable.name].kind == "signal" else 1)
    speed = reference["Vehicle.Speed"].counts["driving"]
    assert max(speed[:-1]) < 2 * np.mean(speed[:-1])  # deciles: bins are filled alike


def test_bins_see_a_signal_of_few_states_and_one_that_was_constant():
    assert len(edges_of(np.array([0.0, 1.0, 1.0, 0.0]))) == 3
    low, high = edges_of(np.full(50, 3.5))
    assert low < 3.5 < high
    assert len(edges_of(np.random.default_rng(0).normal(size=500))) == 9
    assert edges_of(np.full(5, np.nan)) == (0.0,)


def test_the_card_says_what_it_was_trained_on_and_what_it_cannot_do(built, trained, catalogue, copy, tmp_path):
    card = (built.path / "model_card.md").read_text()
    for words in ("train: 6 vehicles", "split by vehicle", "## Limits", "without any precursor", "Not evaluated yet"):
        assert words in card
    models, _ = copy
    (models / "evaluation_report.json").write_text(json.dumps({"failure": {"event_recall": 0.875, "curve": [1, 2]}}))
    second = build(trained, catalogue, tmp_path / "bundle", models=models)
    assert "failure.event_recall: 0.875" in (second.path / "model_card.md").read_text()


def test_the_card_says_where_the_budget_is_exceeded_and_where_severity_is_no_better_than_a_constant(
    trained, catalogue, copy, tmp_path
):
    models, _ = copy
    thresholds = json.loads((models / "thresholds.json").read_text())
    thresholds["policies"]["budget"]["measured"] = {"motor_bearing_wear.budget_kept": 0.0, "failure.budget_kept": 1.0}
    (models / "thresholds.json").write_text(json.dumps(thresholds))
    graded = {"accuracy": 0.25, "mean_steps": 0.95, "beats_majority": False}
    constant = {"level": "critical", "accuracy": 0.45, "mean_steps": 1.22}
    (models / "evaluation_report.json").write_text(json.dumps({"severity": {**graded, "majority": constant}}))
    card = (build(trained, catalogue, tmp_path / "bundle", models=models).path / "model_card.md").read_text()
    assert "| motor_bearing_wear | 0.800 | 0.500 | **exceeded** |" in card
    assert "| inverter_overheating | 0.800 | 0.500 | not measured |" in card
    assert "| failure | 0.800 | | kept |" in card
    assert (
        "does **not** beat always saying 'critical' in both: 0.25 against 0.45 exact, 0.95 against 1.22 levels" in card
    )
    assert "on the validation vehicles:" not in card, "boosters are also measured on cross-fitted training vehicles"


def test_the_default_configuration_does_not_depend_on_where_the_command_is_started(
    built, tmp_path, monkeypatch, capsys
):
    (tmp_path / "cloud").mkdir()
    (tmp_path / "cloud" / "config.json").write_text('{"schema": "nowhere.json"}')
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "verify", str(built.path))
    assert (code, err) == (0, "")
    assert "is whole" in out


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: importing torch anew for each would take seconds."""
    code = 0
    before, sys.argv = sys.argv, ["model-export", *arguments]
    try:
        command.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err


def test_build_prints_sizes_and_parity_and_verify_says_whole(trained, tmp_path, capsys):
    models, datasets, path = str(trained.models), str(trained.datasets), str(tmp_path / "b")
    code, out, err = run(
        capsys, "build", "--models", models, "--datasets", datasets, "--output", path, "--release", "4"
    )
    assert (code, err) == (0, "")
    assert "failure predictor, largest difference of probability" in out
    assert "model.onnx" in out
    assert "release 4" in out
    code, out, err = run(capsys, "verify", path)
    assert (code, err) == (0, "")
    assert "is whole" in out


def test_a_fault_of_the_user_is_one_line_and_an_exit_code(trained, tmp_path, capsys):
    code, out, err = run(capsys, "build", "--models", str(tmp_path / "none"), "--datasets", str(trained.datasets))
    assert (code, out) == (65, "")
    assert err.startswith("model-export: error: ")
    assert err.count("\n") == 1
    code, _, err = run(capsys, "verify", str(tmp_path / "none"))
    assert code == 65
    assert err.count("\n") == 1
    code, _, err = run(capsys, "verify", str(tmp_path), "--schema", str(tmp_path / "no.json"))
    assert code == 78
    assert "no.json: cannot be read" in err


def test_the_command_helps_without_loading_torch():
    program = "import sys; from export.commands import app; assert 'torch' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_golden_windows_must_be_enough(tmp_path):
    np.savez(tmp_path / "g.npz", window_000=np.zeros((3, 3), np.float32))
    with pytest.raises(BundleError, match=r"g\.npz"):
        golden.read_windows(tmp_path / "g.npz")

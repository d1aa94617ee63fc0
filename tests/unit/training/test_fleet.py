"""A small simulated fleet with labels: prepare → train → evaluate, and what the files promise."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from cloud.training import failure
from cloud.training.config import DEFAULT_CONFIG, load_catalogue, load_config, load_mapping
from cloud.training.dataset import GOLDEN_WINDOWS, NORMALISATION, read_info, read_split
from cloud.training.evaluate import evaluate_models
from cloud.training.failure import (
    FAILURE,
    balanced_weight,
    targets,
    train_heads,
    typical_rounds,
    usable_features,
    vehicle_folds,
)
from cloud.training.prepare import prepare_dataset
from cloud.training.report import HTML_FILE, JSON_FILE, render, summary, write_report
from cloud.training.severity import severity_weights, train_severity
from cloud.training.split import SPLITS, TEST, TRAIN, VALIDATION
from cloud.training.train import train_models
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES
from firmware_sim import fleet


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    spec = fleet.FleetSpec(vehicles=36, days=2, hours=0.6, seed=11, faulty=0.6)
    fleet.generate(spec, folder / "raw", workers=1, on_progress=lambda vehicles, frames: None)
    config = load_config(DEFAULT_CONFIG)
    catalogue = load_catalogue(config, DEFAULT_CONFIG)
    mapping, _ = load_mapping(config, DEFAULT_CONFIG)
    with ThreadPoolExecutor(2) as executor:
        prepare_dataset(
            folder / "raw", folder / "datasets", config=config, catalogue=catalogue, mapping=mapping,
            executor=executor, on_vehicle=lambda done, total: None,
        )  # fmt: skip
    train_models(folder / "datasets", folder / "models", config=config, catalogue=catalogue, on_step=lambda *_: None)
    return folder, config, catalogue


def test_no_vehicle_has_windows_in_two_splits(trained):
    folder, *_ = trained
    info = read_info(folder / "datasets")
    vehicles = [set(read_split(folder / "datasets", split, info).vehicle.tolist()) for split in SPLITS]
    assert all(vehicles)
    assert not (vehicles[0] & vehicles[1])
    assert not (vehicles[0] & vehicles[2])
    assert not (vehicles[1] & vehicles[2])


def test_training_writes_the_files_the_runbook_names(trained):
    folder, *_ = trained
    models = {p.name for p in (folder / "models").iterdir()}
    assert {
        "lgbm_failure_predictor.txt",
        "lgbm_severity_classifier.txt",
        "lstm_ae_best.pt",
        "thresholds.json",
    } <= models
    assert {f"lgbm_type_{t}.txt" for t in FAILURE_TYPES} <= models
    record = json.loads((folder / "models" / "training.json").read_text())
    assert record["seed"] == 20260101
    assert record["data_sha256"] == read_info(folder / "datasets").data_sha256
    assert set(record["heads"]) == {FAILURE, *FAILURE_TYPES}


def test_training_meets_fresh_sudden_slow_and_incomplete_vehicles(trained):
    folder, *_ = trained
    info = read_info(folder / "datasets")
    assert set(read_split(folder / "datasets", TRAIN, info).variant.tolist()) >= {"natural", "decimated", "dropped"}
    assert set(read_split(folder / "datasets", TEST, info).variant.tolist()) >= {"natural", "fresh"}


def test_the_drift_reference_is_given_what_vehicles_see_with_their_state_carried(trained):
    """Every natural training window once; the same but for the slow state, which training empties in some sessions."""
    folder, *_ = trained
    info = read_info(folder / "datasets")
    train = read_split(folder / "datasets", TRAIN, info)
    natural = train.variant == "natural"
    table = pq.read_table(folder / "datasets" / "feature_sample.parquet")
    assert list(zip(table["vehicle_id"].to_pylist(), table["end_s"].to_pylist(), strict=True)) == list(
        zip(train.vehicle[natural].tolist(), train.end_s[natural].tolist(), strict=True)
    )
    assert table["healthy"].to_pylist() == train.healthy[natural].tolist()
    carried = np.array(table["features"].to_pylist(), np.float32)
    differ = ~np.isclose(carried, train.features[natural], rtol=1e-4, atol=1e-5, equal_nan=True).all(axis=0)
    names = [name for name, other in zip(info.features, differ, strict=True) if other]
    assert any(name.endswith(".24h") for name in names)
    assert not any(name.startswith("Vehicle.") for name in names)
    sample = pq.read_table(folder / "datasets" / "signal_sample.parquet")
    assert set(sample["vehicle_id"].to_pylist()) == set(train.vehicle.tolist())
    assert {"end_s", "healthy", "stratum"} <= set(sample.column_names)


def test_validation_and_test_windows_can_all_be_scored(trained):
    folder, *_ = trained
    test = read_split(folder / "datasets", TEST, read_info(folder / "datasets"))
    assert len(test.pooled_row) == len(test)
    assert not np.isinf(test.features).any()


def test_golden_windows_are_enough_and_hold_missing_values(trained):
    folder, *_ = trained
    golden = np.load(folder / "datasets" / GOLDEN_WINDOWS)
    windows = [name for name in golden.files if name.startswith("window_")]
    assert len(windows) >= 24
    assert any(np.isnan(golden[name]).any() for name in windows)


def test_the_report_is_strict_json_with_baselines_a_coin_and_the_runbook_on_the_same_split(trained):
    folder, config, catalogue = trained
    report = evaluate_models(
        folder / "datasets", folder / "models", config=config, catalogue=catalogue, on_step=lambda *_: None
    )
    write_report(report, folder / "report")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the report")

    read = json.loads((folder / "report" / JSON_FILE).read_text(), parse_constant=refuse)
    methods = {row["method"] for row in read["rows"] if row["target"] == FAILURE}
    assert {"PCA residual", "isolation forest", "hand-written rule", "random", "runbook: LightGBM"} <= methods
    for row in read["rows"]:
        if row["kind"] in {"model", "baseline"}:
            assert row["prevalence"] is not None
            assert row["pr_auc"]["low"] is None or row["pr_auc"]["low"] <= row["pr_auc"]["value"] + 1e-9
    assert any("Only" in note and "test vehicles have a failure" in note for note in read["notes"])
    page = (folder / "report" / HTML_FILE).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page


def test_severity_stands_beside_the_majority_class(trained):
    folder, config, catalogue = trained
    report = evaluate_models(
        folder / "datasets", folder / "models", config=config, catalogue=catalogue, on_step=lambda *_: None
    )
    ours, constant = report["severity"], report["severity"]["majority"]
    true = np.array(ours["confusion"]).sum(axis=1)
    assert constant["level"] == SEVERITIES[true.argmax()]
    assert constant["accuracy"] == pytest.approx(true.max() / true.sum())
    better = ours["accuracy"] > constant["accuracy"] and ours["mean_steps"] < constant["mean_steps"]
    assert ours["beats_majority"] is better
    for text in ("\n".join(summary(report)), render(report)):
        assert f"severity, always {constant['level']}" in text
        assert ("does not beat it" in text) is not better
    worse = {**ours, "beats_majority": False}
    assert "does not beat it" in render({**report, "severity": worse})


def test_severity_weighs_vehicles_equally_and_its_rounds_have_a_floor(trained):
    folder, config, _ = trained
    info = read_info(folder / "datasets")
    train = read_split(folder / "datasets", TRAIN, info)
    visible = train.take(train.severity_index >= 0)
    weight = severity_weights(visible)
    by_vehicle = [weight[visible.vehicle == v].sum() for v in set(visible.vehicle.tolist())]
    assert max(by_vehicle) == pytest.approx(min(by_vehicle))
    booster, rounds = train_severity(train, info.features, config=config.lightgbm, seed=1)
    assert rounds == booster.current_iteration() >= config.lightgbm.rounds // 8


def test_no_fold_chooses_the_rounds_its_own_margins_are_taken_at(trained, monkeypatch):
    folder, config, _ = trained
    info = read_info(folder / "datasets")
    train, validation = (read_split(folder / "datasets", s, info) for s in (TRAIN, VALIDATION))
    asked: list[list[int]] = []
    own = typical_rounds

    def record(best, lightgbm):
        asked.append(list(best))
        return own(best, lightgbm)

    monkeypatch.setattr(failure, "typical_rounds", record)
    small = msgspec.structs.replace(config.lightgbm, rounds=16, early_stopping_rounds=3)
    train_heads(
        train, validation, info.features, config=small, calibration=config.calibration, seed=1, on_head=lambda _: None
    )
    *folds, everything = asked[:5]
    assert [sorted([*fold, best]) for fold, best in zip(folds, everything, strict=True)] == [sorted(everything)] * 4


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_dataset_without_its_normalisation_is_one_clear_line(trained, tmp_path, command):
    folder, *_ = trained
    shutil.copytree(folder / "datasets", tmp_path / "datasets")
    shutil.copytree(folder / "models", tmp_path / "models")
    (tmp_path / "datasets" / NORMALISATION).unlink()
    arguments = {"train": "--output", "evaluate": "--models"}
    done = fleet_cloud(command, "--data", tmp_path / "datasets", arguments[command], tmp_path / "models")
    assert done.returncode == 66
    assert "Traceback" not in done.stderr
    assert f"fleet-cloud: error: dataset {tmp_path / 'datasets' / NORMALISATION}: cannot be read" in done.stderr
    assert (tmp_path / "models" / "thresholds.json").exists(), "old models go only once the dataset can be read"


@pytest.mark.parametrize(("command", "given", "kind"), [("prepare", "--input", "raw"), ("train", "--data", "datasets")])
def test_an_output_that_cannot_be_made_is_one_clear_line(trained, tmp_path, command, given, kind):
    folder, *_ = trained
    (tmp_path / "file").write_text("in the way")
    done = fleet_cloud(command, given, folder / kind, "--output", tmp_path / "file" / "out")
    assert done.returncode == 78
    assert "Traceback" not in done.stderr
    assert f"fleet-cloud: error: output {tmp_path / 'file' / 'out'}: cannot be made: Not a directory" in done.stderr


def fleet_cloud(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloud", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_head_looks_only_at_its_own_part_of_the_vehicle(trained):
    folder, config, _ = trained
    names = read_info(folder / "datasets").features
    bearing = {names[i] for i in np.flatnonzero(usable_features(names, config.lightgbm, "motor_bearing_wear"))}
    assert "vibration_per_krpm_g" in bearing
    assert not any("nsulation" in name or "CellVoltage" in name for name in bearing)
    model = (folder / "models" / "lgbm_type_motor_bearing_wear.txt").read_text()
    split_on = {
        names[int(i)] for line in model.splitlines() if line.startswith("split_feature=")
        for i in line.partition("=")[2].split()
    }  # fmt: skip
    assert split_on <= bearing
    assert usable_features(("a", "b"), config.lightgbm, "motor_bearing_wear").all()


def test_folds_and_weights_are_by_vehicle(trained):
    folder, config, _ = trained
    train = read_split(folder / "datasets", TRAIN, read_info(folder / "datasets"))
    positive, used = targets(train, FAILURE)
    fold = vehicle_folds(train, positive, 4, seed=1)
    assert all(len(set(fold[train.vehicle == v].tolist())) == 1 for v in set(train.vehicle.tolist()))
    weight = balanced_weight(train, positive, used, config.lightgbm.severity_weight)
    assert weight[positive].sum() == pytest.approx(weight[used & ~positive].sum())
    assert not weight[~used].any()
    by_vehicle = {v: weight[positive & (train.vehicle == v)].sum() for v in set(train.vehicle[positive].tolist())}
    assert max(by_vehicle.values()) == pytest.approx(min(by_vehicle.values()))

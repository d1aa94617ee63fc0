"""Another schema, no labels: the anomaly detector alone, from raw Parquet to the report page."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud.training.config import DEFAULT_CONFIG, load_config
from cloud.training.dataset import read_info, read_split
from cloud.training.evaluate import evaluate_models
from cloud.training.prepare import prepare_dataset
from cloud.training.report import summary, write_report
from cloud.training.scoring import Heads
from cloud.training.split import FILES, TEST
from cloud.training.train import train_models
from edge_agent.contract.bundle import parse_thresholds
from edge_agent.contract.errors import SourceError
from edge_agent.contract.mapping import parse_mapping
from edge_agent.contract.signals import default_catalogue, parse_schema

SENSORS = [f"Pump.Sensor{i}" for i in range(8)]
CATALOGUE = parse_schema(
    json.dumps(
        {
            "schema_name": "pump",
            "signals": [{"name": n, "unit": "bar", "min": -1e3, "max": 1e3, "max_age_s": 5} for n in SENSORS],
        }
    ),
    "pump",
)
MAPPING = parse_mapping(
    '[source]\n[source.time]\ncolumn = "time"\n' + "".join(f'[signals."{n}"]\ncolumn = "{n}"\n' for n in SENSORS),
    "pump",
)


@pytest.fixture(scope="module")
def pump(tmp_path_factory):
    """Six pumps whose sensors follow one load; a dataset and models of them."""
    folder = tmp_path_factory.mktemp("pump")
    (folder / "raw").mkdir()
    for number in range(6):
        random = np.random.default_rng(number)
        seconds = np.arange(3600)
        load = np.sin(seconds / 200 + number)[:, None]
        values = load * np.linspace(0.5, 2, 8) + random.normal(0, 0.1, (3600, 8))
        columns = {n: values[:, i].astype(np.float32) for i, n in enumerate(SENSORS)}
        pq.write_table(pa.table({"time": 1.7e9 + seconds, **columns}), folder / "raw" / f"P{number}.parquet")
    config = load_config(DEFAULT_CONFIG)
    with ThreadPoolExecutor(1) as executor:
        prepare_dataset(
            folder / "raw", folder / "datasets", config=config, catalogue=CATALOGUE, mapping=MAPPING,
            executor=executor, on_vehicle=lambda done, total: None,
        )  # fmt: skip
    train_models(folder / "datasets", folder / "models", config=config, catalogue=CATALOGUE, on_step=lambda *_: None)
    return folder, config


def test_data_without_labels_trains_the_anomaly_detector_alone(pump):
    folder, _ = pump
    assert (folder / "models" / "lstm_ae_best.pt").exists()
    assert not list((folder / "models").glob("lgbm_*"))
    thresholds = parse_thresholds((folder / "models" / "thresholds.json").read_bytes(), "models")
    assert thresholds.policy.types == {}
    assert thresholds.policy.anomaly > 0


def test_a_sensor_that_leaves_the_others_scores_higher_than_nearly_all_healthy_windows(pump):
    folder, _ = pump
    info = read_info(folder / "datasets")
    test = read_split(folder / "datasets", TEST, info)
    heads = Heads(folder / "models", folder / "datasets", CATALOGUE)
    healthy = heads.score(test).anomaly
    test.pooled[:, :, 3] = -test.pooled[:, :, 3]
    assert np.median(heads.score(test).anomaly) > 2 * np.quantile(healthy, 0.9)


def test_the_report_of_unlabelled_data_has_no_invented_figures(pump):
    folder, config = pump
    report = evaluate_models(
        folder / "datasets", folder / "models", config=config, catalogue=CATALOGUE, on_step=lambda *_: None
    )
    assert all(
        row["f1"] is None and row["roc_auc"]["value"] is None for row in report["rows"] if row["kind"] == "model"
    )
    assert any("no failure labels" in note for note in report["notes"])
    page = write_report(report, folder / "report").read_text()
    assert "nan" not in page.lower().replace("anomaly", "").split("<svg")[0]
    assert summary(report)


def test_the_datasets_bytes_do_not_depend_on_the_executor(pump, tmp_path):
    folder, config = pump
    with ThreadPoolExecutor(3) as executor:
        prepare_dataset(
            folder / "raw", tmp_path, config=config, catalogue=CATALOGUE, mapping=MAPPING, executor=executor,
            on_vehicle=lambda done, total: None,
        )  # fmt: skip
    for name in (*FILES.values(), "dataset.json", "normalization_stats.json"):
        assert (tmp_path / name).read_bytes() == (folder / "datasets" / name).read_bytes()


def test_models_of_another_schema_are_refused_in_one_line(pump, tmp_path):
    folder, config = pump
    with pytest.raises(SourceError, match="was prepared for schema 'pump'"):
        train_models(
            folder / "datasets", tmp_path, config=config, catalogue=default_catalogue(), on_step=lambda *_: None
        )


def test_a_folder_that_is_no_dataset_says_what_makes_one(tmp_path):
    with pytest.raises(SourceError, match="fleet-cloud prepare"):
        read_info(tmp_path)

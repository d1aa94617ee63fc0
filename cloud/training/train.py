"""A dataset in, a models folder out: boosters, severity, autoencoder, calibration, thresholds, and how it came about.

Reads from top to bottom. A dataset without labels trains the anomaly detector alone; files of heads that are not
trained are removed, so that a folder never mixes two runs.
"""

import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud.training import anomaly
from cloud.training.config import TrainingConfig
from cloud.training.dataset import (
    DatasetInfo,
    Windows,
    make_folder,
    read_info,
    read_normalisation,
    read_split,
    read_split_episodes,
)
from cloud.training.failure import FAILURE, Head, train_heads
from cloud.training.scoring import Heads
from cloud.training.severity import train_severity
from cloud.training.split import TRAIN, VALIDATION
from cloud.training.thresholds import choose_thresholds, scored_heads
from edge_agent.contract.bundle import Thresholds
from edge_agent.contract.errors import SourceError
from edge_agent.contract.signals import FAILURE_TYPES, Catalogue
from export.calibration import Calibrator
from export.graph import AUTOENCODER_FILE, CALIBRATION_FILE, FAILURE_FILE, SEVERITY_FILE, TYPE_FILE

THRESHOLDS_FILE = "thresholds.json"
TRAINING_FILE = "training.json"
VERSIONS = ("voltwatch", "numpy", "lightgbm", "torch", "onnx", "onnxruntime")

Step = Callable[[str, float], None]  # told what is being done, and which share of the whole is behind us


def train_models(
    datasets: Path, models: Path, *, config: TrainingConfig, catalogue: Catalogue, on_step: Step
) -> Thresholds:
    """Train everything the dataset allows and write the models folder; returns the thresholds.

    Raises `SourceError` where the dataset is missing, damaged, of another schema, or has no healthy window, and
    `ConfigError` where `models` cannot be made.
    """
    info = read_info(datasets)
    if info.signals != catalogue.scalar_names:
        raise SourceError(
            f"dataset {datasets}: was prepared for schema {info.schema_name!r}, this run's is {catalogue.name!r}; "
            f"run `fleet-cloud prepare` again, or give the same --schema"
        )
    normal = read_normalisation(datasets)["signals"]  # before minutes of work, and before old models go
    make_folder(models)
    for path in (*models.glob("lgbm_*.txt"), models / CALIBRATION_FILE, models / THRESHOLDS_FILE):
        path.unlink(missing_ok=True)

    on_step("reading windows", 0.0)
    train = read_split(datasets, TRAIN, info)
    validation = read_split(datasets, VALIDATION, info)

    heads: list[Head] = []
    severity_rounds: int | None = None
    if info.labelled and train.failure.any():
        on_step("failure predictor", 0.05)
        share = {name: 0.05 + 0.06 * (i + 1) for i, name in enumerate((FAILURE, *FAILURE_TYPES))}
        heads = train_heads(
            train,
            validation,
            info.features,
            config=config.lightgbm,
            calibration=config.calibration,
            seed=config.seed,
            on_head=lambda name: on_step(f"trained {name}", share[name]),
        )
        _write_boosters(heads, models)
        trained = train_severity(train, info.features, config=config.lightgbm, seed=config.seed)
        if trained is not None:
            booster, severity_rounds = trained
            booster.save_model(str(models / SEVERITY_FILE), num_iteration=severity_rounds)

    on_step("autoencoder", 0.45)
    autoencoder = _train_autoencoder(train, validation, (datasets, models), (info, config), normal, on_step)

    on_step("thresholds", 0.85)
    scores = Heads(models, datasets, catalogue).score(validation)
    thresholds = choose_thresholds(
        scored_heads(train, validation, scores, heads),
        read_split_episodes(datasets, TRAIN) | read_split_episodes(datasets, VALIDATION),
        config.thresholds,
    )
    (models / THRESHOLDS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(thresholds), indent=1) + b"\n")
    _write_record(models, (info, config), heads, severity_rounds, autoencoder)
    on_step("done", 1.0)
    return thresholds


def _write_boosters(heads: list[Head], models: Path) -> None:
    types: dict[str, Calibrator] = {}
    calibration: dict[str, Any] = {"failure": None, "types": types}
    for head in heads:
        if head.name == FAILURE:
            head.booster.save_model(str(models / FAILURE_FILE), num_iteration=head.rounds)
            calibration["failure"] = head.calibrator
        else:
            head.booster.save_model(str(models / TYPE_FILE.format(head.name)), num_iteration=head.rounds)
            types[head.name] = head.calibrator
    (models / CALIBRATION_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")


def _train_autoencoder(
    train: Windows,
    validation: Windows,
    folders: tuple[Path, Path],
    run: tuple[DatasetInfo, TrainingConfig],
    stats: dict[str, dict[str, float]],
    on_step: Step,
) -> anomaly.Trained:
    (datasets, models), (info, config) = folders, run
    healthy = anomaly.healthy_pooled(train, config.preparation.pooled_train_windows, config.seed)
    if len(healthy) == 0:
        raise SourceError(f"dataset {datasets}: has no healthy training window; the anomaly detector needs some")
    trained = anomaly.train_autoencoder(
        healthy,
        anomaly.healthy_pooled(validation, config.preparation.pooled_train_windows // 2, config.seed),
        mean=np.array([stats[name]["mean"] for name in info.signals]),
        std=np.array([stats[name]["std"] for name in info.signals]),
        config=config.autoencoder,
        seed=config.seed,
        on_epoch=lambda done, loss: on_step(f"autoencoder, validation loss {loss:.3f}", 0.45 + 0.4 * done),
    )
    anomaly.save(trained, models / AUTOENCODER_FILE, config.autoencoder, info.pooled_shape[0], info.signals)
    return trained


def _write_record(
    models: Path,
    run: tuple[DatasetInfo, TrainingConfig],
    heads: list[Head],
    severity_rounds: int | None,
    autoencoder: anomaly.Trained,
) -> None:
    """`training.json`: enough to know what made these files, and to make them again."""
    info, config = run
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "data_sha256": info.data_sha256,
        "state_id": info.state_id,
        "features_sha256": info.features_sha256,
        "schema_name": info.schema_name,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "config": config,
        "split": info.split,
        "heads": {
            head.name: {
                "rounds": head.rounds,
                "features": head.features,
                "training_vehicles": head.training_vehicles,
                "validation_vehicles": head.validation_vehicles,
                "calibration": head.calibrator.method,
            }
            for head in heads
        },
        "severity": {"rounds": severity_rounds},
        "autoencoder": {
            "windows": autoencoder.windows,
            "best_epoch": autoencoder.best_epoch,
            "training_loss": autoencoder.training_loss,
            "validation_loss": autoencoder.validation_loss,
        },
    }
    (models / TRAINING_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def _commit() -> str | None:
    """Commit of the checkout this code runs from; None where it is not one, or git is not there."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None

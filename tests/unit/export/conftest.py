"""Small but real models for the tests of the export: a few vehicles, real boosters, a really trained autoencoder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightgbm as lgb
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from edge_agent.contract.bundle import Decision, Policy, Thresholds, TypeThreshold, WindowSpec
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, Catalogue, default_catalogue
from edge_agent.pipeline.outcomes import Window
from export import autoencoder
from export.autoencoder import Autoencoder
from export.features import FeatureGraph, FeatureRunner, export_features

VEHICLES, WINDOWS = 10, 40
SPLIT = ("train",) * 6 + ("val",) * 2 + ("test",) * 2


@dataclass(frozen=True)
class Trained:
    """Folders as training leaves them, and what the tests compare with."""

    models: Path
    datasets: Path
    features: npt.NDArray[np.float32]  # [W, F] of the training vehicles
    pooled: npt.NDArray[np.float32]  # [W, P, S]


class Drive:
    """Windows of one simulated vehicle: an ordinary drive, with a fault that grows where there is one."""

    def __init__(self, catalogue: Catalogue, seed: int, fault: str = "", cells: int = 12, probes: int = 4) -> None:
        self.catalogue, self.fault = catalogue, fault
        self.random = np.random.default_rng(seed)
        self.cells, self.probes = cells, probes
        self.cell_offset = self.random.normal(0, 0.004, cells)
        self.mid = (catalogue.scalar_min + catalogue.scalar_max) / 2
        self.width = catalogue.scalar_max - catalogue.scalar_min

    def window(self, k: int, frames: int = 300, rows: int = 30) -> Window:
        """Return the k-th window."""
        random, share = self.random, k / WINDOWS
        t = np.arange(frames) / frames
        load = np.clip(np.cumsum(random.normal(0, 8, frames)), -150, 60)
        values = self.mid + self.width * 0.01 * random.normal(0, 1, (frames, len(self.mid)))
        put = {
            "speed": 50 + 30 * np.sin(9 * t + k),
            "pack_current": load,
            "pack_voltage": 370 + 0.08 * load + random.normal(0, 0.05, frames),
            "ambient_temperature": np.full(frames, 18.0),
            "state_of_charge": np.linspace(70, 69, frames) - k,
            "battery_temperature_max": 24 + t,
            "battery_temperature_min": 22 + t,
            "coolant_temperature": np.full(frames, 30.0),
            "motor_torque": load * 1.5,
            "motor_speed": 4000 + 2000 * np.sin(9 * t + k),
            "inverter_temperature": 40 + 0.001 * load**2,
            "motor_temperature": 50 + 0.001 * load**2,
            "vibration_rms": 0.08 + 0.01 * random.random(frames),
            "insulation_resistance": np.full(frames, 2000.0),
            "is_charging": np.zeros(frames),
            "cable_connected": np.zeros(frames),
        }
        if self.fault == "inverter_overheating":
            put["inverter_temperature"] = put["inverter_temperature"] + 40 * share
        if self.fault == "motor_bearing_wear":
            put["vibration_rms"] = put["vibration_rms"] * (1 + 4 * share)
        for role, column in put.items():
            index = self.catalogue.column(role)
            if index is not None:
                values[:, index] = column
        values[random.random(values.shape) < 0.02] = np.nan
        offset = self.cell_offset.copy()
        if self.fault == "battery_degradation":
            offset[3] -= 0.1 * share
        volts = 3.7 + offset + random.normal(0, 0.001, (rows, self.cells))
        degrees = 23 + random.normal(0, 0.2, (rows, self.probes))
        return Window(
            end_s=60.0 * k,
            values=values.astype(np.float32),
            cell_voltage=volts.astype(np.float32),
            cell_temperature=degrees.astype(np.float32),
            elapsed_s=300.0 if k == 0 else 60.0,
            coverage=1.0,
        )


@pytest.fixture(scope="session")
def drive(catalogue: Catalogue) -> Callable[..., Drive]:
    """Return a maker of simulated vehicles: `drive(seed, fault, cells=, probes=)`."""
    return lambda *args, **kwargs: Drive(catalogue, *args, **kwargs)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return default_catalogue()


@pytest.fixture(scope="session")
def spec() -> WindowSpec:
    return WindowSpec()


@pytest.fixture(scope="session")
def graph(catalogue: Catalogue, spec: WindowSpec) -> FeatureGraph:
    return FeatureGraph(catalogue, spec)


@pytest.fixture(scope="session")
def feature_model(graph: FeatureGraph) -> bytes:
    return export_features(graph)


@pytest.fixture(scope="session")
def runner(catalogue: Catalogue, spec: WindowSpec, feature_model: bytes) -> FeatureRunner:
    return FeatureRunner(catalogue, spec, feature_model)


def fault_of(vehicle: int) -> str:
    return ("", "inverter_overheating", "", "motor_bearing_wear", "battery_degradation")[vehicle % 5]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue, runner: FeatureRunner) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    models, datasets = folder / "models", folder / "datasets"
    models.mkdir()
    datasets.mkdir()
    tables = _simulate(catalogue, runner, datasets)
    train = tables["train"]
    features = np.stack([r["features"] for r in train])
    pooled = np.stack([r["pooled"] for r in train]).reshape(len(train), runner.pooled_frames, -1)
    _write_normalisation(catalogue, runner, features, pooled, datasets)
    _train(train, features, models)
    _train_autoencoder(pooled, runner.pooled_frames, datasets, catalogue, models)
    threshold = TypeThreshold(raise_at=0.8, clear_below=0.5)
    policy = Policy(
        description="at most one false alarm a vehicle-month",
        types=dict.fromkeys(FAILURE_TYPES, threshold),
        failure=0.8,
        anomaly=3.0,
        measured={"recall": 1.0},
    )
    thresholds = Thresholds(active="budget", policies={"budget": policy}, decision=Decision())
    (models / "thresholds.json").write_bytes(msgspec.json.encode(thresholds))
    (models / "training.json").write_text(json.dumps({"seed": 1, "data_sha256": "0" * 64}))
    return Trained(models, datasets, features, pooled)


def _simulate(catalogue: Catalogue, runner: FeatureRunner, datasets: Path) -> dict[str, list[dict[str, object]]]:
    tables: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    golden: list[Window] = []
    sample = []
    for v in range(VEHICLES):
        fault = fault_of(v)
        drive = Drive(catalogue, v, fault)
        state = runner.initial_state(drive.cells, drive.probes)
        for k in range(WINDOWS):
            window = drive.window(k)
            features, pooled, state = runner.run(window, state)
            failing = bool(fault) and k > WINDOWS // 3
            tables[SPLIT[v]].append(
                {
                    "vehicle_id": f"EV_{v}",
                    "make": "A",
                    "end_s": window.end_s,
                    "stratum": "driving",
                    "coverage": 1.0,
                    "label_failure": int(failing),
                    "label_type": fault if failing else "",
                    "label_severity": SEVERITIES[4 * k // WINDOWS] if failing else "",
                    "healthy": not failing,
                    "features": features,
                    "pooled": pooled.reshape(-1),
                }
            )
            if k % 10 == 5 and v < 7:
                golden.append(window)
            sample.append(window.values[-1])
    for split, rows in tables.items():
        columns = {name: [r[name] for r in rows] for name in rows[0]}
        pq.write_table(pa.table(columns), datasets / f"{split}_full.parquet")
    frames = {name: np.stack(sample)[:, i] for i, name in enumerate(catalogue.scalar_names)}
    pq.write_table(pa.table({"stratum": ["driving"] * len(sample), **frames}), datasets / "signal_sample.parquet")
    _write_golden(golden, datasets)
    info = {
        "schema_name": catalogue.name,
        "features": list(runner.feature_names),
        "signals": list(catalogue.scalar_names),
        "window": msgspec.to_builtins(WindowSpec()),
        "state_id": runner.state_id,
        "data_sha256": "0" * 64,
        "split": {f"EV_{v}": SPLIT[v] for v in range(VEHICLES)},
        "counts": {s: {"windows": len(r)} for s, r in tables.items()},
    }
    (datasets / "dataset.json").write_text(json.dumps(info))
    return tables


def _write_golden(golden: list[Window], datasets: Path) -> None:
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for i, window in enumerate(golden):
        values = window.values.copy()
        if i % 4 == 0:
            values[:, i % values.shape[1]] = np.nan
        arrays[f"window_{i:03d}"] = values
        arrays[f"cell_voltage_{i:03d}"] = window.cell_voltage
        arrays[f"cell_temperature_{i:03d}"] = window.cell_temperature
        arrays[f"elapsed_s_{i:03d}"] = np.array([window.elapsed_s], np.float32)
    np.savez(datasets / "golden_windows.npz", **arrays)  # type: ignore[arg-type]


def _write_normalisation(
    catalogue: Catalogue,
    runner: FeatureRunner,
    features: npt.NDArray[np.float32],
    pooled: npt.NDArray[np.float32],
    datasets: Path,
) -> None:
    signals = {
        name: {"mean": float(np.nanmean(pooled[..., i])), "std": float(np.nanstd(pooled[..., i])) or 1.0}
        for i, name in enumerate(catalogue.scalar_names)
    }
    stats = {}
    for i, name in enumerate(runner.feature_names):
        known = features[:, i][np.isfinite(features[:, i])]
        middle = float(np.median(known)) if len(known) else 0.0
        spread = 1.4826 * float(np.median(np.abs(known - middle))) if len(known) else 0.0
        stats[name] = {"median": middle, "mad_sigma": spread}
    (datasets / "normalization_stats.json").write_text(json.dumps({"signals": signals, "features": stats}))


def _train(rows: list[dict[str, object]], features: npt.NDArray[np.float32], models: Path) -> None:
    shared = {"num_leaves": 8, "min_data_in_leaf": 5, "verbosity": -1, "num_threads": 1, "seed": 1}
    kinds = np.array([r["label_type"] for r in rows])
    calibration: dict[str, object] = {"types": {}}
    failing = kinds != ""
    booster = lgb.train({**shared, "objective": "binary"}, lgb.Dataset(features, failing.astype(int)), 40)
    booster.save_model(str(models / "lgbm_failure_predictor.txt"))
    calibration["failure"] = {"method": "isotonic", "x": [-4.0, -1.0, 1.0, 4.0], "y": [0.01, 0.2, 0.7, 0.99]}
    for name in sorted(set(kinds[failing])):
        booster = lgb.train({**shared, "objective": "binary"}, lgb.Dataset(features, (kinds == name).astype(int)), 30)
        booster.save_model(str(models / f"lgbm_type_{name}.txt"))
        calibration["types"][name] = {"method": "sigmoid", "a": 0.9, "b": -0.1}  # type: ignore[index]
    level = np.array([SEVERITIES.index(str(r["label_severity"])) if r["label_severity"] else 0 for r in rows])
    kind = np.array([FAILURE_TYPES.index(k) if k else 0 for k in kinds])
    told = np.column_stack([features, kind])[failing]
    booster = lgb.train({**shared, "objective": "multiclass", "num_class": 4}, lgb.Dataset(told, level[failing]), 15)
    booster.save_model(str(models / "lgbm_severity_classifier.txt"))
    (models / "calibration.json").write_text(json.dumps(calibration))


def _train_autoencoder(
    pooled: npt.NDArray[np.float32], frames: int, datasets: Path, catalogue: Catalogue, models: Path
) -> None:
    torch.manual_seed(1)
    stats = json.loads((datasets / "normalization_stats.json").read_text())["signals"]
    model = Autoencoder(
        len(catalogue.scalars),
        16,
        mean=[stats[n]["mean"] for n in catalogue.scalar_names],
        std=[stats[n]["std"] for n in catalogue.scalar_names],
    )
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    data = torch.from_numpy(pooled)
    for _ in range(25):
        _, score = model(data[torch.randint(len(data), (48,))])
        optimiser.zero_grad()
        score.mean().backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        model.set_error_scale(model(data)[0])
    autoencoder.save(model, models / "lstm_ae_best.pt", {"pooled_frames": frames})

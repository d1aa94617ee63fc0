"""Raw recordings in, a dataset on disk out: every vehicle in a worker, then one writer.

Written against `concurrent.futures.Executor`: a process pool here, Dask's `client.get_executor()` past one machine. The
result depends on data, configuration and seed, not on the executor or the order in which workers finish.
"""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cloud.training.config import TrainingConfig
from cloud.training.dataset import (
    DATASET,
    EPISODES,
    FEATURE_SAMPLE,
    GOLDEN_WINDOWS,
    NORMALISATION,
    SIGNAL_SAMPLE,
    DatasetInfo,
    Float32Array,
    make_folder,
)
from cloud.training.labels import LEVEL_COLUMNS, Episode, read_episodes, severity_name, type_name
from cloud.training.recording import RawVehicle, find_vehicles, fingerprint
from cloud.training.split import FILES, SPLITS, TRAIN, split_vehicles
from cloud.training.vehicle import NATURAL, VehicleResult, VehicleTask, feature_runner, prepare_vehicle
from edge_agent.contract.errors import SourceError
from edge_agent.contract.mapping import Mapping
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, Catalogue
from edge_agent.pipeline.outcomes import Window


@dataclass(frozen=True, slots=True)
class Run:
    """What one preparation is about."""

    output: Path
    config: TrainingConfig
    catalogue: Catalogue
    mapping: Mapping
    episodes: dict[str, list[Episode]]
    split: dict[str, str]


def prepare_dataset(
    source: Path,
    output: Path,
    *,
    config: TrainingConfig,
    catalogue: Catalogue,
    mapping: Mapping,
    executor: Executor,
    on_vehicle: Callable[[int, int], None],
) -> DatasetInfo:
    """Turn the recordings under `source` into a dataset under `output`; `on_vehicle(done, total)` after each vehicle.

    Raises `SourceError` for recordings that cannot be read or give no window, `ConfigError` where the mapping does not
    fit or `output` cannot be made.
    """
    vehicles = find_vehicles(source)
    labels = source / "labels.parquet"
    episodes = read_episodes(labels)
    foreign = sorted(set(episodes) - {v.vehicle_id for v in vehicles})
    if foreign:
        raise SourceError(f"labels {labels}: name vehicle {foreign[0]!r}, of which there is no recording")
    split = split_vehicles(
        {v.vehicle_id: tuple(e.failure_type for e in episodes.get(v.vehicle_id, [])) for v in vehicles},
        (config.split.train, config.split.validation, config.split.test),
        config.seed,
    )
    make_folder(output)  # before minutes of work
    run = Run(output, config, catalogue, mapping, episodes, split)
    tasks = _tasks(vehicles, run)
    # longest files first, so that no worker is left alone with a big one at the end
    tasks.sort(key=lambda t: -sum(p.stat().st_size for p in t.vehicle.files))
    futures = [executor.submit(prepare_vehicle, task) for task in tasks]
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            on_vehicle(done, len(futures))
    finally:
        for future in futures:
            future.cancel()
    results = sorted((f.result() for f in futures), key=lambda r: r.vehicle.vehicle_id)
    results = [r for r in results if len(r.rows.end_s)]
    if not any(r.split == TRAIN for r in results):
        raise SourceError(
            f"input {source}: gives no scored window for training; is source.period_s of the mapping right?"
        )
    return _write(results, run, fingerprint(vehicles, labels))


def _tasks(vehicles: list[RawVehicle], run: Run) -> list[VehicleTask]:
    how, split, episodes = run.config.preparation, run.split, run.episodes
    training = [v.vehicle_id for v in vehicles if split[v.vehicle_id] == TRAIN]
    # healthy vehicles give the golden windows first; faulty ones must be among them too
    golden = sorted(training, key=lambda v: (v not in episodes, v))[: how.golden_windows]
    each = -(-how.golden_windows // max(1, len(golden)))
    healthy = sum(1 for v in training if v not in episodes) or len(training)
    feature_model = feature_runner(run.catalogue, run.config.window).model
    rows = sum(p.stat().st_size for v in vehicles for p in v.files)
    expected = max(1.0, rows / len(vehicles) / 3600.0)  # windows a vehicle, roughly: about 60 bytes a frame, 60 s apart
    return [
        VehicleTask(
            vehicle=v,
            split=split[v.vehicle_id],
            episodes=tuple(episodes.get(v.vehicle_id, ())),
            catalogue=run.catalogue,
            mapping=run.mapping,
            window=run.config.window,
            labels=run.config.labels,
            preparation=how,
            seed=run.config.seed + 7919 * number,
            pooled_share=min(1.0, how.pooled_train_windows / (healthy * expected)),
            sample_rows=-(-how.signal_sample_rows // max(1, len(training))),
            golden_windows=each if v.vehicle_id in golden else 0,
            feature_model=feature_model,
        )
        for number, v in enumerate(vehicles)
    ]


def _write(results: list[VehicleResult], run: Run, data_sha256: str) -> DatasetInfo:
    output, catalogue, episodes = run.output, run.catalogue, run.episodes
    runner = feature_runner(catalogue, run.config.window)
    width = next(r.rows.pooled.shape[1] for r in results)
    counts: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        part = [r for r in results if r.split == name]
        table = _table(part, len(runner.feature_names), width)
        pq.write_table(table, output / FILES[name], compression="none", row_group_size=4096)
        counts[name] = {
            "vehicles": len(part),
            "windows": table.num_rows,
            "windows_natural": sum(int((r.rows.variant == NATURAL).sum()) for r in part),
            "windows_healthy": sum(int(r.rows.labels.healthy.sum()) for r in part),
            "windows_failure": sum(int(r.rows.labels.failure.sum()) for r in part),
            "episodes": sum(len(episodes.get(r.vehicle.vehicle_id, [])) for r in part),
        }
    _write_sample(results, output, catalogue)
    _write_features(results, output)
    _write_normalisation(results, output, catalogue, runner.feature_names)
    _write_golden(results, output, run.config)
    _write_episodes(run)
    counters: Counter[str] = Counter()
    for result in results:
        counters.update(result.counters)
    info = DatasetInfo(
        schema_name=catalogue.name,
        features=tuple(runner.feature_names),
        signals=catalogue.scalar_names,
        window=run.config.window,
        pooled_shape=(width // len(catalogue.scalars), len(catalogue.scalars)),
        failure_types=FAILURE_TYPES if episodes else (),
        severities=SEVERITIES if episodes else (),
        labelled=bool(episodes),
        period_s=run.mapping.source.period_s,
        state_id=runner.state_id,
        seed=run.config.seed,
        split={r.vehicle.vehicle_id: r.split for r in results},
        counts=counts,
        counters=dict(sorted(counters.items())),
        data_sha256=data_sha256,
    )
    (output / DATASET).write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=1) + b"\n")
    return info


def _fixed_list(values: Float32Array, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """[W, n] → fixed_size_list<float>[n]; with `valid` [W], `values` holds only the valid rows."""
    width = values.shape[1]
    if valid is None:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    full = np.full((len(valid), width), np.nan, np.float32)
    full[valid] = values
    return pa.FixedSizeListArray.from_arrays(pa.array(full.reshape(-1)), width, mask=pa.array(~valid))


def _table(results: list[VehicleResult], feature_count: int, pooled_width: int) -> pa.Table:
    schema = pa.schema(
        {
            "vehicle_id": pa.string(),
            "make": pa.string(),
            "end_s": pa.float64(),
            "elapsed_s": pa.float32(),
            "stratum": pa.string(),
            "coverage": pa.float32(),
            "variant": pa.string(),
            "label_failure": pa.int8(),
            "label_type": pa.string(),
            "label_severity": pa.string(),
            "healthy": pa.bool_(),
            "types_at_work": pa.int32(),
            "features": pa.list_(pa.float32(), feature_count),
            "pooled": pa.list_(pa.float32(), pooled_width),
        }
    )
    tables = [
        pa.table(
            [
                pa.array([r.vehicle.vehicle_id] * len(r.rows.end_s), pa.string()),
                pa.array([r.vehicle.make] * len(r.rows.end_s), pa.string()),
                pa.array(r.rows.end_s),
                pa.array(r.rows.elapsed_s),
                pa.array(r.rows.stratum.tolist(), pa.string()),
                pa.array(r.rows.coverage),
                pa.array(r.rows.variant.tolist(), pa.string()),
                pa.array(r.rows.labels.failure.astype(np.int8)),
                pa.array([type_name(i) for i in r.rows.labels.type_index.tolist()], pa.string()),
                pa.array([severity_name(i) for i in r.rows.labels.severity_index.tolist()], pa.string()),
                pa.array(r.rows.labels.healthy),
                pa.array(r.rows.labels.at_work.astype(np.int32)),
                _fixed_list(r.rows.features),
                _fixed_list(r.rows.pooled, r.rows.has_pooled),
            ],
            schema=schema,
        )
        for r in results
    ]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _write_sample(results: list[VehicleResult], output: Path, catalogue: Catalogue) -> None:
    training = [r for r in results if r.split == TRAIN]
    values = np.concatenate([r.sample for r in training])
    columns: dict[str, Any] = {
        "vehicle_id": pa.array([r.vehicle.vehicle_id for r in training for _ in r.sample], pa.string()),
        "end_s": pa.array(np.concatenate([r.sample_end_s for r in training])),
        "stratum": pa.array(np.concatenate([r.sample_stratum for r in training]).tolist(), pa.string()),
        "healthy": pa.array(np.concatenate([r.sample_healthy for r in training])),
    }
    columns.update(
        {name: pa.array(np.ascontiguousarray(values[:, i])) for i, name in enumerate(catalogue.scalar_names)}
    )
    pq.write_table(pa.table(columns), output / SIGNAL_SAMPLE)


def _write_features(results: list[VehicleResult], output: Path) -> None:
    """Write what the drift reference counts: features as a vehicle sees them, whose state no session has emptied."""
    held = [(r.vehicle.vehicle_id, r.carried) for r in results if r.carried is not None]
    columns: dict[str, Any] = {
        "vehicle_id": pa.array([vehicle for vehicle, rows in held for _ in rows.end_s], pa.string()),
        "end_s": pa.array(np.concatenate([rows.end_s for _, rows in held])),
        "stratum": pa.array(np.concatenate([rows.stratum for _, rows in held]).tolist(), pa.string()),
        "healthy": pa.array(np.concatenate([rows.labels.healthy for _, rows in held])),
        "features": _fixed_list(np.concatenate([rows.features for _, rows in held])),
    }
    pq.write_table(pa.table(columns), output / FEATURE_SAMPLE, compression="none")


def _write_normalisation(
    results: list[VehicleResult], output: Path, catalogue: Catalogue, feature_names: tuple[str, ...]
) -> None:
    """Mean and spread of what healthy training vehicles show; where there is no healthy one, of all."""
    training = [r for r in results if r.split == TRAIN]
    any_healthy = any(r.rows.labels.healthy.any() for r in training)
    frames = np.concatenate([r.sample[r.sample_healthy] if any_healthy else r.sample for r in training]).astype(
        np.float64
    )
    rows = np.concatenate(
        [r.rows.features[r.rows.labels.healthy] if any_healthy else r.rows.features for r in training]
    )
    signals = {name: _mean_std(_finite(frames[:, i])) for i, name in enumerate(catalogue.scalar_names)}
    features = feature_statistics(rows, feature_names)
    document = {"signals": signals, "features": features}
    (output / NORMALISATION).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def feature_statistics(rows: Float32Array, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return median and robust sigma of each of the features [W, F], by name."""
    return {name: _median_mad(_finite(rows[:, i])) for i, name in enumerate(names)}


def _finite(x: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    known: npt.NDArray[np.float64] = x[np.isfinite(x)].astype(np.float64)
    return known


def _mean_std(x: npt.NDArray[np.float64]) -> dict[str, float]:
    spread = float(x.std()) if len(x) else 0.0
    mean = float(x.mean()) if len(x) else 0.0
    # a signal that never moves, or never came, must not divide by nothing later
    return {"mean": mean, "std": spread if spread > 1e-6 * max(1.0, abs(mean)) else 1.0}


def _median_mad(x: npt.NDArray[np.float64]) -> dict[str, float]:
    if len(x) == 0:
        return {"median": 0.0, "mad_sigma": 1.0}
    median = float(np.median(x))
    # 1.4826: the MAD of a Gaussian in units of its sigma; a mostly constant feature has MAD 0, then its std stands
    sigma = 1.4826 * float(np.median(np.abs(x - median)))
    least = 1e-6 * max(1.0, abs(median))
    sigma = sigma if sigma > least else float(x.std())
    return {"median": median, "mad_sigma": sigma if sigma > least else 1.0}


def _write_golden(results: list[VehicleResult], output: Path, config: TrainingConfig) -> None:
    """Raw windows of training vehicles, and of the first ones a twin each with gaps, a lost signal, or no cells."""
    windows = [w for r in results if r.split == TRAIN for w in r.golden][: config.preparation.golden_windows]
    random = np.random.default_rng(config.seed)
    while windows and len(windows) < 24:  # a very small fleet: the count is a promise to the exporter
        windows.append(windows[int(random.integers(len(windows)))])
    spoiled = [_spoil(window, kind, random) for kind, window in enumerate(windows[:4])]
    arrays: dict[str, npt.NDArray[Any]] = {}
    for i, window in enumerate([*windows, *spoiled]):
        arrays[f"window_{i:03d}"] = window.values
        arrays[f"cell_voltage_{i:03d}"] = window.cell_voltage
        arrays[f"cell_temperature_{i:03d}"] = window.cell_temperature
        arrays[f"elapsed_s_{i:03d}"] = np.array([window.elapsed_s], np.float32)
    np.savez(output / GOLDEN_WINDOWS, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for an array


def _spoil(window: Window, kind: int, random: np.random.Generator) -> Window:
    """Half of the values lost; one signal lost; the older half lost; no cells and no probes."""
    values = window.values.copy()
    if kind == 0:
        values[random.random(values.shape) < 0.5] = np.nan
    elif kind == 1:
        values[:, random.integers(values.shape[1])] = np.nan
    elif kind == 2:
        values[: len(values) // 2] = np.nan
    else:
        cells, probes = (
            np.full_like(window.cell_voltage[:, :1], np.nan),
            np.full_like(window.cell_temperature[:, :1], np.nan),
        )
        return replace(window, cell_voltage=cells, cell_temperature=probes)
    return replace(window, values=values)


def _write_episodes(run: Run) -> None:
    rows = [e for vehicle in sorted(run.episodes) for e in run.episodes[vehicle]]
    pq.write_table(
        pa.table(
            {
                "vehicle_id": pa.array([e.vehicle_id for e in rows], pa.string()),
                "split": pa.array([run.split[e.vehicle_id] for e in rows], pa.string()),
                "failure_type": pa.array([e.failure_type for e in rows], pa.string()),
                "onset_s": pa.array([e.onset_s for e in rows], pa.float64()),
                **{
                    name: pa.array([_null(e.level_s[i]) for e in rows], pa.float64())
                    for i, name in enumerate(LEVEL_COLUMNS)
                },
                "failure_s": pa.array([_null(e.failure_s) for e in rows], pa.float64()),
                "end_s": pa.array([e.end_s for e in rows], pa.float64()),
                "predictable": pa.array([e.predictable for e in rows], pa.bool_()),
            }
        ),
        run.output / EPISODES,
    )


def _null(value: float) -> float | None:
    return value if np.isfinite(value) else None

"""The base dataset with the lake's windows joined to it, in a folder of its own; the base's files are only read.

Vehicles that learn go to train (or to validation, where the base has them there), those that are held out to test:
the test split is then the frozen set that champion and challenger are both held against. It is a dataset like any
other, so `evaluate` and `model-export` take it. What describes the base fleet as recorded (signal sample, golden
windows, the signals' normalisation) stays as it was; sampled windows are variants of their own, no rate is taken on.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cloud.training.dataset import (
    DATASET,
    EPISODES,
    FEATURE_SAMPLE,
    GOLDEN_WINDOWS,
    NORMALISATION,
    SIGNAL_SAMPLE,
    DatasetInfo,
    Windows,
    make_folder,
    read_normalisation,
    read_split,
)
from cloud.training.labels import LEVEL_COLUMNS, severity_name, type_name
from cloud.training.prepare import feature_statistics
from cloud.training.sampled import SAMPLED, SELECTED, SampledWindow
from cloud.training.split import FILES, SPLITS, TRAIN
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES

LAKE_WINDOWS = "lake.windows"  # the counter that tells an appended dataset from a prepared one
PARQUET = {"compression": "none", "row_group_size": 4096}


@dataclass(frozen=True, slots=True)
class Held:
    """One failure that a person confirmed, as an episode: from when on it could be seen, to its last sampled window."""

    vehicle_id: str
    failure_type: str
    onset_s: float
    level_s: tuple[float | None, ...]
    end_s: float


def append(
    base: Path,
    info: DatasetInfo,
    windows: list[SampledWindow],
    sides: Mapping[str, str],
    output: Path,
    *,
    makes: Mapping[str, str],
) -> DatasetInfo:
    """Write the joined dataset; `sides` says each sampled vehicle's split.

    Raises `SourceError` where a file of the base is missing or damaged, `ConfigError` where the base already has a
    lake's windows in it, or `output` cannot be made.
    """
    if LAKE_WINDOWS in info.counters:
        raise ConfigError(
            f"dataset {base}: already holds samples of a lake; give the one that `fleet-cloud prepare` wrote, as every "
            f"retraining joins the whole lake to it"
        )
    make_folder(output)
    counts = {name: dict(info.counts.get(name, {})) for name in SPLITS}
    for split in SPLITS:
        rows = [w for w in windows if sides[w.vehicle_id] == split]
        whole = _read(base / FILES[split])
        try:
            table = pa.concat_tables([whole, _table(rows, whole.schema, split, makes)])
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise SourceError(
                f"dataset {base / FILES[split]}: the lake's windows do not fit its columns ({_line(error)}); "
                f"run `fleet-cloud prepare` again"
            ) from error
        pq.write_table(table, output / FILES[split], **PARQUET)
        known = set(table.column("vehicle_id").to_pylist())
        counts[split] |= {"vehicles": len(known), "windows": table.num_rows, "windows_sampled": len(rows)}
    joined = DatasetInfo(
        **{
            **{f: getattr(info, f) for f in DatasetInfo.__struct_fields__},
            "failure_types": FAILURE_TYPES,
            "severities": SEVERITIES,
            "labelled": True,
            "split": {**info.split, **sides},
            "counts": counts,
            "counters": {**info.counters, LAKE_WINDOWS: len(windows)},
            "data_sha256": joined_sha256(info.data_sha256, windows),
        }
    )
    train = read_split(output, TRAIN, joined)
    usual = train.features[train.healthy] if train.healthy.any() else train.features
    stats = {**read_normalisation(base), "features": feature_statistics(usual, info.features)}
    (output / NORMALISATION).write_text(json.dumps(stats, indent=1, allow_nan=False) + "\n")
    _write_episodes(base, held_episodes(windows), sides, output)
    # a base of before the drift limits has no sample of features
    features = (FEATURE_SAMPLE,) if (base / FEATURE_SAMPLE).exists() else ()
    for name in (SIGNAL_SAMPLE, *features, GOLDEN_WINDOWS):
        try:
            shutil.copyfile(base / name, output / name)
        except OSError as error:
            raise SourceError(f"dataset {base / name}: cannot be copied: {error.strerror}") from error
    # last: a folder with this file is a whole dataset
    (output / DATASET).write_bytes(msgspec.json.format(msgspec.json.encode(joined), indent=1) + b"\n")
    return joined


def joined_sha256(base_sha256: str, windows: list[SampledWindow]) -> str:
    """Name the joined data: the base's, and every sample with its bytes and its label."""
    digest = hashlib.sha256(base_sha256.encode())
    for w in windows:
        label = (w.label.meaning, w.label.type_index, w.label.severity_index, w.by_champion)
        digest.update(json.dumps([w.vehicle_id, w.sample_id, w.sha256, *label]).encode())
    return digest.hexdigest()


def frozen_sha256(frozen: Windows) -> str:
    """Name a set of windows by what it is: who, when, every label and every input of the heads."""
    digest = hashlib.sha256()
    for f in fields(Windows):
        values = getattr(frozen, f.name)
        digest.update(f"{f.name} {values.shape}\n".encode())
        text = values.dtype.kind == "U"
        digest.update("\n".join(values.tolist()).encode() if text else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def held_episodes(windows: list[SampledWindow]) -> list[Held]:
    """One episode for each alert that a person confirmed and of which a window showed the failure."""
    by_alert: dict[tuple[str, str], list[SampledWindow]] = {}
    for w in windows:
        if w.label.meaning in {"confirmed", "early"} and w.label.alert is not None:
            by_alert.setdefault((w.vehicle_id, w.label.alert.alert_id), []).append(w)
    found: list[Held] = []
    for (vehicle, _), around in sorted(by_alert.items()):
        seen = sorted(w.end_s for w in around if w.label.meaning == "confirmed")
        if not seen:
            continue
        label = next(w.label for w in around if w.label.meaning == "confirmed")
        reached = max(0, label.severity_index)
        found.append(
            Held(
                vehicle_id=vehicle,
                failure_type=type_name(label.type_index),
                onset_s=min(w.end_s for w in around),
                level_s=tuple(seen[0] if level <= reached else None for level in range(len(LEVEL_COLUMNS))),
                end_s=seen[-1],
            )
        )
    return found


def _table(rows: list[SampledWindow], schema: pa.Schema, split: str, makes: Mapping[str, str]) -> pa.Table:
    labels = [w.label for w in rows]
    columns: dict[str, Any] = {
        "vehicle_id": [w.vehicle_id for w in rows],
        "make": [makes.get(w.vehicle_id, "") for w in rows],
        "end_s": [w.end_s for w in rows],
        "elapsed_s": [w.elapsed_s for w in rows],
        "stratum": [w.stratum for w in rows],
        "coverage": [w.coverage for w in rows],
        "variant": [SELECTED if w.by_champion else SAMPLED for w in rows],
        "label_failure": [int(label.meaning == "confirmed") for label in labels],
        "label_type": [type_name(label.type_index) if label.meaning == "confirmed" else "" for label in labels],
        "label_severity": [severity_name(label.severity_index) for label in labels],
        "healthy": [label.meaning in {"false_alarm", "healthy"} for label in labels],
        "types_at_work": [1 << label.type_index if label.type_index >= 0 else 0 for label in labels],
    }
    arrays = [_vectors(rows, f, split) if f.name in _VECTORS else pa.array(columns[f.name], f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


_VECTORS = ("features", "pooled")


def _vectors(rows: list[SampledWindow], field: pa.Field, split: str) -> pa.Array:
    """As `prepare` keeps them: pooled frames of healthy windows for the autoencoder, of all that are to be scored."""
    width = field.type.list_size
    values = [(w.features if field.name == "features" else w.pooled).reshape(-1) for w in rows]
    if any(len(v) != width for v in values):
        raise ValueError(f"{field.name} has {width} numbers a window there, {len(values[0])} here")
    kept = [field.name == "features" or split != TRAIN or w.label.meaning in {"false_alarm", "healthy"} for w in rows]
    full = np.concatenate(values) if values else np.empty(0, np.float32)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(full.astype(np.float32)), type=field.type, mask=pa.array([not k for k in kept], pa.bool_())
    )


def _write_episodes(base: Path, held: list[Held], sides: Mapping[str, str], output: Path) -> None:
    whole = _read(base / EPISODES)
    columns: dict[str, Any] = {
        "vehicle_id": [h.vehicle_id for h in held],
        "split": [sides[h.vehicle_id] for h in held],
        "failure_type": [h.failure_type for h in held],
        "onset_s": [h.onset_s for h in held],
        **{name: [h.level_s[i] for h in held] for i, name in enumerate(LEVEL_COLUMNS)},
        "failure_s": [None for _ in held],
        "end_s": [h.end_s for h in held],
        "predictable": [True for _ in held],
    }
    try:
        more = pa.table([pa.array(columns[f.name], f.type) for f in whole.schema], schema=whole.schema)
    except KeyError as error:
        raise SourceError(
            f"dataset {base / EPISODES}: has an unknown column {error}; run `fleet-cloud prepare` again"
        ) from error
    pq.write_table(pa.concat_tables([whole, more]), output / EPISODES)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            f"dataset {path}: not readable as Parquet: {_line(error)}; run `fleet-cloud prepare` again"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or ["?"])[0]

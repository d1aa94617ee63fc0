"""The dataset on disk: what its files are called, hold, and how they come back into memory.

`{train,val,test}_full.parquet` with columns vehicle_id, make, end_s, stratum, coverage, variant, the labels of
labeling_spec.txt, `features` fixed_size_list<float>[F] and `pooled` fixed_size_list<float>[P·S] (null where the window
was not sampled for the autoencoder), and `dataset.json`, which says what they are. `prepare.py` writes them; nothing
here knows a model.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cloud.training.labels import Episode, read_episodes
from cloud.training.split import FILES
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES

DATASET = "dataset.json"
NORMALISATION = "normalization_stats.json"
SIGNAL_SAMPLE = "signal_sample.parquet"
FEATURE_SAMPLE = "feature_sample.parquet"  # of the drift reference: training vehicles with their state carried
GOLDEN_WINDOWS = "golden_windows.npz"
EPISODES = "episodes.parquet"

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Windows:
    """One split in memory: W windows of whole vehicles, by vehicle, variant and time.

    type_index, severity_index: -1 = none. at_work: bit t = a failure of type t is at work, seen or not.
    pooled [K, P, S] holds the K windows whose number is in pooled_row [K].
    """

    vehicle: npt.NDArray[np.str_]
    end_s: npt.NDArray[np.float64]
    stratum: npt.NDArray[np.str_]
    variant: npt.NDArray[np.str_]
    failure: npt.NDArray[np.bool_]
    type_index: npt.NDArray[np.int64]
    severity_index: npt.NDArray[np.int64]
    healthy: npt.NDArray[np.bool_]
    at_work: npt.NDArray[np.int64]
    features: Float32Array
    pooled: Float32Array
    pooled_row: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.end_s)

    def take(self, mask: npt.NDArray[np.bool_]) -> "Windows":
        """Return the windows that `mask` [W] selects."""
        number = np.cumsum(mask) - 1
        pooled = mask[self.pooled_row]
        plain = {f.name: getattr(self, f.name)[mask] for f in fields(self) if not f.name.startswith("pooled")}
        return Windows(**plain, pooled=self.pooled[pooled], pooled_row=number[self.pooled_row[pooled]])

    @staticmethod
    def together(first: "Windows", second: "Windows") -> "Windows":
        """Join two splits, which share no vehicle; the pooled windows stay behind, as joining them is dear."""
        plain = [f.name for f in fields(Windows) if not f.name.startswith("pooled")]
        return Windows(
            **{name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in plain},
            pooled=first.pooled[:0],
            pooled_row=first.pooled_row[:0],
        )

    def sequences(self) -> dict[tuple[str, str], npt.NDArray[np.intp]]:
        """Row numbers of each (vehicle, variant), in order of time: what a decision runs along."""
        keys = np.char.add(np.char.add(self.vehicle, "\n"), self.variant)
        found: dict[tuple[str, str], npt.NDArray[np.intp]] = {}
        for key in np.unique(keys):
            rows = np.flatnonzero(keys == key)
            vehicle, variant = str(key).split("\n")
            found[vehicle, variant] = rows[np.argsort(self.end_s[rows], kind="stable")]
        return found


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`dataset.json`: what the files hold, and of which data they were made."""

    schema_name: str
    features: tuple[str, ...]
    signals: tuple[str, ...]
    window: WindowSpec
    pooled_shape: tuple[int, int]
    failure_types: tuple[str, ...]
    severities: tuple[str, ...]
    labelled: bool
    period_s: float
    state_id: str
    seed: int
    split: dict[str, str]
    counts: dict[str, dict[str, int]]
    counters: dict[str, int]
    data_sha256: str

    @property
    def features_sha256(self) -> str:
        """Name of the feature set: names and order of the features, and the window they are computed over."""
        return hashlib.sha256(msgspec.json.encode([self.features, self.window])).hexdigest()


def read_info(folder: Path) -> DatasetInfo:
    """Read `dataset.json`. Raises `SourceError` where the folder is no dataset."""
    path = folder / DATASET
    try:
        return msgspec.json.decode(path.read_bytes(), type=DatasetInfo)
    except OSError as error:
        raise SourceError(
            f"dataset {path}: cannot be read: {error.strerror}; `fleet-cloud prepare --output {folder}` makes one"
        ) from error
    except msgspec.DecodeError as error:
        raise SourceError(f"dataset {path}: {error}; run `fleet-cloud prepare` again") from error


def read_normalisation(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Read `normalization_stats.json`: "signals" and "features", each by name. Raises `SourceError` like the others."""
    path = folder / NORMALISATION
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, dict[str, float]]])
    except OSError as error:
        raise SourceError(
            f"dataset {path}: cannot be read: {error.strerror}; run `fleet-cloud prepare` again"
        ) from error
    except msgspec.DecodeError as error:
        raise SourceError(f"dataset {path}: {error}; run `fleet-cloud prepare` again") from error
    if not {"signals", "features"} <= set(found):
        raise SourceError(f"dataset {path}: lacks signals or features; run `fleet-cloud prepare` again")
    return found


def make_folder(folder: Path) -> None:
    """Make an output folder. Raises `ConfigError` where its path leads through a file or may not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {folder}: cannot be made: {error.strerror}; give another --output") from error


def read_split(folder: Path, split: str, info: DatasetInfo) -> Windows:
    """Read one split. Raises `SourceError` where its file is missing or damaged."""
    path = folder / FILES[split]
    try:
        table = pq.read_table(path).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        line = (str(error).splitlines() or ["?"])[0]
        raise SourceError(
            f"dataset {path}: not readable as Parquet: {line}; run `fleet-cloud prepare` again"
        ) from error
    count = table.num_rows
    pooled = table.column("pooled")
    rows = np.flatnonzero(pooled.is_valid().to_numpy(zero_copy_only=False))
    types = {"": -1, **{name: i for i, name in enumerate(FAILURE_TYPES)}}
    severities = {"": -1, **{name: i for i, name in enumerate(SEVERITIES)}}

    def text(name: str) -> npt.NDArray[np.str_]:
        return np.array(table.column(name).to_pylist(), dtype=np.str_)

    return Windows(
        vehicle=text("vehicle_id"),
        end_s=table.column("end_s").to_numpy(),
        stratum=text("stratum"),
        variant=text("variant"),
        failure=table.column("label_failure").to_numpy() == 1,
        type_index=np.array([types[t] for t in table.column("label_type").to_pylist()], np.int64),
        severity_index=np.array([severities[t] for t in table.column("label_severity").to_pylist()], np.int64),
        healthy=table.column("healthy").to_numpy(zero_copy_only=False),
        at_work=table.column("types_at_work").to_numpy().astype(np.int64),
        features=_flat(table.column("features")).reshape(count, len(info.features)),
        pooled=_flat(pooled.filter(pooled.is_valid())).reshape(len(rows), *info.pooled_shape),
        pooled_row=rows,
    )


def _flat(column: pa.ChunkedArray) -> Float32Array:
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.empty(0, np.float32)


def read_split_episodes(folder: Path, split: str) -> dict[str, list[Episode]]:
    """Episodes of the vehicles of one split, by vehicle."""
    everything = read_episodes(folder / EPISODES)
    of_split = {v for v, s in read_info(folder).split.items() if s == split}
    return {vehicle: episodes for vehicle, episodes in everything.items() if vehicle in of_split}

"""From episodes (what went wrong with which vehicle, when) to a label for each window, as labeling_spec.txt says.

Pure but for `read_episodes`. A window is labelled by its end: what is known at the moment its score is computed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from edge_agent.contract.errors import SourceError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, FloatArray

LEVEL_COLUMNS = ("low_s", "medium_s", "high_s", "critical_s")
REQUIRED = ("vehicle_id", "failure_type", "onset_s", *LEVEL_COLUMNS, "failure_s", "end_s")
NO_TYPE = -1  # of WindowLabels.type_index and .severity_index


@dataclass(frozen=True, slots=True)
class Episode:
    """One failure of one vehicle. Times in Unix seconds; NaN = never reached.

    `level_s` are the times from which the severity is low, medium, high, critical. `predictable` is False where nothing
    could be seen before the failure, so that nobody is blamed, or praised, for not predicting it.
    """

    vehicle_id: str
    failure_type: str
    onset_s: float
    level_s: tuple[float, float, float, float]
    failure_s: float
    end_s: float
    predictable: bool = True

    @property
    def visible_s(self) -> float:
        """From when on a model can be expected to see it: severity low; NaN if it never gets there."""
        return self.level_s[0]


@dataclass(frozen=True, slots=True)
class WindowLabels:
    """Labels of W windows of one vehicle.

    failure         [W] bool: the failure predictor's positives
    type_index      [W] int, into FAILURE_TYPES; NO_TYPE where no failure is visible
    severity_index  [W] int, into SEVERITIES; NO_TYPE likewise
    healthy         [W] bool: no failure at work at all; only these are negatives in training
    at_work         [W] int, bit t set while a failure of type t is at work, seen or not
    """

    failure: npt.NDArray[np.bool_]
    type_index: npt.NDArray[np.int64]
    severity_index: npt.NDArray[np.int64]
    healthy: npt.NDArray[np.bool_]
    at_work: npt.NDArray[np.int64]


def label_windows(
    end_s: FloatArray, episodes: list[Episode], *, horizon_s: float, window_length_s: float
) -> WindowLabels:
    """Label windows that end at `end_s` [W] by the vehicle's episodes (labeling_spec.txt, sections 2 to 4)."""
    count = len(end_s)
    failure = np.zeros(count, bool)
    type_index = np.full(count, NO_TYPE)
    severity_index = np.full(count, NO_TYPE)
    healthy = np.ones(count, bool)
    at_work = np.zeros(count, np.int64)
    for episode in episodes:
        type_number = FAILURE_TYPES.index(episode.failure_type)
        # a window that still holds frames of before the repair is not healthy either
        touched = (end_s >= episode.onset_s) & (end_s < episode.end_s + window_length_s)
        healthy &= ~touched
        at_work[touched] |= 1 << type_number
        present = (end_s >= episode.onset_s) & (end_s <= episode.end_s)
        level = sum((end_s >= at).astype(np.int64) for at in episode.level_s) - 1  # NaN compares false: never reached
        if not episode.predictable:
            level = np.where(end_s >= episode.failure_s, level, NO_TYPE)
        visible = present & (level > severity_index)  # of two failures at a time the worse one is the label
        type_index[visible] = type_number
        severity_index[visible] = np.asarray(level)[visible]
        soon = visible if np.isnan(episode.failure_s) else visible & (end_s >= episode.failure_s - horizon_s)
        failure |= soon
    return WindowLabels(failure, type_index, severity_index, healthy, at_work)


def read_episodes(path: Path) -> dict[str, list[Episode]]:
    """Read `labels.parquet`, one row an episode, by vehicle in order of onset; {} where the file does not exist.

    Raises `SourceError` for a file that is not Parquet, lacks a column, or names an unknown failure type.
    """
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"labels {path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
    absent = [name for name in REQUIRED if name not in table.column_names]
    if absent:
        raise SourceError(f"labels {path}: lacks column {', '.join(absent)}; see cloud/training/labeling_spec.txt")
    by_vehicle: dict[str, list[Episode]] = {}
    for row in table.to_pylist():
        episode = _episode(row, path)
        by_vehicle.setdefault(episode.vehicle_id, []).append(episode)
    for episodes in by_vehicle.values():
        episodes.sort(key=lambda e: e.onset_s)
    return by_vehicle


def _episode(row: dict[str, object], path: Path) -> Episode:
    vehicle, kind = str(row["vehicle_id"]), str(row["failure_type"])
    if kind not in FAILURE_TYPES:
        raise SourceError(f"labels {path}: vehicle {vehicle}: unknown failure_type {kind!r}; one of {FAILURE_TYPES}")
    times = {name: _seconds(row[name]) for name in REQUIRED[2:]}
    if not times["onset_s"] <= times["end_s"]:
        raise SourceError(f"labels {path}: vehicle {vehicle}: episode ends before its onset, or has no times")
    low, medium, high, critical = (times[name] for name in LEVEL_COLUMNS)
    predictable = row.get("predictable")
    return Episode(
        vehicle_id=vehicle,
        failure_type=kind,
        onset_s=times["onset_s"],
        level_s=(low, medium, high, critical),
        failure_s=times["failure_s"],
        end_s=times["end_s"],
        predictable=predictable is None or bool(predictable),
    )


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def severity_name(index: int) -> str:
    """Name of a severity index; "" for NO_TYPE."""
    return SEVERITIES[index] if index >= 0 else ""


def type_name(index: int) -> str:
    """Name of a failure type's index; "" for NO_TYPE."""
    return FAILURE_TYPES[index] if index >= 0 else ""

"""One vehicle's raw recording → its labelled windows' features. A pure function of its task, run in a worker process.

The windows come from the vehicle's own ingest and windower, the features from the exported feature graph run along the
vehicle's time with the state carried: no second implementation. Some vehicles are seen more than once, as vehicles
really report: slower, with signals missing, with an empty model state (one just fitted), or failing all of a sudden: a
healthy stretch and then a stretch from long after the onset. Each view is a *variant*.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cloud.training.config import Labels, Preparation
from cloud.training.labels import Episode, WindowLabels, label_windows
from cloud.training.recording import RawVehicle, blocks, read_columns
from cloud.training.split import TRAIN
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.mapping import Mapping, Masked
from edge_agent.contract.signals import SEVERITIES, Catalogue
from edge_agent.pipeline import drift
from edge_agent.pipeline.ingest import Ingest
from edge_agent.pipeline.outcomes import NoScore, Window
from edge_agent.pipeline.window import Windower
from export.features import FeatureRunner

Float32Array = npt.NDArray[np.float32]

NATURAL, FRESH, DECIMATED, DROPPED, SUDDEN = "natural", "fresh", "decimated", "dropped", "sudden"


@dataclass(frozen=True, slots=True)
class VehicleTask:
    """All that a worker needs for one vehicle; small, as it crosses a process boundary."""

    vehicle: RawVehicle
    split: str
    episodes: tuple[Episode, ...]
    catalogue: Catalogue
    mapping: Mapping
    window: WindowSpec
    labels: Labels
    preparation: Preparation
    seed: int  # of this vehicle
    pooled_share: float  # of the healthy windows of a training vehicle whose pooled form is kept
    sample_rows: int
    golden_windows: int
    feature_model: bytes  # the exported feature graph, about 100 kB


@dataclass(frozen=True, slots=True)
class Rows:
    """W windows in order of time, a variant at a time. `pooled` [W, Q] has rows of NaN where `has_pooled` is False."""

    end_s: npt.NDArray[np.float64]
    elapsed_s: Float32Array
    coverage: Float32Array
    stratum: npt.NDArray[np.str_]
    variant: npt.NDArray[np.str_]
    labels: WindowLabels
    features: Float32Array  # [W, F]
    pooled: Float32Array  # [kept, Q]
    has_pooled: npt.NDArray[np.bool_]  # [W]; its sum is `kept`


@dataclass(frozen=True, slots=True)
class VehicleResult:
    """What comes back from a worker."""

    vehicle: RawVehicle
    split: str
    rows: Rows
    sample: Float32Array  # [n, S] random frames of a training vehicle
    sample_stratum: npt.NDArray[np.str_]
    sample_healthy: npt.NDArray[np.bool_]
    sample_end_s: npt.NDArray[np.float64]  # [n] of their windows
    carried: Rows | None  # of a training vehicle: its own windows with the state carried, as on the vehicle
    golden: tuple[Window, ...]
    counters: Counter[str] = field(default_factory=Counter)


SUDDEN_WINDOWS = 48  # of a sudden failure: about what a live trial lasts

_RUNNERS: dict[str, FeatureRunner] = {}  # of this process: building the graph takes a second, a vehicle less


def feature_runner(catalogue: Catalogue, spec: WindowSpec, model: bytes | None = None) -> FeatureRunner:
    """Return this process's runner of the feature graph for a catalogue and a grid; built once.

    `model` is the graph already exported, which saves a worker process doing so again.
    """
    key = f"{spec}\n" + "\n".join(repr(signal) for signal in catalogue)
    if key not in _RUNNERS:
        _RUNNERS[key] = FeatureRunner(catalogue, spec, model)
    return _RUNNERS[key]


def prepare_vehicle(task: VehicleTask) -> VehicleResult:
    """Do one vehicle: read, window, compute features of every variant that its split asks for, label, sample.

    Raises `SourceError` for an unreadable recording and `ConfigError` where the mapping does not fit it.
    """
    random = np.random.default_rng(task.seed)
    masked = Masked()
    columns = read_columns(task.vehicle.files, task.vehicle.vehicle_id)
    arrivals = list(blocks(columns, task.mapping, task.catalogue, task.vehicle.vehicle_id, masked))
    counters: Counter[str] = Counter(frames=sum(len(b) for b in arrivals), values_masked=masked.total())
    windows = _windows(arrivals, task, task.mapping.source.period_s, counters)
    views = list(_views(task, arrivals, windows, random, counters))
    parts = [_featured(task, variant, view, reset, random) for variant, view, reset in views]
    sample, stratum, healthy, end_s = _signal_sample(task, windows, random)
    return VehicleResult(
        vehicle=task.vehicle,
        split=task.split,
        rows=_concatenate(parts),
        sample=sample,
        sample_stratum=stratum,
        sample_healthy=healthy,
        sample_end_s=end_s,
        carried=_featured(task, NATURAL, windows, 0.0, random) if task.split == TRAIN and windows else None,
        golden=_golden(task, [w for _, view, _ in views for w in view], random),
        counters=counters,
    )


def _windows(arrivals: list[ArrivalBlock], task: VehicleTask, period_s: float, counters: Counter[str]) -> list[Window]:
    ingest = Ingest()
    windower = Windower(
        task.catalogue,
        task.window,
        period_s,
        arrivals[0].cell_voltage.shape[1] if arrivals else 0,
        arrivals[0].cell_temperature.shape[1] if arrivals else 0,
    )
    windows: list[Window] = []
    outcomes = [o for b in arrivals for o in windower.push(ingest.push(b))]
    outcomes += [*windower.push(ingest.flush()), *windower.flush()]
    for outcome in outcomes:
        if isinstance(outcome, NoScore):
            counters[f"no_score.{outcome.reason}"] += 1
        else:
            windows.append(outcome)
    counters.update({f"ingest.{name}": count for name, count in ingest.counters.items()})
    return windows


def _views(
    task: VehicleTask,
    arrivals: list[ArrivalBlock],
    windows: list[Window],
    random: np.random.Generator,
    counters: Counter[str],
) -> Iterator[tuple[str, list[Window], float]]:
    """Yield (variant, windows, share of sessions that begin with an empty state)."""
    how = task.preparation
    sudden = _sudden(task, windows, random)
    if sudden:
        yield SUDDEN, sudden, 0.0
    if task.split != TRAIN:
        yield NATURAL, windows, 0.0
        yield FRESH, windows, 1.0
        return
    yield NATURAL, windows, how.fresh_state_share
    if random.random() < how.decimated_share:
        period_s = float(random.choice(how.decimated_period_s))
        if period_s > task.mapping.source.period_s:
            slower = [decimate(b, period_s) for b in arrivals]
            yield DECIMATED, _windows(slower, task, period_s, counters), how.fresh_state_share
    if random.random() < how.dropped_share:
        lost = random.random(len(task.catalogue.scalars)) < how.dropped_signals
        no_cells = random.random() < how.dropped_signals
        yield DROPPED, [_without(w, lost, no_cells) for w in windows], how.fresh_state_share


def _sudden(task: VehicleTask, windows: list[Window], random: np.random.Generator) -> list[Window]:
    """Join some healthy windows of the vehicle to a run of failing ones, as if nothing had lain between."""
    labels = _labels(task, windows)
    serious = np.flatnonzero(labels.severity_index >= SEVERITIES.index("medium"))
    healthy = np.flatnonzero(labels.healthy)
    healthy = healthy[healthy < serious[0]] if len(serious) else healthy[:0]
    if len(healthy) < SUDDEN_WINDOWS // 4:
        return []
    start = int(serious[random.integers(len(serious))])
    failing = [i for i in range(start, min(start + SUDDEN_WINDOWS, len(windows))) if labels.severity_index[i] >= 0]
    before = healthy[: int(random.integers(SUDDEN_WINDOWS // 4, SUDDEN_WINDOWS // 2 + 1))]
    cut = replace(windows[failing[0]], elapsed_s=task.window.stride_s)
    return [*(windows[i] for i in before), cut, *(windows[i] for i in failing[1:])]


def _labels(task: VehicleTask, windows: list[Window]) -> WindowLabels:
    return label_windows(
        np.array([w.end_s for w in windows]),
        list(task.episodes),
        horizon_s=task.labels.horizon_s,
        window_length_s=task.window.length_s,
    )


def decimate(block: ArrivalBlock, period_s: float) -> ArrivalBlock:
    """Keep, of each span of `period_s`, the newest value of every signal: as a vehicle that reports so rarely does."""
    if len(block) == 0:
        return block
    bucket = np.floor(block.time_s / period_s)
    first = np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
    last = np.append(first[1:] - 1, len(block) - 1)
    rows = np.arange(len(block))

    def newest(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        source = np.maximum.accumulate(np.where(np.isfinite(values), rows[:, None], -1), axis=0)[last]
        taken = np.take_along_axis(values, np.maximum(source, 0), axis=0)
        return np.where(source >= first[:, None], taken, np.nan)

    return ArrivalBlock(
        block.time_s[last], newest(block.scalars), newest(block.cell_voltage), newest(block.cell_temperature)
    )


def _without(window: Window, lost: npt.NDArray[np.bool_], no_cells: bool) -> Window:
    values = window.values.copy()
    values[:, lost] = np.nan
    if not no_cells:
        return replace(window, values=values)
    return replace(
        window,
        values=values,
        cell_voltage=np.full_like(window.cell_voltage, np.nan),
        cell_temperature=np.full_like(window.cell_temperature, np.nan),
    )


def _featured(
    task: VehicleTask, variant: str, windows: list[Window], reset_share: float, random: np.random.Generator
) -> Rows:
    runner = feature_runner(task.catalogue, task.window, task.feature_model)
    labels = _labels(task, windows)
    features = np.empty((len(windows), len(runner.feature_names)), np.float32)
    kept: list[Float32Array] = []
    has_pooled = np.zeros(len(windows), bool)
    state: Any = None
    previous_s = -np.inf
    for i, window in enumerate(windows):
        new_session = window.end_s - previous_s > task.window.stride_s + task.window.gap_limit_s
        previous_s = window.end_s
        if state is None or (new_session and random.random() < reset_share):
            state = runner.initial_state(window.cell_voltage.shape[1], window.cell_temperature.shape[1])
            window = replace(window, elapsed_s=task.window.length_s)  # noqa: PLW2901 - as of a vehicle's first window
        features[i], pooled, state = runner.run(window, state)
        if task.split != TRAIN or (labels.healthy[i] and random.random() < task.pooled_share):
            has_pooled[i] = True
            kept.append(pooled.reshape(-1))
    width = pooled.size if len(windows) else 0
    return Rows(
        end_s=np.array([w.end_s for w in windows]),
        elapsed_s=np.array([w.elapsed_s for w in windows], np.float32),
        coverage=np.array([w.coverage for w in windows], np.float32),
        stratum=np.array([drift.stratum(w, task.catalogue) for w in windows], dtype=np.str_),
        variant=np.full(len(windows), variant),
        labels=labels,
        features=features,
        pooled=np.stack(kept) if kept else np.empty((0, width), np.float32),
        has_pooled=has_pooled,
    )


def _concatenate(parts: list[Rows]) -> Rows:
    parts = [p for p in parts if len(p.end_s)] or parts[:1]
    return Rows(
        end_s=np.concatenate([p.end_s for p in parts]),
        elapsed_s=np.concatenate([p.elapsed_s for p in parts]),
        coverage=np.concatenate([p.coverage for p in parts]),
        stratum=np.concatenate([p.stratum for p in parts]),
        variant=np.concatenate([p.variant for p in parts]),
        labels=WindowLabels(
            *(
                np.concatenate([getattr(p.labels, name) for p in parts])
                for name in ("failure", "type_index", "severity_index", "healthy", "at_work")
            )
        ),
        features=np.concatenate([p.features for p in parts]),
        pooled=np.concatenate([p.pooled for p in parts if len(p.pooled)] or [parts[0].pooled]),
        has_pooled=np.concatenate([p.has_pooled for p in parts]),
    )


def _signal_sample(
    task: VehicleTask, windows: list[Window], random: np.random.Generator
) -> tuple[Float32Array, npt.NDArray[np.str_], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Random frames of a training vehicle's newest strides, with stratum, health and end of their windows.

    They are the drift reference of the signals.
    """
    if task.split != TRAIN or not windows:
        empty = np.empty((0, len(task.catalogue.scalars)), np.float32)
        return empty, np.empty(0, np.str_), np.empty(0, bool), np.empty(0, np.float64)
    stride = max(1, min(task.window.frames, round(task.window.stride_s / task.window.period_s)))
    chosen = random.integers(len(windows), size=task.sample_rows)
    healthy = _labels(task, windows).healthy
    strata = {i: drift.stratum(windows[i], task.catalogue) for i in set(chosen.tolist())}
    return (
        np.stack([windows[i].values[task.window.frames - stride + random.integers(stride)] for i in chosen]),
        np.array([strata[i] for i in chosen.tolist()], dtype=np.str_),
        healthy[chosen],
        np.array([windows[i].end_s for i in chosen.tolist()]),
    )


def _golden(task: VehicleTask, windows: list[Window], random: np.random.Generator) -> tuple[Window, ...]:
    if not windows or not task.golden_windows:
        return ()
    chosen = random.choice(len(windows), size=min(task.golden_windows, len(windows)), replace=False)
    return tuple(windows[i] for i in sorted(chosen))

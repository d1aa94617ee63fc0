"""`drift_reference.json`: bins of signals, features and scores, how the training fleet filled them, and their limits.

Signals come from random frames of training vehicles, features from their windows, scores from validation vehicles
(on its own training rows a booster is too sure), through the graph that ships. Counting is the vehicle's own function,
so that both sides agree on edges and on what is missing. Views of a vehicle that preparation made slower or poorer are
left out: they teach the models, they are not the fleet. So are windows with a failure at work, where there are healthy
ones: a training fleet is half failures, a real one hardly has any, and that difference is no drift. What counts as
drift, limit by limit, is `drift_limits`' business.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.bundle import DriftCalibration, DriftReference, DriftReferenceVariable
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES
from edge_agent.pipeline.drift import count
from export import drift_limits
from export.features import STATISTICS, FeatureGraph

BINS = 10
MOST_STATES = 8  # a signal with no more distinct values is a state: a bin for each
MOST_SCORED = 3000  # windows; enough for deciles, and a second of scoring
NATURAL = "natural"

Float32Array = npt.NDArray[np.float32]
Strata = npt.NDArray[np.str_]


def edges_of(values: npt.NDArray[Any]) -> tuple[float, ...]:
    """Choose inner edges: deciles, or for a signal of few states the middles between them; never none.

    What was constant in training gets an edge to either side, so that leaving it is seen.
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return (0.0,)
    states = np.unique(known)
    if len(states) <= MOST_STATES:
        margin = 1e-3 * max(1.0, float(np.abs(states).max()))
        edges = np.array([states[0] - margin, *((states[1:] + states[:-1]) / 2), states[-1] + margin])
    else:
        edges = np.unique(np.quantile(known, np.arange(1, BINS) / BINS))
    return tuple(float(e) for e in edges)


@dataclass(frozen=True)
class Counting:
    """Values [R, V] of variables, with what is known of each row [R]; `vehicle` None in a dataset of before."""

    names: tuple[str, ...]
    kind: Literal["signal", "feature", "score"]
    values: npt.NDArray[Any]
    strata: Strata
    vehicle: Strata | None
    end_s: npt.NDArray[np.float64] | None
    per_window: int  # rows that the vehicle counts of one window

    def variables(self) -> tuple[DriftReferenceVariable, ...]:
        """Choose the bins and fill them."""
        return tuple(self._variable(i, name) for i, name in enumerate(self.names))

    def _variable(self, i: int, name: str) -> DriftReferenceVariable:
        values = self.values[:, i]
        edges = edges_of(values)
        counts = {str(s): tuple(int(c) for c in count(edges, values[self.strata == s])) for s in np.unique(self.strata)}
        return DriftReferenceVariable(name=name, kind=self.kind, edges=edges, counts=counts)


def watched_features(graph: FeatureGraph) -> tuple[str, ...]:
    """Features that drift is counted on: the quantities; each signal's own statistics would repeat the signal."""
    return graph.feature_names[len(STATISTICS) * len(graph.catalogue.scalars) :]


def build_reference(
    datasets: Path, graph: FeatureGraph, heads_session: Any, *, false_alarm_rate: float = 0.01
) -> DriftReference:
    """Count the training fleet, and calibrate limits on it; a dataset without vehicles in its sample has none.

    Raises `BundleError` when a file of the dataset is missing or unfit.
    """
    train = _train(datasets, len(graph.feature_names)).healthy_ones()
    validation = read_windows(datasets / "val_full.parquet", len(graph.feature_names))
    validation = validation.healthy_ones() if len(validation.features) else train
    position = {name: i for i, name in enumerate(graph.feature_names)}
    watched = watched_features(graph)
    counting = [
        _signals(datasets / "signal_sample.parquet", graph),
        Counting(
            watched, "feature", train.features[:, [position[n] for n in watched]], train.strata, train.vehicle,
            train.end_s, 1,
        ),
        *_scores(validation, graph, heads_session),
    ]  # fmt: skip
    filled = [part.variables() for part in counting]
    calibration, limits = _limits(counting, filled, train, validation, false_alarm_rate)
    variables = tuple(
        msgspec.structs.replace(variable, limits=limits.get(variable.name, {})) for part in filled for variable in part
    )
    return DriftReference(variables=variables, calibration=calibration)


def _train(datasets: Path, features: int) -> "Windows":
    """Read the training vehicles' windows with their state carried, as on a vehicle.

    A dataset of before has only those that training learns from, where some sessions begin with an empty state: what
    they count is no sound ground for limits, so their vehicles are not told.
    """
    carried = datasets / "feature_sample.parquet"
    if carried.exists():
        return read_windows(carried, features)
    return replace(read_windows(datasets / "train_full.parquet", features), vehicle=None, end_s=None)


def _signals(path: Path, graph: FeatureGraph) -> Counting:
    known = ("vehicle_id", "end_s", "healthy")
    sample = read_table(path, ("stratum", *graph.catalogue.scalar_names), optional=known)
    if "healthy" in sample.column_names and pc.any(sample["healthy"]).as_py():
        sample = sample.filter(sample["healthy"])
    dated = {"vehicle_id", "end_s"} <= set(sample.column_names)
    names = graph.catalogue.scalar_names
    return Counting(
        names, "signal", np.stack([sample[n].to_numpy() for n in names], axis=1), _strings(sample, "stratum"),
        _strings(sample, "vehicle_id") if dated else None, sample["end_s"].to_numpy() if dated else None,
        max(1, round(graph.spec.stride_s / graph.spec.period_s)),
    )  # fmt: skip


def _limits(
    counting: list[Counting],
    filled: list[tuple[DriftReferenceVariable, ...]],
    train: "Windows",
    validation: "Windows",
    false_alarm_rate: float,
) -> tuple[DriftCalibration | None, dict[str, dict[str, tuple[float, ...]]]]:
    groups = [
        drift_limits.Rows(variables, part.values, part.vehicle, part.strata, part.end_s, part.per_window)
        for part, variables in zip(counting, filled, strict=True)
        if part.vehicle is not None and part.end_s is not None
    ]
    if len(groups) < len(counting):
        return None, {}
    windows = {**validation.ends(), **train.ends()}
    return drift_limits.calibrate(groups, windows, false_alarm_rate=false_alarm_rate)


@dataclass(frozen=True)
class Windows:
    """Natural windows of one split.

    features [W, F], pooled [W, Q] (rows of NaN where not kept), strata [W], healthy [W] bool; vehicle [W] and end_s [W]
    or None, where the table does not say.
    """

    features: Float32Array
    pooled: Float32Array
    strata: Strata
    healthy: npt.NDArray[np.bool_]
    vehicle: Strata | None
    end_s: npt.NDArray[np.float64] | None

    def healthy_ones(self) -> "Windows":
        """Leave out windows with a failure at work; where all have one, none is left out."""
        if self.healthy.all() or not self.healthy.any():
            return self
        return self.at(np.flatnonzero(self.healthy))

    def at(self, rows: npt.NDArray[np.integer]) -> "Windows":
        """Return some of the windows, in this order."""
        return Windows(
            self.features[rows],
            self.pooled[rows],
            self.strata[rows],
            self.healthy[rows],
            None if self.vehicle is None else self.vehicle[rows],
            None if self.end_s is None else self.end_s[rows],
        )

    def ends(self) -> dict[tuple[str, str], npt.NDArray[np.float64]]:
        """Return the ends of the windows, in order, by (vehicle, stratum)."""
        if self.vehicle is None or self.end_s is None:
            return {}
        keys = np.char.add(np.char.add(self.vehicle, "\n"), self.strata)
        return {
            (str(key).partition("\n")[0], str(key).partition("\n")[2]): np.sort(self.end_s[keys == key])
            for key in np.unique(keys)
        }


def read_windows(path: Path, features: int) -> Windows:
    """Read a split's natural windows. Raises `BundleError`."""
    optional = ("pooled", "variant", "vehicle_id", "end_s", "healthy")
    table = read_table(path, ("stratum", "features"), optional=optional)
    there = set(table.column_names)
    if "variant" in there:
        table = table.filter(pc.equal(table["variant"], NATURAL))
    matrix = _matrix(table, "features")
    pooled = _matrix(table, "pooled") if "pooled" in there else np.empty((len(matrix), 0), np.float32)
    if len(matrix) and matrix.shape[1] != features:
        raise BundleError(f"{path}: has {matrix.shape[1]} features, this version's graph gives {features}")
    return Windows(
        matrix,
        pooled,
        _strings(table, "stratum"),
        np.array(table["healthy"].to_pylist(), bool) if "healthy" in there else np.ones(len(matrix), bool),
        _strings(table, "vehicle_id") if "vehicle_id" in there else None,
        table["end_s"].to_numpy() if "end_s" in there else None,
    )


def _scores(windows: Windows, graph: FeatureGraph, session: Any) -> Iterator[Counting]:
    outputs = {o.name for o in session.get_outputs()}
    kept = np.flatnonzero(~np.isnan(windows.pooled).all(axis=1)) if windows.pooled.size else np.arange(0)
    if len(kept) > MOST_SCORED:
        kept = kept[np.linspace(0, len(kept) - 1, MOST_SCORED).astype(int)]
    if not len(kept):
        return
    wanted = [n for n in ("failure_probability", "type_probability", "anomaly_score") if n in outputs]
    takes = {i.name for i in session.get_inputs()}
    shape = (1, graph.pooled_frames, len(graph.catalogue.scalars))
    names = [n for w in wanted for n in ([f"{w}.{k}" for k in FAILURE_TYPES] if w == "type_probability" else [w])]
    scored = windows.at(kept)
    values = np.empty((len(kept), len(names)), np.float32)
    for i in range(len(kept)):
        feed = {"features": scored.features[i : i + 1], "pooled": scored.pooled[i].reshape(shape)}
        answers = session.run(wanted, {k: v for k, v in feed.items() if k in takes})
        values[i] = np.concatenate([a.reshape(-1) for a in answers])
    yield Counting(tuple(names), "score", values, scored.strata, scored.vehicle, scored.end_s, 1)


def read_table(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> pa.Table:
    """Read columns of a Parquet file. Raises `BundleError` when it is missing, unreadable or lacks one."""
    try:
        with pq.ParquetFile(path) as file:
            there = set(file.schema_arrow.names)
            absent = [c for c in columns if c not in there]
            if absent:
                raise BundleError(f"{path}: lacks column {absent[0]!r}; prepare the dataset again")
            return file.read([*columns, *(c for c in optional if c in there)])
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; prepare the dataset first") from error
    except (OSError, pa.ArrowException) as error:
        raise BundleError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); prepare the dataset again"
        ) from error


def _strings(table: pa.Table, column: str) -> Strata:
    return np.array(table[column].to_pylist(), dtype=np.str_)


def _matrix(table: pa.Table, column: str) -> Float32Array:
    """[W, n] of a list column; a null row becomes NaN."""
    chunks = table[column].combine_chunks()
    if isinstance(chunks, pa.ChunkedArray):
        chunks = pa.concat_arrays(chunks.chunks)
    valid = np.asarray(chunks.is_valid())
    flat = chunks.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = len(flat) // max(1, int(valid.sum()))
    out = np.full((len(chunks), width), np.nan, np.float32)
    out[valid] = flat.reshape(-1, width) if width else np.empty((int(valid.sum()), 0), np.float32)
    return out

"""`drift_reference.json`: bins of signals, features and scores, and how the training fleet filled them, by stratum.

Signals come from random frames of training vehicles, features from their windows, scores from validation vehicles
(on its own training rows a booster is too sure), through the graph that ships. Counting is the vehicle's own function,
so that both sides agree on edges and on what is missing. Views of a vehicle that preparation made slower or poorer are
left out: they teach the models, they are not the fleet.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.bundle import DriftReference, DriftReferenceVariable
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES
from edge_agent.pipeline.drift import count
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


def _variable(
    name: str, kind: Literal["signal", "feature", "score"], values: npt.NDArray[Any], strata: Strata
) -> DriftReferenceVariable:
    edges = edges_of(values)
    counts = {str(s): tuple(int(c) for c in count(edges, values[strata == s])) for s in np.unique(strata)}
    return DriftReferenceVariable(name=name, kind=kind, edges=edges, counts=counts)


def watched_features(graph: FeatureGraph) -> tuple[str, ...]:
    """Features that drift is counted on: the quantities; each signal's own statistics would repeat the signal."""
    return graph.feature_names[len(STATISTICS) * len(graph.catalogue.scalars) :]


def build_reference(datasets: Path, graph: FeatureGraph, heads_session: Any) -> DriftReference:
    """Count the training fleet. Raises `BundleError` when a file of the dataset is missing or unfit."""
    sample = read_table(datasets / "signal_sample.parquet", ("stratum", *graph.catalogue.scalar_names))
    strata = _strings(sample, "stratum")
    variables = [_variable(n, "signal", sample[n].to_numpy(), strata) for n in graph.catalogue.scalar_names]

    train = read_windows(datasets / "train_full.parquet", len(graph.feature_names))
    position = {name: i for i, name in enumerate(graph.feature_names)}
    variables += [
        _variable(name, "feature", train.features[:, position[name]], train.strata) for name in watched_features(graph)
    ]

    validation = read_windows(datasets / "val_full.parquet", len(graph.feature_names))
    if not len(validation.features):
        validation = train
    variables += list(_scores(validation, graph, heads_session))
    return DriftReference(variables=tuple(variables))


class Windows:
    """Natural windows of one split: features [W, F], pooled [W, Q] (rows of NaN where not kept), strata [W]."""

    def __init__(self, features: Float32Array, pooled: Float32Array, strata: Strata) -> None:
        self.features, self.pooled, self.strata = features, pooled, strata


def read_windows(path: Path, features: int) -> Windows:
    """Read a split's natural windows. Raises `BundleError`."""
    table = read_table(path, ("stratum", "features", "pooled"), optional=("variant",))
    if "variant" in table.column_names:
        table = table.filter(pc.equal(table["variant"], NATURAL))
    pooled = _matrix(table, "pooled")
    matrix = _matrix(table, "features")
    if len(matrix) and matrix.shape[1] != features:
        raise BundleError(f"{path}: has {matrix.shape[1]} features, this version's graph gives {features}")
    return Windows(matrix, pooled, _strings(table, "stratum"))


def _scores(windows: Windows, graph: FeatureGraph, session: Any) -> Iterator[DriftReferenceVariable]:
    outputs = {o.name for o in session.get_outputs()}
    kept = np.flatnonzero(~np.isnan(windows.pooled).all(axis=1)) if windows.pooled.size else np.arange(0)
    if len(kept) > MOST_SCORED:
        kept = kept[np.linspace(0, len(kept) - 1, MOST_SCORED).astype(int)]
    if not len(kept):
        return
    wanted = [n for n in ("failure_probability", "type_probability", "anomaly_score") if n in outputs]
    takes = {i.name for i in session.get_inputs()}
    shape = (1, graph.pooled_frames, len(graph.catalogue.scalars))
    rows: dict[str, list[Float32Array]] = {name: [] for name in wanted}
    for i in kept.tolist():
        feed = {"features": windows.features[i : i + 1], "pooled": windows.pooled[i].reshape(shape)}
        for name, answer in zip(
            wanted, session.run(wanted, {k: v for k, v in feed.items() if k in takes}), strict=True
        ):
            rows[name].append(answer.reshape(-1))
    strata = windows.strata[kept]
    for name in wanted:
        values = np.stack(rows[name])  # [W, 1] or [W, T]
        if name == "type_probability":
            for i, kind in enumerate(FAILURE_TYPES):
                yield _variable(f"type_probability.{kind}", "score", values[:, i], strata)
        else:
            yield _variable(name, "score", values[:, 0], strata)


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

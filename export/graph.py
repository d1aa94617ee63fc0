"""The graph that ships: feature graph and heads joined into one `model.onnx`, from the raw window to all scores.

`build_heads` is the second half alone (features in, scores out): training calibrates and evaluates on it, since int8
answers differ from float ones. `build_model` is the whole. Names and shapes of inputs and outputs are those of design
section 4; a head that was not trained leaves its outputs out. How a booster, a calibration or the autoencoder becomes
nodes is left to `trees`, `calibration`, `autoencoder` and `quantize`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import lightgbm as lgb
import msgspec
import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edge_agent.contract.bundle import Head, WindowSpec
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, Catalogue
from export import autoencoder
from export.autoencoder import Autoencoder
from export.calibration import Calibration, Calibrator, load_calibration
from export.features import FeatureGraph, export_features
from export.nodes import Nodes, float32, join
from export.quantize import quantize_lstm
from export.trees import emit_trees, emit_zeroed, load_booster

FAILURE_FILE = "lgbm_failure_predictor.txt"
TYPE_FILE = "lgbm_type_{}.txt"
SEVERITY_FILE = "lgbm_severity_classifier.txt"
CALIBRATION_FILE = "calibration.json"
AUTOENCODER_FILE = "lstm_ae_best.pt"
NORMALISATION_FILE = "normalization_stats.json"
DATASET_FILE = "dataset.json"
DEVIATION_LIMIT = 1e3
NEVER = 0.0  # probability of a failure type that training never saw


class DatasetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The part of `dataset.json` that an export depends on."""

    schema_name: str
    features: tuple[str, ...]
    signals: tuple[str, ...]
    window: WindowSpec = WindowSpec()
    state_id: str = ""
    data_sha256: str = ""
    split: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}


@dataclass(frozen=True, slots=True)
class Models:
    """What training left in its folder, read and checked. An absent head is None."""

    failure: lgb.Booster | None
    types: dict[str, lgb.Booster]
    severity: lgb.Booster | None
    calibration: Calibration
    autoencoder: Autoencoder | None
    median: list[float]  # [F] of `features`
    mad_sigma: list[float]  # [F]

    @property
    def heads(self) -> tuple[Head, ...]:
        """Names of the heads that are there, cells not counted."""
        there: dict[Head, bool] = {
            "failure": self.failure is not None,
            "type": bool(self.types),
            "severity": self.severity is not None,
            "anomaly": self.autoencoder is not None,
        }
        return tuple(name for name, present in there.items() if present)


def read_dataset_facts(folder: Path) -> DatasetFacts:
    """Read `dataset.json`. Raises `BundleError` when it is missing or malformed."""
    path = folder / DATASET_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=DatasetFacts)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; prepare the dataset first") from error
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: {error}; prepare the dataset again") from error


def feature_graph(catalogue: Catalogue, facts: DatasetFacts, origin: str) -> FeatureGraph:
    """Return the feature graph of a dataset. Raises `BundleError` when it was prepared with another one."""
    graph = FeatureGraph(catalogue, facts.window)
    if facts.signals != catalogue.scalar_names:
        raise BundleError(f"{origin}: was prepared for schema {facts.schema_name!r}, not {catalogue.name!r}")
    if facts.features != graph.feature_names:
        raise BundleError(f"{origin}: was prepared with other features than this version's; prepare and train again")
    return graph


def read_models(models: Path, datasets: Path, features: tuple[str, ...], signals: int) -> Models:
    """Read the trained models. Raises `BundleError` naming the file that is missing or unfit."""
    if not models.is_dir():
        raise BundleError(f"{models}: no such directory; train the models first")

    def booster(name: str, extra: int = 0) -> lgb.Booster | None:
        path = models / name
        return load_booster(path, len(features) + extra) if path.exists() else None

    found = {t: booster(TYPE_FILE.format(t)) for t in FAILURE_TYPES}
    types = {t: b for t, b in found.items() if b is not None}
    failure, severity = booster(FAILURE_FILE), booster(SEVERITY_FILE, 1)
    if severity is not None and severity.num_model_per_iteration() != len(SEVERITIES):
        raise BundleError(f"{models / SEVERITY_FILE}: has {severity.num_model_per_iteration()} classes, not 4")
    calibration = load_calibration(models / CALIBRATION_FILE) if failure or types else Calibration()
    detector = None
    if (models / AUTOENCODER_FILE).exists():
        detector, _ = autoencoder.load(models / AUTOENCODER_FILE)
        if detector.signals != signals:
            raise BundleError(
                f"{models / AUTOENCODER_FILE}: was trained on {detector.signals} signals, the schema has {signals}"
            )
    if detector is None and failure is None and not types:
        raise BundleError(f"{models}: holds no model; train first")
    median, mad_sigma = _normalisation(datasets / NORMALISATION_FILE, features)
    return Models(failure, types, severity, calibration, detector, median, mad_sigma)


def _normalisation(path: Path, features: tuple[str, ...]) -> tuple[list[float], list[float]]:
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))["features"]
        median = [float(stats[name]["median"]) for name in features]
        spread = [float(stats[name]["mad_sigma"]) for name in features]
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; prepare the dataset first") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: lacks median and mad_sigma of a feature ({error}); prepare again") from error
    if not np.isfinite([*median, *spread]).all():
        raise BundleError(f"{path}: holds a number that is not finite; prepare again")
    return median, spread


def head_outputs(heads: tuple[Head, ...], features: int, signals: int) -> list[ValueInfoProto]:
    """Describe the outputs of the heads, in the design's order."""
    types, levels = len(FAILURE_TYPES), len(SEVERITIES)
    by_head: dict[Head, list[ValueInfoProto]] = {
        "failure": [float32("failure_probability", 1)],
        "type": [float32("type_probability", 1, types)],
        "severity": [float32("severity", 1, types, levels)],
        "anomaly": [float32("reconstruction_error", 1, signals), float32("anomaly_score", 1)],
    }
    return [float32("feature_deviation", 1, features), *(v for head in by_head if head in heads for v in by_head[head])]


def heads_model(models: Models, features: int, pooled_frames: int, signals: int) -> ModelProto:
    """Write the heads as one graph: features [1, F] and pooled [1, P, S] in, the scores of the trained heads out."""
    inputs = [float32("features", 1, features), float32("pooled", 1, pooled_frames, signals)]
    outputs = head_outputs(models.heads, features, signals)
    tabular = _tabular(models, inputs[0], [o for o in outputs if o.name not in autoencoder.OUTPUTS])
    parts = [("", tabular)]
    if models.autoencoder is not None:
        quantized = quantize_lstm(autoencoder.export_autoencoder(models.autoencoder, pooled_frames))
        parts.append(("ae/", quantized.graph))
    return join(parts, inputs, outputs)


def _tabular(models: Models, source: ValueInfoProto, outputs: list[ValueInfoProto]) -> onnx.GraphProto:
    """Write every head that reads `features`, and `feature_deviation`."""
    nodes = Nodes("heads/")
    zeroed = emit_zeroed(nodes, source.name)
    _deviation(nodes, models, source.name)
    one = nodes.constant([1], np.int64)
    if models.failure is not None:
        margin = emit_trees(nodes, models.failure, FAILURE_FILE, zeroed)
        probability = (models.calibration.failure or Calibrator(method="sigmoid")).emit(nodes, margin)  # [1, 1]
        flat = nodes.add("Reshape", probability, one)
        nodes.add("Cast", flat, output="failure_probability", to=TensorProto.FLOAT)
    if models.types:
        columns = [_type_probability(nodes, models, name, zeroed) for name in FAILURE_TYPES]
        nodes.add("Cast", nodes.add("Concat", *columns, axis=1), output="type_probability", to=TensorProto.FLOAT)
    if models.severity is not None:
        count = len(FAILURE_TYPES)
        rows = nodes.add("Tile", zeroed, nodes.constant([count, 1], np.int64))
        asked = nodes.add("Concat", rows, nodes.constant([[i] for i in range(count)], np.float32), axis=1)
        margins = emit_trees(nodes, models.severity, SEVERITY_FILE, asked)  # [T, 4]
        levels = nodes.add("Cast", nodes.add("Softmax", margins, axis=1), to=TensorProto.FLOAT)
        nodes.add("Unsqueeze", levels, nodes.constant([0], np.int64), output="severity")
    return nodes.graph([source], outputs)


def _type_probability(nodes: Nodes, models: Models, name: str, zeroed: str) -> str:
    """[1, 1] float64; a type without a booster is never likely."""
    booster = models.types.get(name)
    if booster is None:
        return nodes.constant([[NEVER]], np.float64)
    margin = emit_trees(nodes, booster, TYPE_FILE.format(name), zeroed)
    return models.calibration.types.get(name, Calibrator(method="sigmoid")).emit(nodes, margin)


def _deviation(nodes: Nodes, models: Models, source: str) -> None:
    """Robust z of each feature, bounded; 0 where the feature is not known, or never varied in training."""
    spread = np.array(models.mad_sigma, np.float64)
    rate = np.where(spread > 0, 1.0 / np.where(spread > 0, spread, 1.0), 0.0)
    missing = nodes.add("IsNaN", source)
    median = nodes.constant([models.median], np.float32)
    known = nodes.add("Where", missing, median, source)
    z = nodes.add("Mul", nodes.add("Sub", known, median), nodes.constant([rate], np.float32))
    limits = (nodes.constant(-DEVIATION_LIMIT, np.float32), nodes.constant(DEVIATION_LIMIT, np.float32))
    nodes.add("Clip", z, *limits, output="feature_deviation")


def whole_model(models: Models, graph: FeatureGraph, heads: ModelProto) -> ModelProto:
    """Join the feature graph and the heads (`heads_model`'s): design section 4's table."""
    features = onnx.load_from_string(export_features(graph)).graph
    signals, count = len(graph.catalogue.scalars), len(graph.feature_names)
    states = [float32(f"{s.name}_out", *s.shape) for s in graph.state_specs]
    outputs = [
        float32("features", 1, count),
        *head_outputs(models.heads, count, signals),
        helper.make_tensor_value_info("worst_cell", TensorProto.INT64, [1]),
        float32("worst_cell_deviation_v", 1),
        *states,
    ]
    spec = graph.spec
    inputs = [
        float32("window", 1, spec.frames, signals),
        float32("cell_voltage", 1, spec.vector_frames, "C"),
        float32("cell_temperature", 1, spec.vector_frames, "P"),
        float32("elapsed_s", 1),
        *(float32(s.name, *s.shape) for s in graph.state_specs),
    ]
    return join([("", features), ("", heads.graph)], inputs, outputs)


def build_heads(models_dir: Path, datasets_dir: Path, catalogue: Catalogue) -> ModelProto:
    """Return the heads graph of a models folder; see `heads_model`. Raises `BundleError`."""
    graph = feature_graph(catalogue, read_dataset_facts(datasets_dir), str(datasets_dir))
    signals = len(catalogue.scalars)
    models = read_models(models_dir, datasets_dir, graph.feature_names, signals)
    return heads_model(models, len(graph.feature_names), graph.pooled_frames, signals)


def build_model(models_dir: Path, datasets_dir: Path, catalogue: Catalogue) -> ModelProto:
    """Return the whole graph of a models folder; see `whole_model`. Raises `BundleError`."""
    graph = feature_graph(catalogue, read_dataset_facts(datasets_dir), str(datasets_dir))
    signals = len(catalogue.scalars)
    models = read_models(models_dir, datasets_dir, graph.feature_names, signals)
    return whole_model(models, graph, heads_model(models, len(graph.feature_names), graph.pooled_frames, signals))

"""Proof that the exported graph answers as the trained models do; a bundle that fails it is not written.

Boosters are compared where a conversion goes wrong: on training rows, on rows placed on every split's threshold and one
float32 step to either side, and on rows with missing values. The autoencoder's int8 answers are compared with torch's
float ones: they differ, and by how much is what the report says. The calibration is compared through the finished
heads graph, the feature graph against torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, helper

from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES
from export import autoencoder
from export.features import INPUTS, FeatureGraph, session_options
from export.graph import Models
from export.nodes import Nodes, float32, join
from export.quantize import quantize_lstm
from export.trees import emit_trees, emit_zeroed, floor32, thresholds_of

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

PROBABILITY_LIMIT = 1e-6
INT8_MEAN_LIMIT = 0.05  # of the anomaly score, relative; per-channel weights measured 0.01
FEATURE_LIMIT = 1e-3  # relative to the feature's own size: two orders of float32 summation
MARGIN_SLACK = 2e-5  # of a margin over tens; a steep isotonic step turns it into a difference of probability
LEAST_SCORE = 0.05  # relative errors of scores below it say nothing


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: the worst (or mean) difference found, what is allowed, over how many rows."""

    name: str
    found: float
    limit: float
    rows: int

    @property
    def passed(self) -> bool:
        """Whether the difference is a number, and small enough."""
        return bool(self.found <= self.limit)

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name}: {self.found:.2e} (limit {self.limit:.0e}, {self.rows} rows) {verdict}"


def require(checks: Iterable[Check]) -> None:
    """Raise `BundleError` naming the first comparison that failed."""
    for check in checks:
        if not check.passed:
            raise BundleError(f"parity failed: {check}; the bundle was not written")


def critical_rows(booster: lgb.Booster, rows: Float32Array, seed: int) -> Float32Array:
    """Return rows on every threshold, one float32 step above and below, and rows with a tenth of the values missing.

    rows [n, F] are realistic rows to start from; n ≥ 1.
    """
    random = np.random.default_rng(seed)
    feature, threshold = thresholds_of(booster)
    on = np.array([floor32(t) for t in threshold], dtype=np.float32)
    on = np.clip(on, np.finfo(np.float32).min, np.finfo(np.float32).max)  # LightGBM writes 1e300 for "all"
    with np.errstate(over="ignore"):  # one step beyond the largest float32 is infinite, and left out below
        beside = (np.nextafter(on, np.float32(np.inf)), np.nextafter(on, np.float32(-np.inf)))
    placed = []
    for values in (on, *beside):
        block = rows[random.integers(len(rows), size=len(on))].copy()
        finite = np.isfinite(values)
        block[np.flatnonzero(finite), feature[finite]] = values[finite]
        placed.append(block)
    holes = rows[random.integers(len(rows), size=min(1000, len(rows)))].copy()
    holes[random.random(holes.shape) < 0.1] = np.nan
    nothing = np.full((1, rows.shape[1]), np.nan, np.float32)
    return np.concatenate([*placed, holes, nothing])


def margins_model(booster: lgb.Booster, name: str) -> ModelProto:
    """Return one booster alone as a model: features [n, F] → margins [n, K] float64."""
    nodes = Nodes("")
    margins = emit_trees(nodes, booster, name, emit_zeroed(nodes, "features"))
    nodes.add("Identity", margins, output="margins")
    inputs = [float32("features", "n", booster.num_feature())]
    outputs = [helper.make_tensor_value_info("margins", TensorProto.DOUBLE, ["n", booster.num_model_per_iteration()])]
    return join([("", nodes.graph(inputs, outputs))], inputs, outputs)


def check_booster(booster: lgb.Booster, name: str, rows: Float32Array, seed: int) -> Check:
    """Compare probabilities of one booster on `rows` [n, F] and on its critical rows."""
    session = _session(margins_model(booster, name))
    tested = np.concatenate([rows, critical_rows(booster, rows, seed)])
    ours = np.asarray(session.run(None, {"features": tested})[0])
    theirs = np.asarray(booster.predict(tested, raw_score=True)).reshape(len(tested), -1)
    worst = float(np.abs(_probability(ours) - _probability(theirs)).max())
    return Check(f"{name}, largest difference of probability", worst, PROBABILITY_LIMIT, len(tested))


def _probability(margin: FloatArray) -> FloatArray:
    """Softmax of several columns, the logistic of one."""
    if margin.shape[1] == 1:
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(margin, -60, 60))))
    e = np.exp(margin - margin.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def check_boosters(models: Models, rows: Float32Array, seed: int) -> list[Check]:
    """Check every booster that is there."""
    checks = []
    if models.failure is not None:
        checks.append(check_booster(models.failure, "failure predictor", rows, seed))
    checks += [check_booster(b, f"type {name}", rows, seed) for name, b in models.types.items()]
    if models.severity is not None:
        told = np.arange(len(rows), dtype=np.float32) % len(FAILURE_TYPES)
        checks.append(check_booster(models.severity, "severity", np.column_stack([rows, told]), seed))
    return checks


def check_probabilities(models: Models, heads: ModelProto, rows: Float32Array) -> list[Check]:
    """Compare calibrated probabilities of the finished heads graph with calibration over LightGBM's own margin.

    The reference is the calibration's range over the margin ± `MARGIN_SLACK`, since a step may be steep.
    """
    session = _session(heads)
    pooled = next((i for i in session.get_inputs() if i.name == "pooled"), None)
    empty = {} if pooled is None else {"pooled": np.full(pooled.shape, np.nan, np.float32)}
    wanted = [o.name for o in session.get_outputs() if o.name in ("failure_probability", "type_probability")]
    if not wanted:
        return []
    answers = [session.run(wanted, {"features": row[None], **empty}) for row in rows]
    found = {name: np.concatenate([np.atleast_2d(a[i]) for a in answers]) for i, name in enumerate(wanted)}
    worst = 0.0
    columns: list[tuple[Any, Any, FloatArray]] = []
    if models.failure is not None:
        columns.append((models.failure, models.calibration.failure, found["failure_probability"][:, 0]))
    for name, booster in models.types.items():
        column = found["type_probability"][:, FAILURE_TYPES.index(name)]
        columns.append((booster, models.calibration.types.get(name), column))
    for booster, calibrator, answer in columns:
        margin = np.asarray(booster.predict(rows, raw_score=True), np.float64)
        if calibrator is None:
            low = high = _probability(margin[:, None])[:, 0]
        else:
            low, high = np.asarray(calibrator(margin - MARGIN_SLACK)), np.asarray(calibrator(margin + MARGIN_SLACK))
        outside = np.maximum(np.minimum(low, high) - answer, answer - np.maximum(low, high))
        worst = max(worst, float(outside.max()))
    return [Check("calibrated probabilities through the graph", worst, PROBABILITY_LIMIT, len(rows))]


def check_autoencoder(models: Models, pooled: Float32Array) -> list[Check]:
    """Compare int8 with torch's float32 on [n, P, S], one window at a time: mean relative difference of the score."""
    if models.autoencoder is None or not len(pooled):
        return []
    exported = autoencoder.export_autoencoder(models.autoencoder, pooled.shape[1])
    floats = ort.InferenceSession(exported, session_options(), providers=["CPUExecutionProvider"])
    quantized = _session(quantize_lstm(exported))
    with torch.no_grad():
        _, reference = models.autoencoder(torch.from_numpy(pooled))
    truth = reference.numpy().astype(np.float64)
    scale = np.maximum(np.abs(truth), LEAST_SCORE)

    def scores(session: Any) -> FloatArray:
        return np.array([session.run(["anomaly_score"], {"pooled": x[None]})[0][0] for x in pooled], np.float64)

    float_error = float((np.abs(scores(floats) - truth) / scale).max())
    int8_error = float((np.abs(scores(quantized) - truth) / scale).mean())
    return [
        Check("autoencoder as exported, largest relative difference", float_error, FEATURE_LIMIT, len(pooled)),
        Check("autoencoder in int8, mean relative difference", int8_error, INT8_MEAN_LIMIT, len(pooled)),
    ]


def check_features(graph: FeatureGraph, session: Any, cases: list[dict[str, npt.NDArray[Any]]]) -> Check:
    """Compare the feature graph in `session` with torch on golden inputs: largest difference, relative to its scale."""
    worst = 0.0
    order = [*INPUTS, *(s.name for s in graph.state_specs)]
    for case in cases:
        ours = np.asarray(session.run(["features"], case)[0][0], np.float64)
        with torch.no_grad():
            theirs = graph(*(torch.from_numpy(case[name]) for name in order))[0][0].numpy().astype(np.float64)
        if (np.isnan(ours) != np.isnan(theirs)).any():
            worst = np.inf
            continue
        worst = max(worst, float(np.nanmax(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1.0), initial=0.0)))
    return Check("features against torch, largest relative difference", worst, FEATURE_LIMIT, len(cases))


def _session(model: ModelProto) -> Any:
    return ort.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])

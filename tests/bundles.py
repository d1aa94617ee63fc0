"""A tiny real bundle: an ONNX graph that obeys the contract of design section 4, in a directory with its manifest.

Its answers can be foretold: `type_probability` of the i-th type is the share of the window in which scalar i stood
above half of its range, `anomaly_score` the share of missing values, state `seconds` adds up `elapsed_s`. So tests
steer it by the telemetry they feed, and what runs is onnxruntime on a file with a verified hash, nothing pretended.
"""

import hashlib
import io
import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edge_agent.contract import bundle as contract
from edge_agent.contract.bundle import (
    Decision,
    DriftReference,
    DriftReferenceVariable,
    FileEntry,
    Manifest,
    Policy,
    SignalSpec,
    StateSpec,
    Thresholds,
    TypeThreshold,
    WindowSpec,
)
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, Catalogue

FEATURES = ("share_present", "elapsed_s")


def build_bundle(
    directory: Path,
    catalogue: Catalogue,
    *,
    signals: tuple[str, ...] | None = None,
    spec: WindowSpec | None = None,
    release: int = 1,
    state_id: str = "tiny-1",
    anomaly_only: bool = False,
    failure_types: tuple[str, ...] = FAILURE_TYPES,
    decision: Decision | None = None,
    poison: bool = False,
    golden: bool = False,
    trick: str = "",
    makes: tuple[str, ...] = (),
) -> Path:
    """Write a bundle into `directory` (created) and return it; `poison`: anomaly score 0/0 of a whole window.

    `golden`: with golden vectors, as a release must have them. `trick`: what a bad release does, "late_nan" (NaN once a
    signal stays high, which no golden vector shows), "bomb" (asks for 3 GB), "slow" (computes for seconds).
    """
    spec = spec or WindowSpec()
    names = signals or catalogue.scalar_names
    directory.mkdir(parents=True, exist_ok=True)
    types = () if anomaly_only else failure_types
    model = _graph(catalogue, names, spec, types, poison=poison, trick=trick)
    harmless = _graph(catalogue, names, spec, types, poison=poison, trick="")
    files = {
        contract.MODEL: model.SerializeToString(),
        contract.THRESHOLDS: msgspec.json.encode(
            Thresholds(
                active="budget",
                policies={
                    "budget": Policy(
                        description="tests",
                        types={t: TypeThreshold(raise_at=0.6, clear_below=0.3) for t in types},
                        failure=None if anomaly_only else 0.6,
                        anomaly=0.6,
                    )
                },
                decision=decision or Decision(),
            )
        ),
        contract.DRIFT_REFERENCE: msgspec.json.encode(_reference(names)),
        contract.GOLDEN: _golden(harmless, catalogue, names, spec) if golden else b"",
        contract.MODEL_CARD: b"# A bundle for tests\n",
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    vectors = {
        role: SignalSpec(name=signal.name, unit=signal.unit)
        for role in ("cell_voltage", "cell_temperature")
        if (signal := catalogue.role(role)) is not None
    }
    manifest = Manifest(
        contract_version=contract.CONTRACT_VERSION,
        release=release,
        name=f"tiny-{release}",
        created="2026-01-01T00:00:00.000Z",
        state_id=state_id,
        opset=17,
        onnxruntime="1.32",
        schema_name=catalogue.name,
        signals=tuple(SignalSpec(name=n, unit=catalogue[n].unit) for n in names),
        vectors=vectors,
        window=spec,
        heads=("anomaly", "cells") if anomaly_only else ("failure", "type", "severity", "anomaly", "cells"),
        failure_types=types,
        severities=SEVERITIES,
        features=FEATURES,
        compatible_makes=makes,
        states=(StateSpec(name="seconds", shape=(1, 1)), StateSpec(name="cells_seen", shape=(1, "C"))),
        files={n: FileEntry(length=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in files.items()},
    )
    (directory / contract.MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return directory


def rewrite_manifest(directory: Path, **changes: object) -> None:
    """Change fields of the manifest, as an attacker or a newer release would."""
    path = directory / contract.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def _golden(model: onnx.ModelProto, catalogue: Catalogue, names: tuple[str, ...], spec: WindowSpec) -> bytes:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    low = np.array([catalogue[n].min for n in names], np.float32)
    high = np.array([catalogue[n].max for n in names], np.float32)
    outputs = [o.name for o in session.get_outputs()]
    arrays: dict[str, np.ndarray] = {}
    for number in range(24):
        share = random.random((1, spec.frames, len(names)), np.float32)
        given = {
            "window": low + share * (high - low),
            "cell_voltage": np.full((1, spec.vector_frames, 2), 3.7, np.float32),
            "cell_temperature": np.full((1, spec.vector_frames, 1), 25.0, np.float32),
            "elapsed_s": np.array([spec.stride_s], np.float32),
            "seconds": np.zeros((1, 1), np.float32),
            "cells_seen": np.zeros((1, 2), np.float32),
        }
        arrays |= {f"{number:03d}.in.{name}": value for name, value in given.items()}
        answers = zip(outputs, session.run(outputs, given), strict=True)
        arrays |= {f"{number:03d}.out.{name}": value for name, value in answers}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _reference(names: tuple[str, ...]) -> DriftReference:
    variables = [DriftReferenceVariable(name=n, kind="signal", edges=(0.0, 10.0), counts={}) for n in names]
    variables.append(DriftReferenceVariable(name="share_present", kind="feature", edges=(0.5,), counts={}))
    variables.append(DriftReferenceVariable(name="anomaly_score", kind="score", edges=(0.5,), counts={}))
    return DriftReference(variables=tuple(variables))


def without_a_graph(directory: Path) -> Path:
    """Make a bundle's model bytes that no runtime loads, with every hash right; return the bundle."""
    data = b"no graph " * 100
    (directory / contract.MODEL).write_bytes(data)
    manifest = json.loads((directory / contract.MANIFEST).read_bytes())
    manifest["files"][contract.MODEL] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / contract.MANIFEST).write_text(json.dumps(manifest))
    return directory


def _graph(
    catalogue: Catalogue, names: tuple[str, ...], spec: WindowSpec, types: tuple[str, ...], *, poison: bool,
    trick: str,
) -> onnx.ModelProto:  # fmt: skip
    frames, width, kinds = spec.frames, len(names), len(types)
    middle = np.array([(catalogue[n].min + catalogue[n].max) / 2 for n in names], np.float32)
    constants = {
        "middle": middle,
        "zero": np.float32(0),
        "frames": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "whole": np.float32(frames * width),
        "first_types": np.arange(kinds, dtype=np.int64),
        "one_axis": np.array([1], np.int64),
        "all_axes": np.array([1, 2], np.int64),
        "severity_shape": np.array([1, max(kinds, 1), 1], np.int64),
        "severity_levels": np.array([[[0.0, 0.0, 1.0, 0.0]]], np.float32),
        "none": np.array([-1], np.int64),
        "no_deviation": np.array([0], np.float32),
    }

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    nodes = [
        node("IsNaN", ["window"], "absent"),
        node("Cast", ["absent"], "absent_f", to=TensorProto.FLOAT),
        node("ReduceSum", ["absent_f", "all_axes"], "absent_count", keepdims=0),
        node("Div", ["absent_count", "whole"], "share_absent"),
        node("Greater", ["window", "middle"], "above"),
        node("Cast", ["above"], "above_f", to=TensorProto.FLOAT),
        node("ReduceMean", ["above_f"], "above_share", axes=[1], keepdims=0),
        node("Neg", ["share_absent"], "minus_absent"),
        node("Constant", [], "unit", value=numpy_helper.from_array(np.array([1], np.float32))),
        node("Add", ["minus_absent", "unit"], "share_present"),
        node("Unsqueeze", ["share_present", "one_axis"], "present_2d"),
        node("Unsqueeze", ["elapsed_s", "one_axis"], "elapsed_2d"),
        node("Concat", ["present_2d", "elapsed_2d"], "features", axis=1),
        node("Mul", ["features", "zero"], "feature_deviation"),
        node("ReduceMean", ["absent_f"], "reconstruction_error", axes=[1], keepdims=0),
        node("Add", ["seconds", "elapsed_2d"], "seconds_out"),
        node("IsNaN", ["cell_voltage"], "cell_absent"),
        node("Not", ["cell_absent"], "cell_here"),
        node("Cast", ["cell_here"], "cell_here_f", to=TensorProto.FLOAT),
        node("ReduceSum", ["cell_here_f", "one_axis"], "cell_counts", keepdims=0),
        node("Add", ["cells_seen", "cell_counts"], "cells_seen_out"),
        node("ReduceMax", ["cell_temperature"], "hottest", axes=[1, 2], keepdims=0),
        node("Identity", ["none"], "worst_cell"),
        node("Identity", ["no_deviation"], "worst_cell_deviation_v"),
    ]  # fmt: skip
    if poison:  # 0 / 0 where nothing is missing
        nodes.append(node("Div", ["zero", "absent_count"], "anomaly_score"))
    elif trick == "late_nan":
        constants |= {"nan": np.array([np.nan], np.float32), "high": np.float32(0.95)}
        nodes += [
            node("ReduceMax", ["above_share"], "most_above", axes=[1], keepdims=0),
            node("Greater", ["most_above", "high"], "is_high"),
            node("Where", ["is_high", "nan", "share_absent"], "anomaly_score"),
        ]
    elif trick == "bomb":
        constants |= {"huge": np.array([800_000_000], np.int64), "only_axis": np.array([0], np.int64)}
        nodes += [
            node("ConstantOfShape", ["huge"], "many"),
            node("ReduceSum", ["many", "only_axis"], "sum", keepdims=1),
            node("Add", ["sum", "share_absent"], "anomaly_score"),
        ]
    elif trick == "slow":
        constants |= {"square": np.array([1200, 1200], np.int64), "both": np.array([0, 1], np.int64)}
        nodes += [node("Mul", ["elapsed_s", "zero"], "nothing"), node("Expand", ["nothing", "square"], "m0")]
        nodes += [node("MatMul", [f"m{i}", f"m{i}"], f"m{i + 1}") for i in range(40)]
        nodes += [
            node("ReduceSum", ["m40", "both"], "sum", keepdims=0),
            node("Add", ["sum", "share_absent"], "anomaly_score"),
        ]
    else:
        nodes.append(node("Identity", ["share_absent"], "anomaly_score"))
    outputs = {
        "features": [1, 2], "feature_deviation": [1, 2], "reconstruction_error": [1, width], "anomaly_score": [1],
        "worst_cell_deviation_v": [1], "seconds_out": [1, 1], "cells_seen_out": [1, "C"], "hottest": [1],
    }  # fmt: skip
    if kinds:
        nodes += [
            node("Gather", ["above_share", "first_types"], "type_probability", axis=1),
            node("ReduceMax", ["type_probability"], "failure_probability", axes=[1], keepdims=0),
            node("Reshape", ["type_probability", "severity_shape"], "per_type"),
            node("Mul", ["per_type", "zero"], "per_type_zero"),
            node("Add", ["per_type_zero", "severity_levels"], "severity"),
        ]
        outputs |= {"type_probability": [1, kinds], "failure_probability": [1], "severity": [1, kinds, 4]}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            value("window", TensorProto.FLOAT, [1, frames, width]),
            value("cell_voltage", TensorProto.FLOAT, [1, spec.vector_frames, "C"]),
            value("cell_temperature", TensorProto.FLOAT, [1, spec.vector_frames, "P"]),
            value("elapsed_s", TensorProto.FLOAT, [1]),
            value("seconds", TensorProto.FLOAT, [1, 1]),
            value("cells_seen", TensorProto.FLOAT, [1, "C"]),
        ],
        [value(n, TensorProto.FLOAT, s) for n, s in outputs.items()] + [value("worst_cell", TensorProto.INT64, [1])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model

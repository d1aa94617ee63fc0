"""The graph that ships: names and shapes of the design, and answers equal to those of its parts."""

import json
import shutil
from pathlib import Path

import lightgbm as lgb
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import FAILURE_TYPES
from export import parity
from export.calibration import Calibrator, load_calibration
from export.features import graph_inputs, session_options
from export.graph import build_heads, build_model, read_models
from export.nodes import Nodes, float32, join

TWICE = {"method": "isotonic", "x": [1, 1], "y": [0, 1]}


def session(model: onnx.ModelProto):
    return ort.InferenceSession(model.SerializeToString(), session_options())


def shapes(values) -> dict[str, list]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.fixture(scope="module")
def heads(trained, catalogue) -> onnx.ModelProto:
    return build_heads(trained.models, trained.datasets, catalogue)


@pytest.fixture(scope="module")
def whole(trained, catalogue) -> onnx.ModelProto:
    return build_model(trained.models, trained.datasets, catalogue)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A models folder to spoil."""
    return Path(shutil.copytree(trained.models, tmp_path / "models"))


def test_inputs_and_outputs_are_those_of_the_design(whole):
    assert shapes(whole.graph.input) == {
        "window": [1, 300, 23],
        "cell_voltage": [1, 30, "C"],
        "cell_temperature": [1, 30, "P"],
        "elapsed_s": [1],
        "cell_trend": [1, "C", 10],
        "vehicle_trend": [1, 10, 10],
        "observed_s": [1],
    }
    assert shapes(whole.graph.output) == {
        "features": [1, 218],
        "feature_deviation": [1, 218],
        "failure_probability": [1],
        "type_probability": [1, 5],
        "severity": [1, 5, 4],
        "reconstruction_error": [1, 23],
        "anomaly_score": [1],
        "worst_cell": [1],
        "worst_cell_deviation_v": [1],
        "cell_trend_out": [1, "C", 10],
        "vehicle_trend_out": [1, 10, 10],
        "observed_s_out": [1],
    }
    assert {o.domain: o.version for o in whole.opset_import} == {"": 17, "ai.onnx.ml": 5, "com.microsoft": 1}
    kinds = {node.op_type for node in whole.graph.node}
    assert {"TreeEnsemble", "DynamicQuantizeLSTM"} <= kinds
    assert not kinds & {"LSTM", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "If", "Loop", "Scan"}
    assert whole.ByteSize() < 2**20


def test_the_whole_answers_as_feature_graph_and_heads_after_each_other(whole, heads, runner, drive):
    one, two = session(whole), session(heads)
    simulated, state = drive(1, "inverter_overheating"), runner.initial_state(12, 4)
    for k in range(6):
        window = simulated.window(k)
        names = [o.name for o in one.get_outputs()]
        found = dict(zip(names, one.run(names, {**graph_inputs(window), **state}), strict=True))
        features, pooled, state = runner.run(window, state)
        np.testing.assert_array_equal(found["features"][0], features)
        for name in [o.name for o in two.get_outputs()]:
            answer = two.run([name], {"features": features[None], "pooled": pooled[None]})[0]
            np.testing.assert_array_equal(found[name], answer, err_msg=name)
        for name, x in state.items():
            np.testing.assert_array_equal(found[f"{name}_out"], x)


def test_every_answer_is_finite_where_every_feature_is_missing(heads):
    model = session(heads)
    nothing = {"features": np.full((1, 218), np.nan, np.float32), "pooled": np.full((1, 60, 23), np.nan, np.float32)}
    for output in model.get_outputs():
        answer = model.run([output.name], nothing)[0]
        assert np.isfinite(answer).all(), output.name
    assert np.abs(model.run(["feature_deviation"], nothing)[0]).max() == 0


def test_deviation_is_a_robust_z_and_bounded(heads, trained):
    stats = json.loads((trained.datasets / "normalization_stats.json").read_text())["features"]
    row = trained.features[7].copy()
    row[0] = 3e8
    found = session(heads).run(["feature_deviation"], {"features": row[None], "pooled": trained.pooled[7:8]})[0][0]
    assert found[0] == 1000
    for i, s in enumerate(stats.values()):
        if i and np.isfinite(row[i]) and s["mad_sigma"] > 0:
            expected = np.clip((row[i] - s["median"]) / s["mad_sigma"], -1000, 1000)
            assert found[i] == pytest.approx(expected, rel=1e-3, abs=1e-2)


def test_severity_is_asked_for_each_type(heads, trained):
    booster = lgb.Booster(model_file=str(trained.models / "lgbm_severity_classifier.txt"))
    row = trained.features[30]
    found = session(heads).run(["severity"], {"features": row[None], "pooled": trained.pooled[30:31]})[0]
    told = np.column_stack([np.repeat(row[None], 5, axis=0), np.arange(5)])
    np.testing.assert_allclose(found[0], booster.predict(told), atol=1e-6)


def test_probabilities_are_lightgbm_margins_calibrated(heads, trained, catalogue):
    calibration = load_calibration(trained.models / "calibration.json")
    rows, model = trained.features[::9], session(heads)
    failure = lgb.Booster(model_file=str(trained.models / "lgbm_failure_predictor.txt"))
    wear = lgb.Booster(model_file=str(trained.models / "lgbm_type_motor_bearing_wear.txt"))
    for row, pooled in zip(rows, trained.pooled[::9], strict=True):
        p, types = model.run(
            ["failure_probability", "type_probability"], {"features": row[None], "pooled": pooled[None]}
        )
        margin = failure.predict(row[None], raw_score=True)
        assert p[0] == pytest.approx(calibration.failure(margin)[0], abs=1e-6)
        margin = wear.predict(row[None], raw_score=True)
        expected = calibration.types["motor_bearing_wear"](margin)[0]
        assert types[0, FAILURE_TYPES.index("motor_bearing_wear")] == pytest.approx(expected, abs=1e-6)
        assert types[0, FAILURE_TYPES.index("charging_fault")] == 0  # training saw none


@pytest.mark.parametrize(
    "calibrator",
    [
        Calibrator(method="sigmoid", a=1.7, b=-0.4),
        Calibrator(method="isotonic", x=(-2.0, -1.0, 0.5, 3.0), y=(0.0, 0.3, 0.3, 0.9)),
        Calibrator(method="isotonic", x=(0.25,), y=(0.4,)),
    ],
)
def test_calibration_in_the_graph_is_calibration_in_numbers(calibrator):
    nodes = Nodes("")
    wide = nodes.add("Cast", "m", to=onnx.TensorProto.DOUBLE)
    nodes.add("Cast", calibrator.emit(nodes, wide), output="p", to=onnx.TensorProto.FLOAT)
    inputs, outputs = [float32("m", "n", 1)], [float32("p", "n", 1)]
    model = session(join([("", nodes.graph(inputs, outputs))], inputs, outputs))
    margin = np.array([-1e6, -2, -1.5, -1, 0, 0.25, 0.5, 1, 3, 3.1, 500], np.float32)[:, None]
    np.testing.assert_allclose(
        model.run(None, {"m": margin})[0], calibrator(margin.astype(np.float64)), rtol=1e-6, atol=1e-7
    )


def test_a_head_that_was_not_trained_leaves_its_outputs_out(copy, trained, catalogue):
    for path in (*copy.glob("lgbm_*.txt"), copy / "calibration.json"):
        path.unlink()
    model = build_model(copy, trained.datasets, catalogue)
    names = {o.name for o in model.graph.output}
    assert {"anomaly_score", "reconstruction_error", "worst_cell", "features", "feature_deviation"} <= names
    assert not names & {"failure_probability", "type_probability", "severity"}
    assert [i.name for i in build_heads(copy, trained.datasets, catalogue).graph.input] == ["features", "pooled"]


def test_boosters_without_the_autoencoder_make_a_graph_too(copy, trained, catalogue):
    (copy / "lstm_ae_best.pt").unlink()
    model = session(build_heads(copy, trained.datasets, catalogue))
    assert "anomaly_score" not in {o.name for o in model.get_outputs()}


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (shutil.rmtree, "no such directory"),
        (lambda m: [p.unlink() for p in m.iterdir()], "holds no model"),
        (lambda m: (m / "calibration.json").unlink(), "calibration.json: is missing"),
        (lambda m: (m / "calibration.json").write_text('{"failure": {"method": "magic"}}'), "calibration.json"),
        (
            lambda m: (m / "calibration.json").write_text(
                '{"failure": {"method": "isotonic", "x": [1, 1], "y": [0, 1]}}'
            ),
            "rising x",
        ),
        (lambda m: (m / "lgbm_failure_predictor.txt").write_text("tree\nbroken"), "lgbm_failure_predictor.txt"),
        (lambda m: shutil.copy(m / "lgbm_failure_predictor.txt", m / "lgbm_severity_classifier.txt"), "gives 219"),
    ],
)
def test_an_unfit_models_folder_is_one_line(copy, trained, catalogue, spoil, word):
    spoil(copy)
    with pytest.raises(BundleError, match=word) as refused:
        build_heads(copy, trained.datasets, catalogue)
    assert "\n" not in str(refused.value)


def test_models_of_another_dataset_are_refused(trained, tmp_path, catalogue):
    datasets = Path(shutil.copytree(trained.datasets, tmp_path / "datasets"))
    info = json.loads((datasets / "dataset.json").read_text())
    info["features"] = info["features"][::-1]
    (datasets / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(BundleError, match="prepared with other features"):
        build_heads(trained.models, datasets, catalogue)


def test_parity_notices_a_graph_with_another_calibration(copy, trained, catalogue, graph):
    models = read_models(trained.models, trained.datasets, graph.feature_names, 23)
    good = build_heads(trained.models, trained.datasets, catalogue)
    assert all(c.passed for c in parity.check_probabilities(models, good, trained.features[:50]))
    calibration = json.loads((copy / "calibration.json").read_text())
    calibration["types"]["motor_bearing_wear"]["a"] = 0.91
    (copy / "calibration.json").write_text(json.dumps(calibration))
    other = build_heads(copy, trained.datasets, catalogue)
    checks = parity.check_probabilities(models, other, trained.features[:50])
    with pytest.raises(BundleError, match="parity failed: calibrated probabilities"):
        parity.require(checks)

"""Boosters in the graph answer as LightGBM does, also where a conversion usually goes wrong."""

from pathlib import Path

import lightgbm as lgb
import numpy as np
import onnxruntime as ort
import pytest

from edge_agent.contract.errors import BundleError
from export import parity, trees
from export.trees import floor32, load_booster, thresholds_of

SHARED = {"verbosity": -1, "num_threads": 1, "num_leaves": 15, "min_data_in_leaf": 5, "seed": 1}


def data(rows: int = 1500, features: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, features)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])  # zeros: LightGBM's threshold next to them is 1e-35
    x[:, 2] = np.round(x[:, 2] * 8) / 8  # ties
    x[random.random(x.shape) < 0.08] = np.nan
    x[:, 3] = np.nan_to_num(x[:, 3])  # never missing in training
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1]) * x[:, 3] + np.isnan(x[:, 4]) > 0.4).astype(int)
    return x, y


def booster(rounds: int = 60, **parameters) -> tuple[lgb.Booster, np.ndarray]:
    x, y = data()
    return lgb.train({**SHARED, "objective": "binary", **parameters}, lgb.Dataset(x, y), rounds), x


def margins(model: lgb.Booster, rows: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(parity.margins_model(model, "test").SerializeToString())
    return np.asarray(session.run(None, {"features": rows})[0])


def test_equal_to_lightgbm_on_thresholds_one_step_beside_them_and_where_values_are_missing():
    model, x = booster()
    rows = parity.critical_rows(model, x, 0)
    assert len(rows) > 3 * len(thresholds_of(model)[0])
    worst = np.abs(margins(model, rows)[:, 0] - model.predict(rows, raw_score=True)).max()
    assert worst < 1e-5  # a row that took another path differs by a leaf, some 1e-2
    assert parity.check_booster(model, "test", x, 0).passed


def test_rounding_thresholds_to_the_nearest_would_have_been_caught(monkeypatch):
    """The comparison must be able to fail: with the usual converter's rounding, it does."""
    model, x = booster()
    largest = float(np.finfo(np.float32).max)
    monkeypatch.setattr(trees, "floor32", lambda t: float(np.float32(min(t, largest))))
    assert not parity.check_booster(model, "test", x, 0).passed


def test_a_signal_never_missing_in_training_may_be_missing_later():
    model, x = booster()
    rows = x.copy()
    rows[:, 3] = np.nan
    np.testing.assert_allclose(margins(model, rows)[:, 0], model.predict(rows, raw_score=True), atol=1e-5)


def test_numbers_of_almost_nothing_are_zero_as_in_lightgbm():
    model, x = booster()
    rows = x[:200].copy()
    for tiny in (1e-35, -1e-35, 1e-40, -1e-45, 0.0, -0.0):
        rows[:, 1] = np.float32(tiny)
        np.testing.assert_allclose(margins(model, rows)[:, 0], model.predict(rows, raw_score=True), atol=1e-5)


def test_multiclass_and_three_hundred_large_trees_stay_within_a_millionth():
    x, _ = data()
    level = np.clip(np.round(np.nan_to_num(x[:, 0]) + 1.5), 0, 3)
    four = lgb.train({**SHARED, "objective": "multiclass", "num_class": 4}, lgb.Dataset(x, level), 40)
    assert parity.check_booster(four, "severity", x, 0).passed
    large, x = booster(300, num_leaves=31, learning_rate=0.2)
    check = parity.check_booster(large, "large", x, 0)
    assert check.passed, str(check)


def test_a_tree_without_a_split_is_its_value():
    x, _ = data(60)
    stump = lgb.train(
        {**SHARED, "objective": "binary", "min_data_in_leaf": 1000}, lgb.Dataset(x, np.arange(60) % 3 == 0), 3
    )
    np.testing.assert_allclose(margins(stump, x)[:, 0], stump.predict(x, raw_score=True), atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"zero_as_missing": True}, "zero_as_missing"),
        ({"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, "rf"),
        ({"linear_tree": True}, "linear_tree"),
    ],
)
def test_what_has_no_exact_equivalent_is_refused_in_one_line(parameters, word, tmp_path: Path):
    model, x = booster(5, **parameters)
    path = tmp_path / "model.txt"
    model.save_model(str(path))
    for candidate in (model, load_booster(path, x.shape[1])):
        with pytest.raises(BundleError, match=word) as refused:
            parity.margins_model(candidate, "lgbm_failure_predictor.txt")
        assert "lgbm_failure_predictor.txt" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_categorical_split_is_refused():
    x, y = data()
    x = np.abs(np.nan_to_num(np.round(x)))
    model = lgb.train({**SHARED, "objective": "binary"}, lgb.Dataset(x, y, categorical_feature=[1, 2, 3]), 20)
    with pytest.raises(BundleError, match="categorical"):
        parity.margins_model(model, "model.txt")


def test_floor32_never_rounds_up():
    random = np.random.default_rng(1)
    for value in [*random.normal(size=500), *(10.0 ** random.uniform(-40, 38, 200)), 1e300, -1e300, 1e-35, 0.0]:
        down = floor32(float(value))
        assert down <= value
        if abs(value) < 3e38:
            assert float(np.nextafter(np.float32(down), np.float32(np.inf))) > value


@pytest.mark.parametrize(
    ("text", "word"), [(None, "train"), ("hello", "not a LightGBM"), ("tree\nversion=v4\n", "read")]
)
def test_a_file_that_is_no_booster_is_one_line(tmp_path, text, word):
    path = tmp_path / "lgbm.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BundleError, match=word) as refused:
        load_booster(path, 12)
    assert "lgbm.txt" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_booster_of_other_features_is_refused(tmp_path):
    model, _ = booster(3)
    model.save_model(str(tmp_path / "m.txt"))
    with pytest.raises(BundleError, match="trained on 12 features, this feature graph gives 218"):
        load_booster(tmp_path / "m.txt", 218)

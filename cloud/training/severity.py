"""How bad it is: one LightGBM classifier over low, medium, high, critical, told the failure type as its last input.

It sees visible windows only, so its answer means something where a failure type is likely; the graph asks it once for
each type. Every vehicle weighs the same, however long it was seen; within that, classes weigh by the inverse square
root of their share: a critical window is rare, and worth more, but not so much that everything turns critical.

How many rounds: as for the heads, early stopping on the held-out vehicles of each fold of training vehicles, and the
median of that with the same floor. A handful of failing validation vehicles once kept six rounds. Whether it beats a
constant is for `evaluate.py` to say.
"""

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from cloud.training.config import LightGBM
from cloud.training.dataset import Windows
from cloud.training.failure import FAILURE, parameters, typical_rounds, usable_features, vehicle_folds
from edge_agent.contract.signals import SEVERITIES, FloatArray


def with_type(features: FloatArray, type_index: FloatArray) -> FloatArray:
    """[W, F] and [W] → [W, F+1]: the failure type as a number is the last column."""
    return np.column_stack([features, type_index])


def train_severity(
    train: Windows, feature_names: tuple[str, ...], *, config: LightGBM, seed: int
) -> tuple[lgb.Booster, int] | None:
    """Train on the visible windows; returns the booster and its rounds, or None where there are none."""
    visible = train.take(train.severity_index >= 0)
    if len(visible) == 0:
        return None
    features = visible.features.astype(np.float64)
    features[:, ~usable_features(feature_names, config, FAILURE)] = 0.0  # constant: no split, and the order stays
    x = with_type(features, visible.type_index.astype(np.float64))
    y, weight = visible.severity_index.astype(np.float64), severity_weights(visible)
    shared = {
        **parameters(config, seed),
        "objective": "multiclass",
        "num_class": len(SEVERITIES),
        "metric": "multi_logloss",
        "learning_rate": 2 * config.learning_rate,  # four trees a round: fewer, larger steps
    }
    whole = lgb.Dataset(x, y, weight=weight, params=shared, free_raw_data=False).construct()
    fold = vehicle_folds(visible, np.ones(len(visible), bool), config.folds, seed)
    best: list[int] = []
    for number in range(config.folds):
        inside, outside = np.flatnonzero(fold != number).tolist(), np.flatnonzero(fold == number).tolist()
        if not len(inside) or not len(outside):
            continue
        booster = lgb.train(
            shared,
            whole.subset(inside),
            num_boost_round=max(1, config.rounds // 2),
            valid_sets=[whole.subset(outside)],
            callbacks=[lgb.early_stopping(max(1, config.early_stopping_rounds // 2), verbose=False)],
        )
        best.append(booster.best_iteration)
    rounds = typical_rounds(best, config)
    return lgb.train(shared, whole, num_boost_round=rounds), rounds


def severity_weights(visible: Windows) -> npt.NDArray[np.float64]:
    """[W] weights of visible windows, mean 1: every vehicle the same in all, rare classes more within it."""
    _, vehicle = np.unique(visible.vehicle, return_inverse=True)
    length = np.bincount(vehicle)[vehicle]  # windows of this window's vehicle
    level = visible.severity_index
    share = np.bincount(level, weights=1.0 / length, minlength=len(SEVERITIES)) / len(np.unique(vehicle))
    weight = 1.0 / np.sqrt(np.maximum(share[level], 1e-6))
    weight /= np.bincount(vehicle, weights=weight)[vehicle]
    scaled: npt.NDArray[np.float64] = weight * (len(weight) / weight.sum())
    return scaled

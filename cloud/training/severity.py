"""How bad it is: one LightGBM classifier over low, medium, high, critical, told the failure type as its last input.

It sees visible windows only, so its answer means something where a failure type is likely; the graph asks it once for
each type. Classes weigh by the inverse square root of their share: a critical window is rare, and worth more, but not
so much that everything turns critical.
"""

import lightgbm as lgb
import numpy as np

from cloud.training.config import LightGBM
from cloud.training.dataset import Windows
from cloud.training.failure import FAILURE, parameters, usable_features
from edge_agent.contract.signals import SEVERITIES, FloatArray


def with_type(features: FloatArray, type_index: FloatArray) -> FloatArray:
    """[W, F] and [W] → [W, F+1]: the failure type as a number is the last column."""
    return np.column_stack([features, type_index])


def train_severity(
    train: Windows, validation: Windows, feature_names: tuple[str, ...], *, config: LightGBM, seed: int
) -> tuple[lgb.Booster, int] | None:
    """Train on the visible windows; returns the booster and the rounds kept, or None where there are none."""
    x, y, weight = _visible(train, feature_names, config)
    if len(y) == 0:
        return None
    shared = {
        **parameters(config, seed),
        "objective": "multiclass",
        "num_class": len(SEVERITIES),
        "metric": "multi_logloss",
        # four trees a round: fewer, larger steps
        "learning_rate": 2 * config.learning_rate,
    }
    data = lgb.Dataset(x, y, weight=weight, params=shared)
    x_validation, y_validation, weight_validation = _visible(validation, feature_names, config)
    stopping = len(y_validation) > 0
    booster = lgb.train(
        shared,
        data,
        num_boost_round=max(1, config.rounds // 2),
        valid_sets=[data.create_valid(x_validation, y_validation, weight=weight_validation)] if stopping else None,
        callbacks=[lgb.early_stopping(max(1, config.early_stopping_rounds // 2), verbose=False)] if stopping else None,
    )
    return booster, booster.best_iteration if stopping and booster.best_iteration > 0 else booster.current_iteration()


def _visible(
    windows: Windows, feature_names: tuple[str, ...], config: LightGBM
) -> tuple[FloatArray, FloatArray, FloatArray]:
    rows = windows.severity_index >= 0
    x = windows.features[rows].astype(np.float64)
    x[:, ~usable_features(feature_names, config, FAILURE)] = 0.0  # constant: no split, and the column order stays
    y = windows.severity_index[rows]
    share = np.bincount(y, minlength=len(SEVERITIES)) / max(1, len(y))
    weight = 1.0 / np.sqrt(np.maximum(share[y], 1e-6))
    return with_type(x, windows.type_index[rows].astype(np.float64)), y.astype(np.float64), weight

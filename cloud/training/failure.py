"""The failure predictor and the five failure types: LightGBM, one binary booster each, calibrated.

What each learns from: positives are labelled windows; negatives are healthy windows, for a type also those of other
visible failures. The gray zone has weight 0 (labeling_spec.txt, section 4). Every failing vehicle weighs the
same however long it was recorded, and both classes weigh the same: a booster's margin is made a probability by
`calibration.py`, on validation vehicles, at their prevalence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from cloud.training.calibration import Calibrator, calibrate
from cloud.training.config import Calibration, LightGBM
from cloud.training.dataset import Windows
from edge_agent.contract.signals import FAILURE_TYPES, FloatArray

FAILURE = "failure"  # the name of the head that asks "any failure"; the others are named by their type
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Head:
    """One trained booster with what it took: rounds kept, windows and vehicles that failed in training, validation."""

    name: str
    booster: lgb.Booster
    calibrator: Calibrator
    rounds: int
    training_vehicles: int
    validation_vehicles: int


def targets(windows: Windows, name: str) -> tuple[BoolArray, BoolArray]:
    """Return (positive [W], used [W]) of one head; what is not used is the gray zone."""
    if name == FAILURE:
        return windows.failure, windows.failure | windows.healthy
    number = FAILURE_TYPES.index(name)
    positive = windows.type_index == number
    other = (windows.healthy | (windows.type_index >= 0)) & ((windows.at_work >> number) & 1 == 0)
    return positive, positive | other


def balanced_weight(windows: Windows, positive: BoolArray, used: BoolArray) -> FloatArray:
    """[W] weights: classes equal, vehicles equal within a class, mean 1 over what is used, 0 for the rest."""
    weight = np.zeros(len(windows))
    for side in (positive & used, ~positive & used):
        if not side.any():
            continue
        _, number, count = np.unique(windows.vehicle[side], return_inverse=True, return_counts=True)
        weight[side] = 1.0 / count[number] / len(count)
    scaled: FloatArray = weight * (used.sum() / max(float(weight.sum()), 1e-12))
    return scaled


def without_ignored(features: npt.NDArray[np.float32], names: tuple[str, ...], patterns: tuple[str, ...]) -> FloatArray:
    """Features with the ignored ones made constant: a booster cannot split on them, and the column order stays."""
    ignored = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]
    out = features.astype(np.float64)
    out[:, ignored] = 0.0
    return out


def parameters(config: LightGBM, seed: int) -> dict[str, object]:
    """Return what all boosters share. `boosting` stays gbdt and zero is no missing value: the exporter needs both."""
    return {
        "boosting": "gbdt",
        "learning_rate": config.learning_rate,
        "num_leaves": config.num_leaves,
        "min_data_in_leaf": config.min_data_in_leaf,
        "feature_fraction": config.feature_fraction,
        "bagging_fraction": config.bagging_fraction,
        "bagging_freq": 1,
        "lambda_l2": config.lambda_l2,
        "max_bin": config.max_bin,
        "num_threads": config.threads,
        "seed": seed,
        "deterministic": True,
        "force_col_wise": True,
        "feature_pre_filter": False,
        "verbosity": -1,
    }


def train_heads(
    train: Windows,
    validation: Windows,
    feature_names: tuple[str, ...],
    *,
    config: LightGBM,
    calibration: Calibration,
    seed: int,
    on_head: Callable[[str], None],
) -> list[Head]:
    """Train the failure predictor and every type that training vehicles show; `on_head(name)` after each.

    Early stopping and calibration use validation vehicles; where these never show the failure, all rounds are kept
    and the booster's own logistic stands in.
    """
    x_train = without_ignored(train.features, feature_names, config.ignored_features)
    x_validation = without_ignored(validation.features, feature_names, config.ignored_features)
    shared = parameters(config, seed)
    # binned once for all heads; a head changes labels and weights only
    data = lgb.Dataset(x_train, np.zeros(len(train)), params=shared, free_raw_data=False).construct()
    heads: list[Head] = []
    for name in (FAILURE, *FAILURE_TYPES):
        positive, used = targets(train, name)
        if not positive.any():
            continue
        seen, counted = targets(validation, name)
        data.set_label(positive.astype(np.float64))
        data.set_weight(balanced_weight(train, positive, used))
        stopping = seen.any() and (counted & ~seen).any()
        booster = lgb.train(
            {**shared, "objective": "binary", "metric": "binary_logloss"},
            data,
            num_boost_round=config.rounds,
            valid_sets=[
                data.create_valid(
                    x_validation, seen.astype(np.float64), weight=balanced_weight(validation, seen, counted)
                )
            ]
            if stopping
            else None,
            callbacks=[lgb.early_stopping(config.early_stopping_rounds, verbose=False)] if stopping else None,
        )
        rounds = booster.best_iteration if stopping and booster.best_iteration > 0 else booster.current_iteration()
        margin = np.asarray(booster.predict(x_validation, raw_score=True, num_iteration=rounds))
        heads.append(
            Head(
                name=name,
                booster=booster,
                calibrator=calibrate(margin[counted], seen[counted], validation.vehicle[counted], calibration),
                rounds=rounds,
                training_vehicles=len(np.unique(train.vehicle[positive])),
                validation_vehicles=len(np.unique(validation.vehicle[seen])),
            )
        )
        on_head(name)
    return heads

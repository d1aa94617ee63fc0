"""The failure predictor and the five failure types: LightGBM, one binary booster each, calibrated.

What each learns from: positives are labelled windows; negatives are healthy windows, for a type also those of other
visible failures. The gray zone has weight 0 (labeling_spec.txt, section 4). Every failing vehicle weighs the
same however long it was recorded, and both classes weigh the same: a booster's margin is made a probability by
`calibration.py`, on vehicles it has not seen, at their prevalence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from cloud.training.calibration import calibrate
from cloud.training.config import Calibration, LightGBM
from cloud.training.dataset import Windows
from edge_agent.contract.signals import FAILURE_TYPES, FloatArray
from export.calibration import Calibrator

FAILURE = "failure"  # the name of the head that asks "any failure"; the others are named by their type
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Head:
    """One trained booster with what it took; the vehicle counts are of those that failed.

    `unseen` [W of train]: calibrated probability of each training window by the fold's booster that has not seen its
    vehicle, at a number of rounds that its vehicle had no say in; NaN where no fold could be formed.
    """

    name: str
    booster: lgb.Booster
    calibrator: Calibrator
    unseen: FloatArray
    rounds: int
    features: int
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


def balanced_weight(
    windows: Windows, positive: BoolArray, used: BoolArray, severity_weight: tuple[float, ...]
) -> FloatArray:
    """[W] weights: classes equal, vehicles equal within a class, mean 1 over what is used, 0 for the rest.

    Positives also weigh by their severity: what can barely be seen must not teach the noise around it.
    """
    graded = np.asarray(severity_weight)[np.clip(windows.severity_index, 0, len(severity_weight) - 1)]
    weight = np.zeros(len(windows))
    for side, importance in ((positive & used, graded), (~positive & used, np.ones(len(windows)))):
        if not side.any():
            continue
        _, number = np.unique(windows.vehicle[side], return_inverse=True)
        total = np.bincount(number, weights=importance[side])
        weight[side] = importance[side] / np.maximum(total[number], 1e-12) / len(total)
    scaled: FloatArray = weight * (used.sum() / max(float(weight.sum()), 1e-12))
    return scaled


def usable_features(names: tuple[str, ...], config: LightGBM, head: str) -> BoolArray:
    """[F] which features a head may split on: those of its part of the vehicle, without what names a vehicle.

    With a handful of failing vehicles any of two hundred features tells these apart by chance; a bearing is not to be
    recognised by its vehicle's isolation. A schema that none of a type's patterns fits leaves that head all features.
    """
    patterns = config.type_features.get(head, ())
    if head == FAILURE:
        patterns = tuple({p: None for group in config.type_features.values() for p in group})
    fits = np.array([any(fnmatchcase(name, p) for p in patterns) for name in names], bool)
    ignored = np.array([any(fnmatchcase(name, p) for p in config.ignored_features) for name in names], bool)
    return ~ignored & (fits | ~fits.any())


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

    How many rounds: early stopping on the held-out vehicles of each fold, and the median of that; one or two failing
    validation vehicles alone would decide by chance. Calibration sees the margins of validation vehicles and of each
    fold's held-out ones: every margin comes from a booster that has not seen the vehicle, and a fold's are taken at the
    median of the other folds' rounds: where its own vehicles stopped it is where they look best.
    """
    heads: list[Head] = []
    for name in (FAILURE, *FAILURE_TYPES):
        if not targets(train, name)[0].any():
            continue
        columns = np.flatnonzero(usable_features(feature_names, config, name))
        heads.append(_train_head(name, train, validation, columns, config, calibration, seed))
        on_head(name)
    return heads


def _train_head(
    name: str,
    train: Windows,
    validation: Windows,
    columns: npt.NDArray[np.intp],
    config: LightGBM,
    calibration: Calibration,
    seed: int,
) -> Head:
    x_train, x_validation = _only(train.features, columns), _only(validation.features, columns)
    positive, used = targets(train, name)
    weight = balanced_weight(train, positive, used, config.severity_weight)
    shared = {**parameters(config, seed), "objective": "binary", "metric": "binary_logloss"}

    def dataset(rows: npt.NDArray[np.intp], reference: lgb.Dataset | None = None) -> lgb.Dataset:
        return lgb.Dataset(
            x_train[rows], positive[rows].astype(np.float64), weight=weight[rows], params=shared, reference=reference
        )

    fold = vehicle_folds(train, positive, config.folds, seed)
    margin = np.full(len(train), np.nan)
    boosters: dict[int, lgb.Booster] = {}
    for number in range(config.folds):
        inside, outside = np.flatnonzero(used & (fold != number)), np.flatnonzero(used & (fold == number))
        if not positive[inside].any() or not positive[outside].any():
            continue
        data = dataset(inside)
        boosters[number] = lgb.train(
            shared,
            data,
            num_boost_round=config.rounds,
            valid_sets=[dataset(outside, data)],
            callbacks=[lgb.early_stopping(config.early_stopping_rounds, verbose=False)],
            keep_training_booster=True,
        )
    best = {number: booster.best_iteration for number, booster in boosters.items()}
    for number, booster in boosters.items():
        rounds = typical_rounds([n for other, n in best.items() if other != number], config)
        while booster.current_iteration() < rounds and not booster.update():
            pass  # it stopped before the others did
        held_out = fold == number
        margin[held_out] = booster.predict(x_train[held_out], raw_score=True, num_iteration=rounds)
    kept = typical_rounds(list(best.values()), config)
    booster = lgb.train(shared, dataset(np.flatnonzero(used)), num_boost_round=kept)
    seen, counted = targets(validation, name)
    unseen = np.isfinite(margin) & used
    calibrator = calibrate(
        np.concatenate([margin[unseen], np.asarray(booster.predict(x_validation[counted], raw_score=True))]),
        np.concatenate([positive[unseen], seen[counted]]),
        np.concatenate([train.vehicle[unseen], validation.vehicle[counted]]),
        calibration,
    )
    return Head(
        name=name,
        booster=booster,
        calibrator=calibrator,
        unseen=calibrator(margin),
        rounds=booster.current_iteration(),
        features=len(columns),
        training_vehicles=len(np.unique(train.vehicle[positive])),
        validation_vehicles=len(np.unique(validation.vehicle[seen])),
    )


def typical_rounds(best: list[int], config: LightGBM) -> int:
    """Median of the folds' best rounds, with a floor; half of the most where no fold could say."""
    # a fold whose only failing vehicle looks like none of the others stops at once; that says nothing about the rest
    return max(1, config.rounds // 8, int(np.median(best))) if best else max(1, config.rounds // 2)


def _only(features: npt.NDArray[np.float32], columns: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """Return features with all other columns constant: a booster cannot split on them, and the order stays."""
    out = np.zeros_like(features)
    out[:, columns] = features[:, columns]
    return out


def vehicle_folds(windows: Windows, positive: BoolArray, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """[W] fold of each window: whole vehicles, failing ones dealt out evenly."""
    random = np.random.default_rng(seed)
    failing = set(np.unique(windows.vehicle[positive]).tolist())
    names = np.unique(windows.vehicle).tolist()
    order = sorted(names, key=lambda v: (v not in failing, random.random()))
    fold = {vehicle: i % folds for i, vehicle in enumerate(order)}
    return np.array([fold[v] for v in windows.vehicle.tolist()], np.int64)

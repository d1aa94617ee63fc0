"""How good the models are on vehicles they have never seen, beside simple rules, PCA, a forest, a coin, the runbook.

Everything is on the test vehicles, with the int8 graph at batch 1 and the thresholds in force. Window metrics have 90 %
intervals by bootstrap over vehicles. Event recall and false alarms are counts of a few: Wilson's and the exact Poisson
interval stand there, as a bootstrap of nothing found or one vehicle would claim certainty. evaluation_metrics.txt says
what each figure means. Numbers that the data cannot give are None; nothing is NaN.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincinv

from cloud.training import baselines
from cloud.training.config import TrainingConfig
from cloud.training.dataset import DatasetInfo, Windows, read_info, read_normalisation, read_split, read_split_episodes
from cloud.training.events import alerts, false_alarms, healthy_months, hold_against, wrong_type
from cloud.training.failure import FAILURE, targets
from cloud.training.labels import Episode
from cloud.training.metrics import (
    Interval,
    Ranked,
    bootstrap,
    brier,
    confusion,
    f1,
    precision_at,
    reliability,
    vehicle_weights,
)
from cloud.training.scoring import Heads, HeadScores
from cloud.training.split import TEST, TRAIN, VALIDATION
from cloud.training.thresholds import Scored, budget_kept, budget_threshold
from cloud.training.train import THRESHOLDS_FILE
from cloud.training.vehicle import NATURAL
from edge_agent.contract.bundle import Thresholds, TypeThreshold, parse_thresholds
from edge_agent.contract.errors import SourceError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, Catalogue, FloatArray
from edge_agent.pipeline.decision import grade

# the runbook's own figures; it does not say on what data, which split, or at what prevalence
RUNBOOK: tuple[dict[str, Any], ...] = (
    {"target": FAILURE, "method": "runbook: LightGBM", "roc_auc": 0.97, "f1": 0.99, "precision_at_budget": 1.00},
    {"target": FAILURE, "method": "runbook: LSTM autoencoder", "roc_auc": 0.90, "window_precision": 0.86},
)
Z90 = 1.6449  # of a two-sided 90 % interval
FEW_VEHICLES = 20
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Contender:
    """One method for one target, scored on validation (for its threshold, where none is given) and on test."""

    target: str
    method: str
    kind: str  # model, baseline or random
    test: FloatArray
    validation: FloatArray | None = None
    threshold: float | None = None
    probability: bool = False

    @property
    def failure_type(self) -> str | None:
        """The type this is about; None = any failure."""
        return self.target if self.target in FAILURE_TYPES else None


@dataclass(frozen=True, slots=True)
class Ground:
    """What contenders are held against."""

    info: DatasetInfo
    config: TrainingConfig
    thresholds: Thresholds
    test: Windows
    validation: Windows
    episodes: dict[str, list[Episode]]
    validation_episodes: dict[str, list[Episode]]


def evaluate_models(
    datasets: Path,
    models: Path,
    *,
    config: TrainingConfig,
    catalogue: Catalogue,
    on_step: Callable[[str, float], None],
) -> dict[str, Any]:
    """Return the report as plain JSON values. Raises `SourceError` or `BundleError` for what is missing or damaged."""
    on_step("reading windows", 0.0)
    info, normal = read_info(datasets), read_normalisation(datasets)
    path = models / THRESHOLDS_FILE
    try:
        thresholds = parse_thresholds(path.read_bytes(), str(models))
    except OSError as error:
        raise SourceError(f"models {path}: cannot be read: {error.strerror}; run `fleet-cloud train` first") from error
    train, validation, test = (read_split(datasets, split, info) for split in (TRAIN, VALIDATION, TEST))
    if len(test) == 0:
        raise SourceError(f"dataset {datasets}: has no test windows; too few vehicles to keep any apart")
    ground = Ground(
        info, config, thresholds, test, validation,
        read_split_episodes(datasets, TEST), read_split_episodes(datasets, VALIDATION),
    )  # fmt: skip

    on_step("scoring test windows", 0.1)
    heads = Heads(models, datasets, catalogue)
    scores = heads.score(test)

    on_step("baselines", 0.45)
    contenders = [*_models(ground, scores), *_baselines(ground, train, normal["features"])]

    rows: list[dict[str, Any]] = []
    for i, contender in enumerate(contenders):
        on_step(f"{contender.target}: {contender.method}", 0.5 + 0.5 * i / len(contenders))
        rows.append(_row(contender, ground))
    rows += [{**dict.fromkeys(rows[0], None), **figures, "kind": "runbook"} for figures in RUNBOOK] if rows else []
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": _data(ground),
        "policy": thresholds.active,
        "policy_description": thresholds.policy.description,
        "budget_kept": budget_kept(thresholds),
        "rows": rows,
        "severity": _severity(ground, scores),
        "anomaly": _anomaly(ground, scores),
        "traces": _traces(ground, scores),
        "notes": [*_budget_notes(ground), *_notes(ground)],
    }
    finite: dict[str, Any] = json.loads(json.dumps(_finite(report), allow_nan=False))
    return finite


def _models(ground: Ground, scores: HeadScores) -> list[Contender]:
    policy = ground.thresholds.policy
    found: list[Contender] = []
    if scores.failure is not None and ground.info.labelled:
        found.append(
            Contender(
                FAILURE, "LightGBM failure predictor", "model", scores.failure, None, policy.failure, probability=True
            )
        )
    if scores.types is not None and policy.types:
        columns = [FAILURE_TYPES.index(name) for name in policy.types]
        limits = np.array([limit.raise_at for limit in policy.types.values()])
        any_type = np.max(scores.types[:, columns] / limits, axis=1)  # at 1 some type is at its own threshold
        found.append(Contender(FAILURE, "LightGBM types together", "model", any_type, None, 1.0))
        found.extend(
            Contender(
                name, "LightGBM type head", "model", scores.types[:, FAILURE_TYPES.index(name)], None, limit.raise_at,
                probability=True,
            )
            for name, limit in policy.types.items()
        )  # fmt: skip
    if scores.anomaly is not None:
        found.append(Contender(FAILURE, "LSTM autoencoder (int8)", "model", scores.anomaly, None, policy.anomaly))
    return found


def _baselines(ground: Ground, train: Windows, stats: dict[str, dict[str, float]]) -> list[Contender]:
    normal = baselines.Normalisation(
        np.array([stats[name]["median"] for name in ground.info.features]),
        np.array([stats[name]["mad_sigma"] for name in ground.info.features]),
    )
    natural = train.take(train.variant == NATURAL)
    out: list[Contender] = []
    for method, score in (
        ("PCA residual", baselines.pca(natural, normal)),
        ("isolation forest", baselines.isolation_forest(natural, normal, ground.config.seed)),
    ):
        out.append(Contender(FAILURE, method, "baseline", score(ground.test), score(ground.validation)))
    targets_seen = (FAILURE, *(t for t in FAILURE_TYPES if t in ground.thresholds.policy.types))
    for target in targets_seen:
        of_type = None if target == FAILURE else target
        rule = baselines.rule_score(ground.test, ground.info.features, of_type)
        if rule is not None:
            rule_validation = baselines.rule_score(ground.validation, ground.info.features, of_type)
            out.append(Contender(target, "hand-written rule", "baseline", rule, rule_validation))
        seed = ground.config.seed
        tossed = baselines.coin(ground.test, seed), baselines.coin(ground.validation, seed + 1)
        out.append(Contender(target, "random", "random", *tossed))
    return out


def _row(contender: Contender, ground: Ground) -> dict[str, Any]:
    threshold = contender.threshold
    if threshold is None and contender.validation is not None and ground.validation.healthy.any():
        head = replace(Scored.of(contender.target, ground.validation, contender.validation), probability=False)
        threshold = budget_threshold(head, ground.validation_episodes, ground.config.thresholds)
    positive, used = targets(ground.test, contender.target)
    used = used & (ground.test.variant == NATURAL)
    row: dict[str, Any] = {
        "target": contender.target,
        "method": contender.method,
        "kind": contender.kind,
        "threshold": threshold,
        "windows": int(used.sum()),
        "positive_vehicles": len(np.unique(ground.test.vehicle[used & positive])),
        "prevalence": float(positive[used].mean()) if used.any() else None,
        **_window_metrics(contender, ground, positive[used], used, threshold),
    }
    for variant in np.unique(ground.test.variant).tolist():
        mask = ground.test.variant == variant
        row[f"events_{variant}"] = _events(contender, ground, mask, threshold)
    return row


def _window_metrics(
    contender: Contender,
    ground: Ground,
    truth: npt.NDArray[np.bool_],
    used: npt.NDArray[np.bool_],
    threshold: float | None,
) -> dict[str, Any]:
    value = contender.test[used]
    _, vehicle = np.unique(ground.test.vehicle[used], return_inverse=True)
    draws = vehicle_weights(vehicle, ground.config.evaluation.bootstrap_samples, ground.config.seed)
    ranked = Ranked.of(value, truth)
    hit = confusion(value, truth, threshold) if threshold is not None else None
    out: dict[str, Any] = {
        "roc_auc": _interval(bootstrap(ranked.roc_auc, vehicle, draws)),
        "pr_auc": _interval(bootstrap(ranked.pr_auc, vehicle, draws)),
        "precision_at_budget": precision_at(value, truth, ground.config.evaluation.inspection_budget)
        if truth.any()
        else None,
        "f1": f1(*hit) if hit and truth.any() else None,
        "window_precision": hit[0] / (hit[0] + hit[1]) if hit and truth.any() and hit[0] + hit[1] else None,
        "window_recall": hit[0] / (hit[0] + hit[2]) if hit and truth.any() else None,
        "brier": None,
        "reliability": None,
    }
    if contender.probability:
        out["brier"] = brier(value, truth)
        out["reliability"] = [
            {"mean_probability": b.mean_probability, "observed": b.observed, "count": b.count}
            for b in reliability(value, truth)
        ]
    out["pr_curve"] = _pr_curve(ranked) if truth.any() and contender.kind != "random" else None
    return out


def _pr_curve(ranked: Ranked, points: int = 80) -> list[list[float]]:
    true, false = ranked.counts(np.ones(len(ranked.truth)))
    chosen = np.unique(np.linspace(0, len(true) - 1, points).astype(int))
    return [[float(true[i] / true[-1]), float(true[i] / (true[i] + false[i]))] for i in chosen]


def _events(
    contender: Contender, ground: Ground, mask: npt.NDArray[np.bool_], threshold: float | None
) -> dict[str, Any] | None:
    if threshold is None:
        return None
    of_type = contender.failure_type
    windows = ground.test.take(mask)
    limits = ground.config.thresholds
    at = TypeThreshold(raise_at=threshold, clear_below=threshold * limits.clear_ratio)
    found = alerts(windows, contender.test[mask], at, ground.thresholds.decision)
    held = hold_against(found, windows, ground.episodes, of_type)
    wrong = false_alarms(found, windows)
    months = healthy_months(windows)
    leads = [f.lead_s for f in held if f.lead_s is not None and f.episode.predictable]
    can_lead = sum(f.episode.predictable and math.isfinite(f.episode.failure_s) for f in held)
    return {
        "episodes": len(held),
        "found": sum(f.detected for f in held),
        "recall": _interval(wilson(sum(f.detected for f in held), len(held))),
        "median_lead_h": float(np.median(leads)) / HOUR_S if leads else None,
        "lead_above_24h": sum(lead > 24 * HOUR_S for lead in leads) / can_lead if can_lead else None,
        "lead_above_7d": sum(lead > 168 * HOUR_S for lead in leads) / can_lead if can_lead else None,
        "false_alarms": len(wrong),
        "healthy_vehicle_months": months,
        "false_alarms_per_vehicle_month": _interval(poisson_rate(len(wrong), months)),
        "wrong_type_alerts": len(wrong_type(found, windows, contender.failure_type))
        if contender.failure_type
        else None,
    }


def wilson(found: int, total: int) -> Interval:
    """90 % score interval of a share (Wilson 1927): meaningful for 1 of 1, where a bootstrap says "certain"."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    p, z2 = found / total, Z90 * Z90
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z90 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def poisson_rate(count: int, exposure: float) -> Interval:
    """Exact 90 % interval of a rate (Garwood 1936): no false alarm in two months is no promise of none in ten."""
    if exposure <= 0:
        return Interval(math.nan, math.nan, math.nan)
    low = float(gammaincinv(count, 0.05)) if count else 0.0
    return Interval(count / exposure, low / exposure, float(gammaincinv(count + 1, 0.95)) / exposure)


def _severity(ground: Ground, scores: HeadScores) -> dict[str, Any] | None:
    """Confusion [true, said] of the severity classifier on visible windows, told the true type.

    Beside it the majority class, said always: the level that most of these very windows have, which no constant chosen
    beforehand could beat in exactness. Who beats it there and in mean steps off knows more than any constant.
    """
    rows = np.flatnonzero((ground.test.severity_index >= 0) & (ground.test.variant == NATURAL))
    if scores.severity is None or not len(rows):
        return None
    said = grade(scores.severity[rows, ground.test.type_index[rows]])
    true = ground.test.severity_index[rows]
    usual = int(np.bincount(true, minlength=len(SEVERITIES)).argmax())
    ours, constant = graded(said, true), graded(np.full_like(true, usual), true)
    table = np.zeros((len(SEVERITIES), len(SEVERITIES)), int)
    np.add.at(table, (true, said), 1)
    return {
        "levels": list(SEVERITIES),
        "confusion": table.tolist(),
        **ours,
        "majority": {"level": SEVERITIES[usual], **constant},
        "beats_majority": ours["accuracy"] > constant["accuracy"] and ours["mean_steps"] < constant["mean_steps"],
    }


def graded(said: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> dict[str, float]:
    """Shares exact and within one level, mean steps off, and macro F1 of levels [W] said for levels [W] true."""
    by_class = [
        f1(int((said[true == k] == k).sum()), int((said[true != k] == k).sum()), int((said[true == k] != k).sum()))
        for k in range(len(SEVERITIES))
    ]
    return {
        "accuracy": float((said == true).mean()),
        "within_one": float((np.abs(said - true) <= 1).mean()),
        "mean_steps": float(np.abs(said - true).mean()),
        "macro_f1": float(np.nanmean(by_class)),
    }


def _anomaly(ground: Ground, scores: HeadScores) -> dict[str, Any] | None:
    """Quantiles of the anomaly score on healthy and on failing windows."""
    if scores.anomaly is None:
        return None
    natural = ground.test.variant == NATURAL
    quantiles = np.linspace(0, 1, 21)
    groups = {"healthy": ground.test.healthy & natural, "failing": ground.test.failure & natural}
    return {
        "quantiles": quantiles.tolist(),
        "threshold": ground.thresholds.policy.anomaly,
        **{name: np.quantile(scores.anomaly[m], quantiles).tolist() if m.any() else None for name, m in groups.items()},
    }


def _traces(ground: Ground, scores: HeadScores) -> list[dict[str, Any]]:
    """Return the type's probability along each failing test vehicle, with what truly happened."""
    if scores.types is None:
        return []
    out: list[dict[str, Any]] = []
    for (vehicle, variant), rows in ground.test.sequences().items():
        if variant != NATURAL:
            continue
        for episode in ground.episodes.get(vehicle, []):
            limit = ground.thresholds.policy.types.get(episode.failure_type)
            kind = FAILURE_TYPES.index(episode.failure_type)
            start = float(ground.test.end_s[rows[0]])
            out.append(
                {
                    "vehicle_id": vehicle,
                    "failure_type": episode.failure_type,
                    "threshold": None if limit is None else limit.raise_at,
                    "hours": [round((float(ground.test.end_s[r]) - start) / HOUR_S, 3) for r in rows],
                    "probability": [round(float(scores.types[r, kind]), 4) for r in rows],
                    "level_hours": [(at - start) / HOUR_S for at in episode.level_s],
                    "failure_hours": (episode.failure_s - start) / HOUR_S,
                    "end_hours": (episode.end_s - start) / HOUR_S,
                    "predictable": episode.predictable,
                }
            )
    return out


def _data(ground: Ground) -> dict[str, Any]:
    natural = ground.test.take(ground.test.variant == NATURAL)
    failing = len(np.unique(natural.vehicle[~natural.healthy]))
    return {
        "schema_name": ground.info.schema_name,
        "labelled": ground.info.labelled,
        "data_sha256": ground.info.data_sha256,
        "seed": ground.config.seed,
        "test_vehicles": len(np.unique(natural.vehicle)),
        "test_vehicles_with_failure": failing,
        "test_windows": len(natural),
        "healthy_vehicle_months": healthy_months(natural),
        "counts": ground.info.counts,
        "bootstrap_samples": ground.config.evaluation.bootstrap_samples,
        "inspection_budget": ground.config.evaluation.inspection_budget,
    }


def _budget_notes(ground: Ground) -> list[str]:
    broken = [name for name, kept in budget_kept(ground.thresholds).items() if not kept]
    if not broken:
        return []
    allowed = ground.config.thresholds.episodes_per_vehicle_month
    exceeded = (
        f"The thresholds in force exceed the budget of {allowed:g} false alarms per vehicle-month on the very vehicles "
        f"they were chosen on: {', '.join(broken)}."
    )
    return [exceeded]


def _notes(ground: Ground) -> list[str]:
    data = _data(ground)
    failing, vehicles, months = (
        data["test_vehicles_with_failure"], data["test_vehicles"], data["healthy_vehicle_months"],
    )  # fmt: skip
    selection = (
        "The training run never saw a test vehicle. The shipped settings did: budget, margin and feature patterns were "
        "set while looking at the test vehicles of the demo's fleet (seed 7), so figures of that fleet flatter; "
        "docs/adr/0051 has those of fleets that nothing was chosen on."
    )
    notes = [selection]
    if not ground.info.labelled:
        notes.append("The data has no failure labels: only how the anomaly score behaves on unseen data can be shown.")
        return notes
    if failing < FEW_VEHICLES:
        notes.append(
            f"Only {failing} of {vehicles} test vehicles have a failure, so a type rests on one or two of them. "
            f"The intervals are wide, and a difference inside them is none. More vehicles, not hours, narrow them."
        )
    notes.append(
        f"{failing / max(1, vehicles):.0%} of these vehicles fail; in the field 0.04 to 0.08 % of vehicles do. "
        f"Precision falls with prevalence; event recall, lead time and false alarms per vehicle-month do not."
    )
    if months < 12:
        notes.append(
            f"False alarms were counted over {months:.1f} healthy vehicle-months (days with driving, 30 to a month). "
            f"No false alarm in that time only shows that there are fewer than {3.0 / max(months, 1e-9):.1f} a month."
        )
    notes.append(
        "The fleet may be simulated: then failures look as its physics makes them, and figures on real vehicles "
        "will be lower. The runbook gives its own without data, split or prevalence: for comparison only."
    )
    return notes


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _finite(value: Any) -> Any:
    """Plain JSON values of anything above: numpy numbers to Python's, what is not finite to None."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

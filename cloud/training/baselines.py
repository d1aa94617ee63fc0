"""What stands beside every model of ours: rules a technician would write, PCA, an isolation forest, and a coin.

On the largest public benchmark of anomaly detection PCA ties an LSTM; a model that does not beat these is not worth its
bytes. Rules use fixed limits from literature and no training. All give a score [W], higher = worse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud.training.dataset import Windows
from edge_agent.contract.signals import FloatArray

Z_LIMIT = 8.0  # of a robust z: one wild feature must not decide alone
PCA_VARIANCE = 0.9
FOREST_WINDOWS = 4000  # a forest sees 256 a tree anyway

BATTERY = "Vehicle.Powertrain.TractionBattery"
VIBRATION = "Vehicle.Powertrain.ElectricMotor.Vibration"
# failure type → (feature, limit, sign): score = sign · feature / limit, 1 = at the limit
RULES: dict[str, tuple[tuple[str, float, int], ...]] = {
    # a BMS trips at about 100 mV between cells
    "battery_degradation": (("cells.spread_at_rest_v", 0.1, 1), (f"{BATTERY}.StateOfHealth.mean", 70.0, -1)),
    # CWRU: good 0.073 g, inner race 0.29 to 0.44 g, outer race 0.34 g; kurtosis 3 is Gaussian
    "motor_bearing_wear": ((f"{VIBRATION}.RMS.median", 0.25, 1), (f"{VIBRATION}.Kurtosis.median", 6.0, 1)),
    "inverter_overheating": (("Vehicle.Powertrain.Inverter.Temperature.max", 95.0, 1),),
    # GB 38031: 1 °C/s; 60 °C is where makers stop a pack
    "thermal_runaway_risk": (("battery.max_rise_30s_c_per_s", 1.0, 1), (f"{BATTERY}.Temperature.Max.max", 60.0, 1)),
    # 500 Ω/V combined; a plug without current
    "charging_fault": (("isolation_ohm_per_v", 500.0, -1), ("plugged_idle_share", 0.5, 1)),
}


def rule_score(windows: Windows, feature_names: tuple[str, ...], failure_type: str | None) -> FloatArray | None:
    """Score by the hand-written rule of a type, or of the worst of all; None where the schema lacks its features."""
    types = RULES if failure_type is None else {failure_type: RULES.get(failure_type, ())}
    scores: list[FloatArray] = []
    for name, limit, sign in (rule for rules in types.values() for rule in rules):
        if name in feature_names:
            value = windows.features[:, feature_names.index(name)].astype(np.float64)
            ratio = value / limit if sign > 0 else limit / np.maximum(value, 1e-3)
            scores.append(np.nan_to_num(ratio, nan=0.0))
    return np.max(scores, axis=0) if scores else None


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Robust z of features: median and scaled MAD, both [F]."""

    median: FloatArray
    sigma: FloatArray

    def __call__(self, windows: Windows) -> FloatArray:
        """[W, F] z, bounded; what is missing is 0, the normal."""
        z = (windows.features.astype(np.float64) - self.median) / self.sigma
        return np.nan_to_num(np.clip(z, -Z_LIMIT, Z_LIMIT), nan=0.0)


def pca(train: Windows, normal: Normalisation) -> Callable[[Windows], FloatArray]:
    """Fit principal components of healthy training windows; the score is what they leave unexplained."""
    z = normal(train.take(train.healthy))
    centre = z.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(z - centre, rowvar=False))
    explained = np.cumsum(values[::-1]) / max(float(values.sum()), 1e-12)
    kept = vectors[:, ::-1][:, : int(np.searchsorted(explained, PCA_VARIANCE)) + 1]

    def score(windows: Windows) -> FloatArray:
        centred = normal(windows) - centre
        residual: FloatArray = ((centred - centred @ kept @ kept.T) ** 2).mean(axis=1)
        return residual

    return score


def isolation_forest(train: Windows, normal: Normalisation, seed: int) -> Callable[[Windows], FloatArray]:
    """Fit an isolation forest on healthy training windows (Liu, Ting & Zhou 2008)."""
    from sklearn.ensemble import IsolationForest  # noqa: PLC0415 - a second of import that only this needs

    rows = np.flatnonzero(train.healthy)
    rows = np.random.default_rng(seed).permutation(rows)[:FOREST_WINDOWS]
    chosen = np.zeros(len(train), bool)
    chosen[rows] = True
    forest = IsolationForest(n_estimators=60, random_state=seed).fit(normal(train.take(chosen)))

    def score(windows: Windows) -> FloatArray:
        return -np.asarray(forest.score_samples(normal(windows)), np.float64)

    return score


def coin(windows: Windows, seed: int) -> FloatArray:
    """Return a random score: what every metric is worth by itself."""
    random: npt.NDArray[np.float64] = np.random.default_rng(seed).random(len(windows))
    return random

"""From a booster's raw margin to a probability one may believe, fitted on vehicles the booster has not seen.

The default is Platt's sigmoid: a demo fleet has a handful of failing validation vehicles, and isotonic regression on so
few gives steps at exactly 0 and 1, which say "certain" after three vehicles (Niculescu-Mizil & Caruana 2005: isotonic
needs about 1000 independent points). Platt's smoothed targets count *vehicles*, as windows of one vehicle are no
independent witnesses. From `isotonic_min_vehicles` failing vehicles on isotonic takes over.
"""

import numpy as np
import numpy.typing as npt

from cloud.training.config import Calibration
from edge_agent.contract.signals import FloatArray
from export.calibration import Calibrator

IDENTITY = Calibrator(method="sigmoid", a=1.0, b=0.0)  # the booster's own logistic, where nothing was there to fit


def calibrate(
    margin: FloatArray, truth: npt.NDArray[np.bool_], vehicle: npt.NDArray[np.str_], config: Calibration
) -> Calibrator:
    """Fit on [n] windows of unseen vehicles. Vehicles of one class only: the booster's own probability stands."""
    failing, sound = len(np.unique(vehicle[truth])), len(np.unique(vehicle[~truth]))
    if failing == 0 or sound == 0:
        return IDENTITY
    if config.method == "isotonic" or (config.method == "auto" and failing >= config.isotonic_min_vehicles):
        return _isotonic(margin, truth)
    return _sigmoid(margin, truth, (failing + 1.0) / (failing + 2.0), 1.0 / (sound + 2.0))


def _sigmoid(margin: FloatArray, truth: npt.NDArray[np.bool_], high: float, low: float) -> Calibrator:
    """Platt 1999 with Newton's method; `high` and `low` are the smoothed targets."""
    target = np.where(truth, high, low)
    scale = max(float(np.std(margin)), 1e-6)
    z = margin / scale
    a, b = 1.0, float(np.log(target.mean() / (1.0 - target.mean())))
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(-np.clip(a * z + b, -60.0, 60.0)))
        slope = np.array([np.mean((p - target) * z) + 1e-4 * a, np.mean(p - target)])
        w = p * (1.0 - p) + 1e-9
        curve = np.array([[np.mean(w * z * z) + 1e-4, np.mean(w * z)], [np.mean(w * z), np.mean(w) + 1e-9]])
        step = np.clip(np.linalg.solve(curve, slope), -2.0, 2.0)
        a, b = a - float(step[0]), b - float(step[1])
        if float(np.abs(step).max()) < 1e-7:
            break
    # a slope below zero would turn the booster's order round: an uninformative head keeps its order, nearly flat
    return Calibrator(method="sigmoid", a=max(a, 1e-3) / scale, b=b)


def _isotonic(margin: FloatArray, truth: npt.NDArray[np.bool_]) -> Calibrator:
    from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415 - a second of import that small fleets never need

    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(margin, truth.astype(np.float64))
    return Calibrator(
        method="isotonic",
        x=tuple(float(v) for v in fitted.X_thresholds_),
        y=tuple(float(v) for v in fitted.y_thresholds_),
    )

import numpy as np
import pytest

from cloud.training.calibration import IDENTITY, calibrate
from cloud.training.config import Calibration

RANDOM = np.random.default_rng(3)


def fleet(vehicles: int, windows: int = 50):
    """Half of the vehicles fail; the margin says so with noise."""
    vehicle = np.repeat([f"V{i:03d}" for i in range(vehicles)], windows)
    truth = np.repeat(np.arange(vehicles) % 2 == 0, windows)
    return np.where(truth, 1.0, -1.0) + RANDOM.normal(0, 1.2, len(truth)), truth, vehicle


def test_few_vehicles_get_a_sigmoid_that_never_claims_certainty():
    margin, truth, vehicle = fleet(6)
    fitted = calibrate(margin, truth, vehicle, Calibration())
    assert fitted.method == "sigmoid"
    assert fitted(np.array([10.0]))[0] < 1.0
    assert np.all(np.diff(fitted(np.linspace(-5, 5, 50))) > 0)


def test_a_calibrated_probability_is_right_on_average():
    margin, truth, vehicle = fleet(80)
    fitted = calibrate(margin, truth, vehicle, Calibration(method="sigmoid"))
    assert fitted(margin).mean() == pytest.approx(truth.mean(), abs=0.02)
    high = fitted(margin) > 0.8
    assert truth[high].mean() == pytest.approx(fitted(margin)[high].mean(), abs=0.06)


def test_many_failing_vehicles_get_isotonic():
    margin, truth, vehicle = fleet(120)
    fitted = calibrate(margin, truth, vehicle, Calibration())
    assert fitted.method == "isotonic"
    assert np.all(np.diff(fitted.y) >= 0)


def test_without_a_failing_vehicle_the_boosters_own_logistic_stands():
    margin, truth, vehicle = fleet(4)
    assert calibrate(margin, np.zeros_like(truth), vehicle, Calibration()) == IDENTITY


def test_an_uninformative_head_keeps_its_order():
    margin, truth, vehicle = fleet(20)
    fitted = calibrate(-margin, truth, vehicle, Calibration())
    assert fitted.a > 0

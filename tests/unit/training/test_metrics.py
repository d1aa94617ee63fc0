import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cloud.training.evaluate import poisson_rate, wilson
from cloud.training.metrics import Ranked, bootstrap, precision_at, reliability, vehicle_weights


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=2, max_size=60))
def test_weighted_areas_equal_scikit_learns_ties_included(rows):
    score = np.array([row[0] for row in rows], float)
    truth = np.array([row[1] for row in rows], bool)
    weight = np.array([row[2] for row in rows], float)
    if not (weight[truth].sum() > 0 and weight[~truth].sum() > 0):
        return
    ranked = Ranked.of(score, truth)
    assert ranked.roc_auc(weight) == pytest.approx(roc_auc_score(truth, score, sample_weight=weight))
    assert ranked.pr_auc(weight) == pytest.approx(average_precision_score(truth, score, sample_weight=weight))


def test_one_class_alone_has_no_area():
    ranked = Ranked.of(np.array([0.1, 0.9]), np.array([True, True]))
    assert np.isnan(ranked.roc_auc(np.ones(2)))


def test_a_coins_pr_auc_is_the_prevalence():
    random = np.random.default_rng(1)
    truth = random.random(20_000) < 0.1
    assert Ranked.of(random.random(20_000), truth).pr_auc(np.ones(20_000)) == pytest.approx(0.1, abs=0.01)


def test_the_bootstrap_resamples_vehicles_not_windows():
    # one vehicle of four is ranked wrongly: its hundred windows are one witness, so the interval stays wide
    vehicle = np.repeat(np.arange(4), 100)
    truth = np.tile(np.arange(100) < 50, 4)
    score = np.where(truth, 1.0, 0.0)
    score[:100] = 1 - score[:100]
    ranked = Ranked.of(score, truth)
    by_vehicle = bootstrap(ranked.roc_auc, vehicle, vehicle_weights(vehicle, 400, 1))
    by_window = bootstrap(ranked.roc_auc, np.arange(400), vehicle_weights(np.arange(400), 400, 1))
    assert by_vehicle.high - by_vehicle.low > 4 * (by_window.high - by_window.low)


def test_precision_at_a_budget_looks_at_the_highest_scores_only():
    assert precision_at(np.array([0.9, 0.8, 0.1, 0.7]), np.array([True, False, True, True]), 2) == 0.5


def test_reliability_bins_hold_every_window_once():
    probability = np.array([0.0, 0.05, 0.5, 0.95, 1.0])
    bins = reliability(probability, probability > 0.4)
    assert sum(b.count for b in bins) == 5
    assert bins[-1].observed == 1.0


def test_intervals_of_few_events_are_honest():
    one = wilson(1, 1)
    assert (one.value, one.high) == (1.0, 1.0)
    assert one.low < 0.3
    none = poisson_rate(0, 2.0)
    assert none.low == 0.0
    assert none.high == pytest.approx(-np.log(0.05) / 2.0)  # the rule of three, exactly
    assert poisson_rate(5, 1.0).low < 5 < poisson_rate(5, 1.0).high

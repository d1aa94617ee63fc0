"""The four triggers of a training run, and what is said where one cannot be known."""

import math

import pytest
from scipy.stats import beta

from cloud.drift.limits import Retraining, load_limits
from cloud.drift.retraining import (
    DAY_S,
    Champion,
    Evidence,
    Judgements,
    Trained,
    Trigger,
    last_training,
    performance,
    stated_precision,
    triggers,
    upper_bound,
)
from edge_agent.contract.bundle import Policy, Thresholds, TypeThreshold
from edge_agent.contract.errors import ConfigError

NOW = 1_772_000_000.0
LIMITS = Retraining()
CHAMPION = Champion(release=3, created_s=NOW - 10 * DAY_S, precision={"a": 0.9, "b": 0.8})
NOTHING = Evidence((), 0, {})
TRAINED = Trained(NOW - 10 * DAY_S, "release", NOW - 10 * DAY_S)


def evaluated(
    evidence: Evidence = NOTHING, *, champion: Champion | None = CHAMPION, trained: Trained = TRAINED
) -> dict[str, Trigger]:  # fmt: skip
    return {t.name: t for t in triggers(champion, trained, evidence, LIMITS, NOW)}


def test_nothing_new_is_not_due() -> None:
    assert not any(t.due for t in evaluated().values())


@pytest.mark.parametrize(("count", "due"), [(2, False), (3, True)])
def test_three_drifted_variables_are_due(count: int, due: bool) -> None:
    found = evaluated(Evidence(tuple("xyz"[:count]), 0, {}))["drift_alerts"]
    assert (found.due, found.value) == (due, count)


@pytest.mark.parametrize(("samples", "due"), [(9_999, False), (10_000, True)])
def test_ten_thousand_new_samples_are_due(samples: int, due: bool) -> None:
    assert evaluated(Evidence((), samples, {}))["new_samples"].due is due


@pytest.mark.parametrize(("days", "due"), [(29.9, False), (30.0, True)])
def test_thirty_days_are_due_and_the_reason_says_since_what(days: float, due: bool) -> None:
    found = evaluated(trained=Trained(NOW - days * DAY_S, "training_run", NOW - days * DAY_S))["age_days"]
    assert found.due is due
    assert "the newest training run began" in found.why


def test_the_last_training_is_the_later_of_the_release_and_the_newest_run() -> None:
    assert last_training(CHAMPION, None) == Trained(CHAMPION.created_s, "release", CHAMPION.created_s)
    assert last_training(CHAMPION, NOW) == Trained(NOW, "training_run", NOW)
    assert last_training(CHAMPION, NOW - 20 * DAY_S).source == "release"
    assert last_training(None, None) == Trained(None, "unknown")
    assert last_training(None, 5.0) == Trained(5.0, "training_run", 5.0)


def test_what_came_between_the_start_of_a_run_and_the_release_made_of_it_counts() -> None:
    started = CHAMPION.created_s - 3600.0  # the run, and a person who read its report
    assert last_training(CHAMPION, started) == Trained(CHAMPION.created_s, "release", started)


@pytest.mark.parametrize(
    ("confirmed", "wrong", "due"),
    [
        (15, 5, False),  # 17 % below 0.9, but by chance alone so few or fewer would be right once in 6 times at 0.81
        (12, 8, True),
        (80, 20, False),
        (73, 27, True),
        (95, 5, False),
    ],
)
def test_a_precision_that_is_surely_more_than_a_tenth_below_the_stated_one_is_due(
    confirmed: int, wrong: int, due: bool
) -> None:
    found = evaluated(Evidence((), 0, {"a": Judgements(confirmed, wrong)}))["performance_drop"]
    assert found.due is due
    assert found.value == pytest.approx((0.9 - upper_bound(confirmed, confirmed + wrong)) / 0.9)
    estimate = confirmed / (confirmed + wrong)
    assert f"({estimate:.2f}, at 95% confidence below {upper_bound(confirmed, confirmed + wrong):.2f})" in found.why


@pytest.mark.parametrize("judged", [20, 47, 200])
def test_a_release_exactly_at_the_limit_is_called_worse_at_most_once_in_twenty_times(judged: int) -> None:
    at_limit = 0.9 * 0.9
    wrongly = sum(
        math.comb(judged, k) * at_limit**k * (1 - at_limit) ** (judged - k)
        for k in range(judged + 1)
        if evaluated(Evidence((), 0, {"a": Judgements(k, judged - k)}))["performance_drop"].due
    )
    assert 0.01 < wrongly <= 0.05  # the bound has power too: it is no rule that never speaks


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 20), (15, 20), (19, 20), (300, 1000), (0, 5000)])
def test_the_upper_bound_is_clopper_and_pearsons(successes: int, trials: int) -> None:
    assert upper_bound(successes, trials) == pytest.approx(beta.ppf(0.95, successes + 1, trials - successes), abs=2e-6)
    assert upper_bound(trials, trials) == 1.0


def test_what_is_stated_is_weighted_by_the_judged_alerts_of_each_type() -> None:
    judged = {"a": Judgements(9, 1), "b": Judgements(20, 10), "unstated": Judgements(0, 50)}
    found = performance(CHAMPION, judged)
    assert (found.judged, found.confirmed, found.unstated_types) == (40, 29, ("unstated",))
    assert found.stated == pytest.approx((0.9 * 10 + 0.8 * 30) / 40)


def test_too_few_labels_are_no_verdict_and_it_says_so() -> None:
    found = evaluated(Evidence((), 0, {"a": Judgements(0, 19)}))["performance_drop"]
    assert not found.due
    assert found.value is None
    assert found.why.startswith("too few labels: 19")


def test_a_service_without_a_release_says_what_it_cannot_know() -> None:
    found = evaluated(Evidence(("x", "y", "z"), 10_000, {}), champion=None, trained=Trained(None, "unknown"))
    assert found["age_days"].value is found["performance_drop"].value is None
    assert "no release is loaded" in found["age_days"].why
    assert "no release is loaded" in found["performance_drop"].why
    assert found["drift_alerts"].due  # these are the store's
    assert found["new_samples"].due


def test_a_release_that_states_no_precision_says_so() -> None:
    silent = Champion(3, None, {})
    assert "states no precision" in evaluated(champion=silent)["performance_drop"].why


def test_the_stated_precision_is_that_of_the_policy_in_force() -> None:
    types = {"a": TypeThreshold(raise_at=0.5, clear_below=0.3), "b": TypeThreshold(raise_at=0.5, clear_below=0.3)}
    policy = Policy(description="", types=types, measured={"a.window_precision": 0.7, "b.window_precision": None})
    other = Policy(description="", types=types, measured={"a.window_precision": 0.1})
    assert stated_precision(Thresholds(active="x", policies={"x": policy, "y": other})) == {"a": 0.7}


def test_the_service_reads_its_limits_from_the_shipped_configuration() -> None:
    limits = load_limits(None)
    assert (limits.retraining.drift_alerts, limits.retraining.max_age_days) == (3, 30.0)
    assert limits.drift.psi == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"drift": {"min_window": 1}}', "did you mean 'min_windows'"),
        ('{"retraining": {"max_age": 1}}', "did you mean 'max_age_days'"),
        ('{"drift": {"clear_ratio": 2}}', "clear_ratio"),
        ("{", "config"),
    ],
)
def test_a_wrong_limit_is_refused_with_one_line(tmp_path, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as found:
        load_limits(tmp_path / "c.json")
    assert "\n" not in str(found.value)

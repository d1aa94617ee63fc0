"""The four triggers of a training run, and what is said where one cannot be known."""

import pytest

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
)
from edge_agent.contract.bundle import Policy, Thresholds, TypeThreshold
from edge_agent.contract.errors import ConfigError

NOW = 1_772_000_000.0
LIMITS = Retraining()
CHAMPION = Champion(release=3, created_s=NOW - 10 * DAY_S, precision={"a": 0.9, "b": 0.8})
NOTHING = Evidence((), 0, {})
TRAINED = Trained(NOW - 10 * DAY_S, "release")


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
    found = evaluated(trained=Trained(NOW - days * DAY_S, "training_run"))["age_days"]
    assert found.due is due
    assert "the newest training run ended" in found.why


def test_the_last_training_is_the_later_of_the_release_and_the_newest_run() -> None:
    assert last_training(CHAMPION, None) == Trained(CHAMPION.created_s, "release")
    assert last_training(CHAMPION, NOW) == Trained(NOW, "training_run")
    assert last_training(CHAMPION, NOW - 20 * DAY_S).source == "release"
    assert last_training(None, None) == Trained(None, "unknown")
    assert last_training(None, 5.0) == Trained(5.0, "training_run")


@pytest.mark.parametrize(
    ("confirmed", "wrong", "due"),
    [
        (81, 19, False),  # exactly 10 % below 0.9: not above the limit
        (80, 20, True),
        (95, 5, False),
    ],
)
def test_a_precision_more_than_a_tenth_below_the_stated_one_is_due(confirmed: int, wrong: int, due: bool) -> None:
    found = evaluated(Evidence((), 0, {"a": Judgements(confirmed, wrong)}))["performance_drop"]
    assert found.due is due
    assert found.value == pytest.approx((0.9 - confirmed / 100) / 0.9)


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

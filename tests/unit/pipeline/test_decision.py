from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.bundle import Decision, TypeThreshold
from edge_agent.contract.signals import SEVERITIES
from edge_agent.pipeline.decision import (
    STANDING,
    TABLE,
    UNGRADED,
    Event,
    Observation,
    Phase,
    TypeState,
    severity_of,
    shifted,
    step,
)
from edge_agent.pipeline.outcomes import Scores

THRESHOLD = TypeThreshold(raise_at=0.8, clear_below=0.5)
RULE = Decision(k=2, n=3, clear_windows=5, cooldown_s=1800)
OVER, BETWEEN, BELOW = 0.9, 0.6, 0.1


def run(
    values: list[float], severities: list[str] | None = None, state: TypeState | None = None
) -> list[tuple[int, str]]:
    """Transitions with the window's number, a window a minute."""
    state = state or TypeState()
    found = []
    for i, value in enumerate(values):
        severity = "medium" if severities is None else severities[i]
        state, transition = step(state, Observation(60.0 * i, value, severity), THRESHOLD, RULE)  # type: ignore[arg-type]
        if transition is not None:
            found.append((i, transition))
    return found


def test_the_table_answers_every_event_a_phase_can_meet() -> None:
    for phase in get_args(Phase):
        for event in get_args(Event):
            possible = event != "rise" or phase in STANDING
            assert ((phase, event) in TABLE) == possible


def test_one_window_over_the_threshold_raises_nothing() -> None:
    assert run([OVER, BELOW, BELOW, OVER, BELOW, BELOW]) == []


def test_k_of_n_windows_raise_once() -> None:
    assert run([BELOW, OVER, BELOW, OVER, OVER, OVER]) == [(3, "raised")]


def test_since_is_the_first_window_that_showed_it() -> None:
    state = TypeState()
    for i, value in enumerate([BELOW, OVER, BELOW, OVER]):
        state, _ = step(state, Observation(60.0 * i, value, "high"), THRESHOLD, RULE, "boot-1")
    assert state.since_s == 60.0
    assert state.key == "boot-1/60000"
    assert shifted(state, 1e9).key == state.key
    assert shifted(state, 1e9).since_s == 1e9 + 60.0


def test_between_the_thresholds_an_alert_stands() -> None:
    assert run([OVER, OVER] + [BETWEEN] * 50) == [(1, "raised")]


def test_cleared_after_so_many_windows_below_in_a_row() -> None:
    assert run([OVER, OVER] + [BELOW] * 4 + [BETWEEN] + [BELOW] * 5) == [(1, "raised"), (11, "cleared")]


def test_the_same_alert_waits_for_the_cooldown_of_thirty_minutes() -> None:
    again = [OVER, OVER, *[BELOW] * 5, *[OVER] * 40]
    assert run(again) == [(1, "raised"), (6, "cleared"), (31, "raised")], "window 31 is 30 minutes after window 1"


def test_a_rise_in_severity_passes_the_cooldown_and_a_fall_does_not() -> None:
    values = [OVER, OVER, *[BELOW] * 5, OVER, OVER, OVER]
    low = ["medium"] * 7
    assert run(values, [*low, "high", "high", "high"])[-1] == (8, "raised")
    assert run(values, [*low, "low", "low", "low"])[-1] == (6, "cleared")


def test_severity_escalates_an_alert_that_stands_and_never_lowers_it() -> None:
    severities = ["low", "low", "medium", "low", "critical", "high", "critical"]
    assert run([OVER] * 7, severities) == [(1, "raised"), (2, "escalated"), (4, "escalated")]


def test_a_clock_set_back_does_not_silence_for_years() -> None:
    late = TypeState(phase="cleared", alerted_s=1e9, severity="medium")
    assert run([OVER, OVER], state=late) == [(1, "raised")]


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(SEVERITIES)), max_size=200))
def test_whatever_the_scores_an_alert_is_raised_and_cleared_in_turn_and_not_repeated(
    windows: list[tuple[float, str]],
) -> None:
    state = TypeState()
    standing = False
    alerted: tuple[float, int] | None = None
    recent: list[bool] = []
    for i, (value, severity) in enumerate(windows):
        time, rank = 60.0 * i, SEVERITIES.index(severity)
        recent = [*recent, value >= THRESHOLD.raise_at][-RULE.n :]
        state, transition = step(state, Observation(time, value, severity), THRESHOLD, RULE)  # type: ignore[arg-type]
        assert (state.phase in STANDING) == (standing if transition not in ("cleared", "raised") else not standing)
        if transition == "raised":
            assert not standing
            assert sum(recent) >= RULE.k
            assert alerted is None or time - alerted[0] >= RULE.cooldown_s or rank > alerted[1]
        if transition == "escalated":
            assert standing
            assert alerted is not None
            assert rank > alerted[1]
        if transition in ("raised", "escalated"):
            alerted, standing = (time, rank), True
        if transition == "cleared":
            assert standing
            assert all(v < THRESHOLD.clear_below for v, _ in windows[i - RULE.clear_windows + 1 : i + 1])
            standing = False


@pytest.mark.parametrize(
    ("shares", "level"),
    [
        ([1, 0, 0, 0], "low"), ([0, 0, 0, 1], "critical"), ([0.4, 0, 0.2, 0.4], "high"), ([0, 0.4, 0.6, 0], "high"),
        ([0.1, 0.1, 0.15, 0.65], "critical"), ([0.25] * 4, "medium"), ([0, 0, 0, 0], UNGRADED),
    ],
)  # fmt: skip
def test_severity_is_the_median_level(shares: list[float], level: str) -> None:
    none = np.zeros(0, np.float32)
    scores = Scores(none, none, severity=np.array([shares], np.float32))
    assert severity_of(scores, 0) == level
    assert severity_of(Scores(none, none), 0) == UNGRADED

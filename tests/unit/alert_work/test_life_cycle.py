"""The table of an alert's work, and what becomes of actions that meet."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.alert_work.life_cycle import (
    ACTIONS,
    STATES,
    TABLE,
    VERDICTS,
    Action,
    Refused,
    Repeated,
    Taken,
    Work,
    allowed,
    drawn,
    fold,
    judge,
    step,
)

ROOT = Path(__file__).resolve().parents[3]
TYPE, SEVERITY = "inverter_overheating", "high"
DONE = st.builds(
    Action, action=st.sampled_from(ACTIONS), actor=st.sampled_from(["anna", "ben"]), reason=st.sampled_from(["r", "s"]),
    at_s=st.just(1.0), failure_type=st.sampled_from([None, TYPE, "charging_fault"]),
    severity=st.sampled_from([None, "high", "low"]),
)  # fmt: skip


def do(action: str, actor: str = "anna", reason: str = "r", **more: object) -> Action:
    return Action(action=action, actor=actor, reason=reason, at_s=1.0, **more)  # type: ignore[arg-type]


def decide(log: list[Action], action: Action, revises: int | None = None) -> Taken | Repeated | Refused:
    """Judge as the store does: over the log's fold, this actor's newest action and the newest verdict."""
    own = next((a for a in reversed(log) if a.actor == action.actor), None)
    labelled = next((a for a in reversed(log) if a.action in VERDICTS), None)
    return judge(
        fold(log), action, told_type=TYPE, told_severity=SEVERITY, own=own, labelled=labelled, revises=revises
    )  # fmt: skip


def after(*actions: Action) -> list[Action]:
    """Return a log in which every action counted."""
    log: list[Action] = []
    for action in actions:
        log.append(replace(action, action_id=len(log) + 1))
    fold(log)
    return log


def test_the_documentation_shows_the_very_table() -> None:
    assert drawn() in (ROOT / "docs" / "alerts-as-work.md").read_text(encoding="utf-8")


def test_every_state_is_reached_and_none_is_a_dead_end() -> None:
    reached, new = {"new"}, {"new"}
    while new:
        new = {TABLE[state, a] for state in new for a in ACTIONS if (state, a) in TABLE} - reached
        reached |= new
    assert reached == set(STATES)
    assert all(allowed(state) for state in STATES)


def test_work_that_nobody_looked_at_cannot_be_resolved() -> None:
    refused = decide([], do("resolve"))
    assert isinstance(refused, Refused)
    assert "possible now: acknowledge, confirm, false-alarm" in refused.why


@given(st.lists(DONE, max_size=12), DONE)
def test_the_verdict_is_always_the_newest_one_given(steps: list[Action], last: Action) -> None:
    log: list[Action] = []
    for action in [*steps, last]:
        if isinstance(decide(log, action, revises=None), Taken):
            log.append(replace(action, action_id=len(log) + 1))
    given_last = [a for a in log if a.action in VERDICTS]
    work = fold(log)
    assert work.verdict == (VERDICTS[given_last[-1].action] if given_last else None)
    assert (work.failure_type, work.severity) == (
        (given_last[-1].failure_type, given_last[-1].severity) if given_last else (None, None)
    )


@given(st.lists(DONE, max_size=12))
def test_an_action_sent_again_at_once_changes_nothing(steps: list[Action]) -> None:
    log: list[Action] = []
    for action in steps:
        if isinstance(decide(log, action), Taken):
            log.append(replace(action, action_id=len(log) + 1))
            again = decide(log, replace(action, at_s=2.0))
            assert isinstance(again, Repeated)
            assert again.action == log[-1]


@given(st.lists(DONE, max_size=10))
def test_nobodys_label_is_changed_by_another_without_naming_it(steps: list[Action]) -> None:
    log: list[Action] = []
    for action in steps:
        before = fold(log)
        if not isinstance(decide(log, action), Taken):
            continue
        label_giver = next((a.actor for a in reversed(log) if a.action in VERDICTS), None)
        log.append(replace(action, action_id=len(log) + 1))
        if label_giver not in (None, action.actor):
            assert fold(log).verdict == before.verdict


def test_a_person_may_change_their_own_mind() -> None:
    log = after(do("confirm"))
    changed = decide(log, do("false-alarm", reason="looked again"))
    assert isinstance(changed, Taken)
    assert (changed.work.state, changed.work.verdict) == ("false_alarm", "false_alarm")


def test_another_persons_label_is_changed_by_who_names_it_and_not_by_who_names_an_older_one() -> None:
    log = after(do("confirm"), do("false-alarm", reason="looked again"))
    assert isinstance(decide(log, do("confirm", "ben")), Refused)
    assert isinstance(decide(log, do("confirm", "ben"), revises=1), Refused)
    assert isinstance(decide(log, do("confirm", "ben"), revises=2), Taken)
    assert isinstance(decide([], do("confirm", "ben"), revises=2), Refused)


@pytest.mark.parametrize(
    ("failure_type", "severity", "agrees"),
    [
        (None, None, True),
        (TYPE, None, True),
        (None, "high", True),
        ("charging_fault", None, False),
        (None, "low", False),
    ],
)
def test_a_second_person_may_agree_in_other_words(failure_type: str | None, severity: str | None, agrees: bool) -> None:
    second = do("confirm", "ben", failure_type=failure_type, severity=severity)
    assert isinstance(decide(after(do("confirm")), second), Taken if agrees else Refused)


def test_a_verdict_after_the_end_is_kept_and_does_not_reopen_the_work() -> None:
    log = after(do("acknowledge"), do("resolve"))
    late = decide(log, do("confirm", "ben"))
    assert isinstance(late, Taken)
    assert (late.work.state, late.work.verdict) == ("resolved", "confirmed")


def test_the_end_of_the_work_keeps_the_verdict_and_so_does_taking_it_up_again() -> None:
    work = fold(after(do("confirm", severity="low"), do("resolve"), do("acknowledge", reason="came back")))
    assert (work.state, work.verdict, work.severity) == ("acknowledged", "confirmed", "low")


def test_the_same_words_after_the_work_was_taken_up_again_count_again() -> None:
    log = after(do("acknowledge", "ben"), do("resolve"), do("acknowledge", "ben", reason="came back"))
    assert isinstance(decide(log, do("resolve")), Taken)


def test_what_the_table_does_not_have_is_our_own_mistake() -> None:
    with pytest.raises(KeyError):
        step(Work(), do("resolve"))

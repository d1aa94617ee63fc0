"""An alert's work as a table: (state, action) → state, and the label that its actions leave behind. Pure.

Two things are kept apart: the *state* says where the work stands, the *verdict* what the alert was. A verdict given
after the work was resolved does not reopen it; `acknowledge` does, and keeps the verdict. A label of another person is
changed only by who names the action that gave it (`revises`): of two people who judge at the same moment one is asked
to look. The very same action of the same person, sent again, changes nothing. Nothing here knows a database or a clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, get_args

State = Literal["new", "acknowledged", "confirmed", "false_alarm", "resolved"]
ActionName = Literal["acknowledge", "confirm", "false-alarm", "resolve"]
Verdict = Literal["confirmed", "false_alarm"]

STATES: tuple[State, ...] = get_args(State)
ACTIONS: tuple[ActionName, ...] = get_args(ActionName)
VERDICTS: Mapping[ActionName, Verdict] = {"confirm": "confirmed", "false-alarm": "false_alarm"}

TABLE: Mapping[tuple[State, ActionName], State] = {
    ("new", "acknowledge"): "acknowledged",
    ("new", "confirm"): "confirmed",
    ("new", "false-alarm"): "false_alarm",
    ("acknowledged", "acknowledge"): "acknowledged",  # somebody else takes it on
    ("acknowledged", "confirm"): "confirmed",
    ("acknowledged", "false-alarm"): "false_alarm",
    ("acknowledged", "resolve"): "resolved",  # nobody could tell: closed without a label
    ("confirmed", "confirm"): "confirmed",  # a second opinion, or a corrected type
    ("confirmed", "false-alarm"): "false_alarm",
    ("confirmed", "resolve"): "resolved",
    ("false_alarm", "confirm"): "confirmed",
    ("false_alarm", "false-alarm"): "false_alarm",
    ("false_alarm", "resolve"): "resolved",
    ("resolved", "acknowledge"): "acknowledged",  # taken up again
    ("resolved", "confirm"): "resolved",  # the workshop's report came later
    ("resolved", "false-alarm"): "resolved",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What somebody did. `failure_type` and `severity`: what it really was, where a confirmation says it differs."""

    action: ActionName
    actor: str
    reason: str
    at_s: float  # the server's clock, Unix seconds
    failure_type: str | None = None
    severity: str | None = None
    action_id: int = 0  # its place in the log; 0: not written yet

    def same_as(self, other: "Action") -> bool:
        """Whether the other is this very request sent again."""
        return (self.action, self.actor, self.reason, self.failure_type, self.severity) == (
            other.action, other.actor, other.reason, other.failure_type, other.severity,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where an alert's work stands. Nobody has looked at it: `Work()`."""

    state: State = "new"
    verdict: Verdict | None = None
    failure_type: str | None = None  # the label's, where a person corrected the alert's
    severity: str | None = None
    updated_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """The action counts; this is the work after it."""

    work: Work


@dataclass(frozen=True, slots=True)
class Repeated:
    """The action is on record already and still stands."""

    action: Action


@dataclass(frozen=True, slots=True)
class Refused:
    """The action does not fit the present state; `why` continues a sentence that names the alert."""

    why: str


def allowed(state: State) -> tuple[ActionName, ...]:
    """Return the actions that a state takes, in the table's order."""
    return tuple(action for action in ACTIONS if (state, action) in TABLE)


def step(work: Work, action: Action) -> Work:
    """Return the work after an action that the table has. Raises `KeyError` for one that it does not have."""
    after = replace(work, state=TABLE[work.state, action.action], updated_at_s=action.at_s)
    verdict = VERDICTS.get(action.action)
    if verdict is None:
        return after
    return replace(after, verdict=verdict, failure_type=action.failure_type, severity=action.severity)


def fold(actions: Sequence[Action]) -> Work:
    """Return the work after a whole log; what is stored beside the log is always this."""
    return reduce(step, actions, Work())


def judge(
    work: Work,
    action: Action,
    *,
    told_type: str,
    told_severity: str,
    own: Action | None,
    labelled: Action | None,
    revises: int | None = None,
) -> Taken | Repeated | Refused:
    """Decide about an action on an alert whose work stands at `work`.

    `told_type` and `told_severity` are the alert's own; `own` is this actor's newest action on it, `labelled` the
    action that gave its verdict; `revises` is the id of the action whose verdict this one knowingly replaces.
    """
    if own is not None and own.same_as(action) and _stands(work, own):
        return Repeated(own)
    if (work.state, action.action) not in TABLE:
        return Refused(f"is {work.state}, which {action.action} does not fit; {_offer(work.state)}")
    if action.action in VERDICTS and revises is not None and (labelled is None or labelled.action_id != revises):
        newest = "it has no verdict yet" if labelled is None else f"its verdict is of action {_named(labelled)}"
        return Refused(f"was judged meanwhile: action {revises} is not the verdict that stands; {newest}")
    if action.action in VERDICTS and labelled is not None and revises is None and labelled.actor != action.actor:
        standing = _label(work, told_type, told_severity)
        if standing != _label(step(work, action), told_type, told_severity):
            return Refused(
                f"is {' '.join(word for word in standing if word)} by action {_named(labelled)}; "
                f'to change that label send "revises": {labelled.action_id}; {_offer(work.state)}'
            )
    return Taken(step(work, action))


def _stands(work: Work, own: Action) -> bool:
    """Whether nothing since has undone what this action did; a retry that comes late must not do it again."""
    if own.action in VERDICTS:
        return step(work, own) == replace(work, updated_at_s=own.at_s)
    return (work.state == "resolved") == (own.action == "resolve")


def _label(work: Work, told_type: str, told_severity: str) -> tuple[str, str, str]:
    """Return (verdict, type, severity) as training reads them; a false alarm is one whatever its type was."""
    if work.verdict != "confirmed":
        return work.verdict or "", "", ""
    return work.verdict, work.failure_type or told_type, work.severity or told_severity


def _named(action: Action) -> str:
    return f"{action.action_id} of {action.actor!r}"


def _offer(state: State) -> str:
    return f"possible now: {', '.join(allowed(state))}"


def drawn() -> str:
    """Return the table as Markdown, a row a state and a column an action, for the documentation."""
    lines = ["| State | " + " | ".join(ACTIONS) + " |", "|---" * (len(ACTIONS) + 1) + "|"]
    lines += [f"| {state} | " + " | ".join(TABLE.get((state, a), "409") for a in ACTIONS) + " |" for state in STATES]
    return "\n".join(lines)

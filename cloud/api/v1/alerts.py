"""Alerts as work: find them, look at one, say what it was. What people say here become labels.

What an action does to an alert's work is decided by the table in `cloud.alert_work.life_cycle`; here are only the
question and the answer.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AfterValidator, BeforeValidator, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.alert_work.life_cycle import Action, ActionName, Refused
from cloud.api import models, shown
from cloud.api.body import read_model
from cloud.api.endpoint import (
    AWAY,
    NOT_FOUND,
    WRONG,
    Limit,
    Running,
    Word,
    only_known_parameters,
    problem,
    since,
)
from cloud.api.problems import ProblemError
from cloud.store import reading, work_rows
from cloud.store.reading import AlertFilter, Row
from edge_agent.contract.messages import decode_event
from edge_agent.contract.signals import FAILURE_TYPES
from edge_agent.pipeline.alerts import iso

SHOWN = 200  # transitions, and actions, in the answer about one alert: the newest
MAX_REASON = 2_000  # characters: what fits into a form's field; a workshop's report has its own place

router = APIRouter(prefix="/v1/alerts", tags=["work"], dependencies=[Depends(only_known_parameters)], responses=WRONG)


def _line(value: object) -> object:
    """One line of text that any page, log and database can hold, as the collector demands of vehicles."""
    if not isinstance(value, str):
        return value  # for pydantic to refuse
    value = value.strip()
    if not value.isprintable():
        raise ValueError("must be printable characters on one line: no NUL, no line end, no control character")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be printable characters")
    return value


By = Annotated[str, BeforeValidator(_line), Field(min_length=1, max_length=128, examples=["anna"])]
Reason = Annotated[str, BeforeValidator(_line), Field(min_length=1, max_length=MAX_REASON)]
AlertId = Annotated[
    str, Path(min_length=1, max_length=128, examples=["0f7c4c1e-8e0e-5a0e-9d33-2f7f0a0c9a11"]),
    AfterValidator(_printable),
]  # fmt: skip
OfVehicle = Annotated[Word | None, Query(description="Needed only where two vehicles use the same alert id.")]
AMBIGUOUS: dict[int | str, dict[str, Any]] = {
    409: problem("Two vehicles use this alert id: say which by `vehicle_id`.")
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: problem(
        "The action does not fit where the work stands, or another person's label stands against it; the detail says "
        "where it stands and what is possible. Or two vehicles use this alert id: say which by `vehicle_id`."
    )
}
BODY: dict[int | str, dict[str, Any]] = {
    400: problem("The connection ended before the body did."), 408: problem("The body came too slowly."),
    413: problem("The body is too large."), 415: problem("The body is not declared as JSON."),
}  # fmt: skip


class Acknowledge(models.Request):
    """Somebody looks after it."""

    by: By = Field(description="Who.")
    reason: Annotated[str, BeforeValidator(_line), Field(max_length=MAX_REASON)] = Field(
        default="", description="Not needed here.", examples=["calling the driver"]
    )


class Resolve(models.Request):
    """It is dealt with."""

    by: By = Field(description="Who.")
    reason: Reason = Field(description="What was done.", examples=["coolant pump replaced"])


class FalseAlarm(models.Request):
    """There was nothing: the label of a negative."""

    by: By = Field(description="Who.")
    reason: Reason = Field(description="Why.", examples=["inverter inspected: temperatures normal"])
    revises: Annotated[int, Field(ge=1, le=2**62)] | None = Field(
        default=None,
        description="The id of the action whose verdict this one replaces; needed to change another person's label.",
    )


class Confirm(FalseAlarm):
    """It was right: the label of a positive. Say what it really was where that differs from the alert."""

    failure_type: Literal[FAILURE_TYPES] | None = Field(  # type: ignore[valid-type]
        default=None, description="What it really was.", examples=["inverter_overheating"]
    )
    severity: Literal["low", "medium", "high", "critical"] | None = Field(
        default=None, description="How severe it really was."
    )


BODIES = (Acknowledge, Resolve, FalseAlarm, Confirm)


class ActionOut(models.Answer):
    """One action: who did what, when and why."""

    action_id: int
    action: Literal["acknowledge", "confirm", "false-alarm", "resolve"]
    by: str
    reason: str
    time: str = Field(description="Server time.")
    failure_type: str | None = Field(default=None, description="What it really was, where that differs.")
    severity: str | None = None


class ActionReply(models.Answer):
    """What became of an action."""

    alert_id: str
    vehicle_id: str
    action: ActionOut
    repeated: bool = Field(description="True: this very action was on record already; nothing was changed.")
    work: models.Work = Field(description="Where the work stands now.")


class TransitionOut(models.Answer):
    """One message of the vehicle about the alert, in the order of arrival."""

    ingest_id: int
    transition: Literal["raised", "escalated", "cleared"]
    severity: Literal["low", "medium", "high", "critical"]
    time: str = Field(description="The vehicle's clock.")
    received: str = Field(description="Server time.")
    clock_trusted: bool
    replayed: bool
    type_probability: float | None = None


class AlertDetail(models.Alert):
    """One alert with everything known about it."""

    history: list[TransitionOut] = Field(description=f"Its newest {SHOWN} transitions; `transitions` counts all.")
    actions: list[ActionOut] = Field(description=f"What people did about it: the newest {SHOWN}, oldest first.")
    samples: dict[str, int] = Field(
        description="Raw windows around it, by state: waiting (for parts), whole, lake or broken.",
        examples=[{"lake": 3}],
    )
    links: dict[str, str] = Field(examples=[{"advice": "/v1/alerts/0f7c4c1e/advice?vehicle_id=EV_001"}])


async def one_alert(
    connection: AsyncConnection, alert_id: str, vehicle_id: str | None, *, lock: bool = False
) -> Row:  # fmt: skip
    """Return the alert of a path, as `work_rows.found` does. Raises `ProblemError` 404, or 409 for an id used twice."""
    rows = await work_rows.found(connection, alert_id, vehicle_id, lock=lock)
    if not rows:
        of = f" of vehicle {vehicle_id}" if vehicle_id else ""
        raise ProblemError(404, f"there is no alert {alert_id}{of} here; GET /v1/alerts lists what there is")
    if len(rows) > 1:
        some = ", ".join(row["vehicle_id"] for row in rows)
        raise ProblemError(409, f"more than one vehicle uses alert id {alert_id} ({some}, …): say ?vehicle_id=")
    return rows[0]


@router.get("", summary="List alerts with their work", responses={**AWAY})
async def alerts(
    *,
    running: Running,
    work: Annotated[
        Literal["new", "acknowledged", "confirmed", "false_alarm", "resolved"] | None,
        Query(description="Where the work stands; new: nobody has looked at it."),
    ] = None,
    verdict: Annotated[
        Literal["confirmed", "false_alarm", "none"] | None, Query(description="none: without a label.")
    ] = None,
    state: Annotated[
        Literal["open", "raised", "escalated", "cleared"] | None,
        Query(description="The vehicle's own state of it; open = raised or escalated."),
    ] = None,
    vehicle_id: Annotated[Word | None, Query(examples=["EV_001"])] = None,
    failure_type: Annotated[Word | None, Query(examples=["inverter_overheating"])] = None,
    severity: Annotated[Literal["low", "medium", "high", "critical"] | None, Query()] = None,
    origin: Annotated[Literal["model", "guard"] | None, Query(description="A model's head, or a fixed rule.")] = None,
    since_s: Annotated[float | None, Depends(since)] = None,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> models.AlertPage:
    """Alerts of the fleet, the newest arrival first, each with where its work stands and its label."""
    wanted = AlertFilter(
        vehicle_id=vehicle_id, failure_type=failure_type, severity=severity, state=state, origin=origin,
        since_s=since_s, work=work, verdict=verdict,
    )  # fmt: skip
    async with running.store.reading() as connection:
        rows = await reading.alerts(connection, wanted, before=cursor, limit=limit + 1)
    page = rows[:limit]
    return models.AlertPage(
        alerts=[shown.alert(row) for row in page], next=str(page[-1]["ingest_id"]) if len(rows) > limit else None
    )


@router.get("/{alert_id}", summary="One alert", responses={**AWAY, **NOT_FOUND, **AMBIGUOUS})
async def alert(running: Running, alert_id: AlertId, vehicle_id: OfVehicle = None) -> AlertDetail:
    """One alert: what was seen, its transitions, what people did about it, its label, its samples."""
    async with running.store.reading() as connection:
        key = (await one_alert(connection, alert_id, vehicle_id))["vehicle_id"], alert_id
        row = await reading.alert(connection, *key)
        history = await reading.transitions(connection, *key, limit=SHOWN)
        actions = await work_rows.actions(connection, *key, limit=SHOWN)
        samples = await reading.samples_of_alert(connection, *key)
    if row is None:  # READ COMMITTED: alerts are never removed by us, but a person at the database may
        raise ProblemError(404, f"there is no alert {alert_id} here any more")
    path, query = f"/v1/alerts/{quote(alert_id, safe='')}", f"?vehicle_id={row['vehicle_id']}"
    return AlertDetail(
        **dict(shown.alert(row)),
        history=[_transition(*told, row["vehicle_id"]) for told in history],
        actions=[_action(action) for action in actions],
        samples=samples,
        links={
            "self": path + query, "advice": f"{path}/advice{query}", "vehicle": f"/v1/vehicles/{row['vehicle_id']}",
            "samples": f"/v1/samples?alert_id={quote(alert_id, safe='')}&vehicle_id={row['vehicle_id']}",
        },
    )  # fmt: skip


def _transition(ingest_id: int, received_at_s: float, body: bytes, vehicle_id: str) -> TransitionOut:
    envelope, _ = decode_event(body, vehicle_id)
    told: dict[str, Any] = msgspec.json.decode(bytes(envelope.data))
    return TransitionOut(
        ingest_id=ingest_id, transition=told["transition"], severity=told["severity"], time=envelope.time,
        received=iso(received_at_s), clock_trusted=envelope.clocktrusted, replayed=envelope.replayed,
        type_probability=told.get("type_probability"),
    )  # fmt: skip


def _action(action: Action) -> ActionOut:
    return ActionOut(
        action_id=action.action_id, action=action.action, by=action.actor, reason=action.reason, time=iso(action.at_s),
        failure_type=action.failure_type, severity=action.severity,
    )  # fmt: skip


def _endpoint(
    name: ActionName, body: type[Acknowledge | Resolve | FalseAlarm]
) -> Callable[..., Awaitable[ActionReply]]:  # fmt: skip
    async def act(
        request: Request, running: Running, alert_id: AlertId, vehicle_id: OfVehicle = None
    ) -> ActionReply:  # fmt: skip
        said = (await read_model(request, body, running.settings)).model_dump()
        action = Action(
            action=name, actor=said["by"], reason=said["reason"], failure_type=said.get("failure_type"),
            severity=said.get("severity"), at_s=running.wall(),
        )  # fmt: skip
        async with running.store.reading() as connection:  # a search by id alone holds up no writer
            of = (await one_alert(connection, alert_id, vehicle_id))["vehicle_id"]
        async with running.store.writing() as connection:
            target = await one_alert(connection, alert_id, of, lock=True)
            done = await work_rows.act(connection, target, action, revises=said.get("revises"))
        if isinstance(done, Refused):
            raise ProblemError(409, f"alert {alert_id} {done.why}")
        return ActionReply(
            alert_id=alert_id, vehicle_id=target["vehicle_id"], action=_action(done.action), repeated=done.repeated,
            work=shown.work(done.work),
        )  # fmt: skip

    act.__doc__ = f"{body.__doc__} The same action of the same person, sent again, changes nothing: a retry is safe."
    return act


for _name, _body, _summary, _example in (
    ("acknowledge", Acknowledge, "I look after it", {"by": "anna"}),
    ("confirm", Confirm, "It was right", {
        "by": "anna", "reason": "inverter derated on the road; coolant pump found dead", "severity": "critical"
    }),
    ("false-alarm", FalseAlarm, "There was nothing", {"by": "anna", "reason": "inspected: temperatures are normal"}),
    ("resolve", Resolve, "It is dealt with", {"by": "anna", "reason": "coolant pump replaced"}),
):  # fmt: skip
    router.post(
        f"/{{alert_id}}/{_name}", summary=_summary, operation_id=f"{_name.replace('-', '_')}_alert",
        responses={**AWAY, **NOT_FOUND, **CONFLICT, **BODY},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {
            "schema": {"$ref": f"#/components/schemas/{_body.__name__}"},
            "examples": {_name: {"summary": _summary, "value": _example}},
        }}}},
    )(_endpoint(_name, _body))  # type: ignore[arg-type]  # fmt: skip

"""Every label that people gave to alerts: what retraining learns from, and how good the alerts were."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from cloud.alert_work.life_cycle import Action
from cloud.api import models
from cloud.api.endpoint import AWAY, WRONG, Limit, Running, Word, only_known_parameters, read_time
from cloud.store import work_rows
from cloud.store.reading import Row
from cloud.store.work_rows import LabelFilter
from edge_agent.pipeline.alerts import iso

router = APIRouter(prefix="/v1/labels", tags=["work"], dependencies=[Depends(only_known_parameters)], responses=WRONG)


class Label(models.Answer):
    """One alert's label as it stands: the verdict that was given last."""

    vehicle_id: str
    alert_id: str
    verdict: Literal["confirmed", "false_alarm"]
    failure_type: str = Field(description="Of the label: the alert's own, or what a person corrected it to.")
    severity: str = Field(description="Of the label, likewise.")
    alert_failure_type: str = Field(description="What the alert said.")
    alert_severity: str
    origin: Literal["model", "guard"]
    rule: str
    since: str = Field(description="When the first window or arrival showed it; the vehicle's clock.")
    cleared: str | None = Field(description="When it was over, on the vehicle's clock; null while it is open.")
    model_release: int | None
    model_name: str
    work: Literal["acknowledged", "confirmed", "false_alarm", "resolved"]
    by: str | None = Field(description="Who gave the verdict; null where the log does not have it.")
    reason: str | None
    given: str = Field(description="When the verdict was given; server time.")
    action_id: int | None
    ingest_id: int = Field(description="Of the alert: the order that this list is in.")


class LabelPage(models.Answer):
    """A page of labels in the order of their alerts' arrival. `next` is the cursor of the following page."""

    labels: list[Label]
    next: str | None = None


@router.get("", summary="List labels", responses={**AWAY})
async def labels(
    *,
    running: Running,
    verdict: Annotated[Literal["confirmed", "false_alarm"] | None, Query()] = None,
    failure_type: Annotated[Word | None, Query(description="Of the label, after correction.")] = None,
    vehicle_id: Annotated[Word | None, Query(examples=["EV_001"])] = None,
    changed_since: Annotated[
        str | None,
        Query(
            max_length=40, examples=["2026-03-01T00:00:00Z"],
            description="Only alerts whose work changed at or after this time: ISO 8601 or Unix seconds.",
        ),
    ] = None,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> LabelPage:  # fmt: skip
    """Every alert that has a verdict, each once, in the order in which the alerts arrived."""
    wanted = LabelFilter(
        vehicle_id=vehicle_id, verdict=verdict, failure_type=failure_type,
        since_s=None if changed_since is None else read_time("changed_since", changed_since),
    )  # fmt: skip
    async with running.store.reading() as connection:
        rows = await work_rows.labels(connection, wanted, after=cursor, limit=limit + 1)
    page = rows[:limit]
    return LabelPage(
        labels=[_label(row, action) for row, action in page],
        next=str(page[-1][0]["ingest_id"]) if len(rows) > limit else None,
    )


def _label(row: Row, gave: Action | None) -> Label:
    return Label(
        **{name: row[name] for name in (
            "vehicle_id", "alert_id", "verdict", "origin", "rule", "since", "model_release", "model_name", "ingest_id",
        )},
        failure_type=row["label_failure_type"] or row["failure_type"],
        severity=row["label_severity"] or row["severity"],
        alert_failure_type=row["failure_type"], alert_severity=row["severity"], cleared=row["cleared_time"],
        work=row["work_state"], by=gave.actor if gave else None, reason=gave.reason if gave else None,
        given=iso(gave.at_s if gave else row["updated_at_s"]), action_id=gave.action_id if gave else None,
    )  # fmt: skip

"""Samples: raw windows on their way into the lake, how many lie there, and why one does not."""

from collections import defaultdict
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from cloud.api.endpoint import AWAY, WRONG, Limit, Running, Word, only_known_parameters
from cloud.store import sample_reading
from cloud.store.sample_reading import DAY_S, Row, SampleFilter, Total
from edge_agent.pipeline.alerts import iso

State = Literal["waiting", "whole", "lake", "broken"]
DAYS_SHOWN = 31

router = APIRouter(dependencies=[Depends(only_known_parameters)], responses=WRONG)


class SampleOut(BaseModel):
    """One raw window. `received` and `stored` are server time, `end` the vehicle's."""

    vehicle_id: str
    sample_id: str
    ingest_id: int = Field(description="Order of arrival here, of its first part.")
    state: State
    detail: str = Field(examples=["parts 2, 3 of 3 have not come"], description="What is missing, or what is wrong.")
    reason: Literal["alert", "random"]
    alert_id: str = Field(description="The alert it stands around; empty for one of the random share.")
    failure_type: str
    stratum: str
    end: str = Field(description="End of the window.")
    model_release: int | None
    coverage: float
    parts: int
    bytes: int = Field(description="Packed.")
    received: str
    stored: str | None = Field(description="When it was in the lake.")
    file: str = Field(description="Its file, below the lake's root.")


class DayTotal(BaseModel):
    """Samples that arrived on one day (UTC), whatever became of them."""

    day: str = Field(examples=["2026-03-01"])
    samples: int
    bytes: int


class LakeOut(BaseModel):
    """The lake that samples are moved into. `files` and `bytes` are null until it was looked at."""

    name: str = Field(examples=["var/lake", "s3://fleet/lake"])
    detail: str = Field(description="Why it cannot be used at the moment; empty when it can.")
    files: int | None
    bytes: int | None


class SamplePage(BaseModel):
    """Totals over all samples, and a page of those that were asked for."""

    by_state: dict[State, int]
    by_reason: dict[Literal["alert", "random"], int]
    by_day: list[DayTotal] = Field(description=f"The newest {DAYS_SHOWN} days that have any, the newest first.")
    lake: LakeOut
    samples: list[SampleOut]
    next: str | None = None


@router.get("/v1/samples", summary="Samples for training", tags=["samples"], responses={**AWAY})
async def samples(
    *,
    running: Running,
    state: Annotated[
        Literal["unfinished", "any"] | State,
        Query(description="unfinished = waiting (for parts) or broken; whole = on its way into the lake."),
    ] = "unfinished",
    vehicle_id: Annotated[Word | None, Query(description="Only of this vehicle.", examples=["EV_001"])] = None,
    reason: Annotated[Literal["alert", "random"] | None, Query()] = None,
    alert_id: Annotated[Word | None, Query(description="Only around this alert.")] = None,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> SamplePage:
    """Totals of the raw windows that vehicles sent for training, and those that are not in the lake, with the reason.

    The totals are over all samples, whatever is filtered; the list is in the order of arrival, the newest first.
    """
    states: dict[str, tuple[str, ...] | None] = {"unfinished": ("waiting", "broken"), "any": None}
    wanted = SampleFilter(states=states.get(state, (state,)), vehicle_id=vehicle_id, reason=reason, alert_id=alert_id)
    async with running.store.reading() as connection:
        totals = await sample_reading.totals(connection)
        rows = await sample_reading.page(connection, wanted, before=cursor, limit=limit + 1)
    page = rows[:limit]
    usage = running.mover.usage
    return SamplePage(
        by_state={name: sum(t.samples for t in totals if t.state == name) for name in _STATES},
        by_reason={name: sum(t.samples for t in totals if t.reason == name) for name in _REASONS},
        by_day=_days(totals),
        lake=LakeOut(
            name=running.mover.lake.name, detail=running.mover.detail, files=usage.files if usage else None,
            bytes=usage.bytes if usage else None,
        ),
        samples=[_sample(row) for row in page],
        next=str(page[-1]["ingest_id"]) if len(rows) > limit else None,
    )  # fmt: skip


_STATES: tuple[State, ...] = ("waiting", "whole", "lake", "broken")
_REASONS: tuple[Literal["alert", "random"], ...] = ("alert", "random")


def _days(totals: list[Total]) -> list[DayTotal]:
    days: defaultdict[int, list[Total]] = defaultdict(list)
    for total in totals:
        days[total.day].append(total)
    return [
        DayTotal(
            day=datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%d"),
            samples=sum(total.samples for total in days[day]),
            bytes=sum(total.bytes for total in days[day]),
        )
        for day in sorted(days, reverse=True)[:DAYS_SHOWN]
    ]


def _sample(row: Row) -> SampleOut:
    same = (
        "vehicle_id", "sample_id", "ingest_id", "state", "detail", "reason", "alert_id", "failure_type", "stratum",
        "model_release", "coverage", "parts",
    )  # fmt: skip
    return SampleOut(
        **{name: row[name] for name in same}, end=row["end_time"], bytes=row["length"],
        received=iso(row["received_at_s"]), stored=None if row["stored_at_s"] is None else iso(row["stored_at_s"]),
        file=row["lake_file"],
    )  # fmt: skip

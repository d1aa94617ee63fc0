"""Drift: how far a vehicle, a make or the fleet lies from what a release was trained on, and the alerts about it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.api import models
from cloud.api.endpoint import AWAY, NOT_FOUND, WRONG, Limit, Running, Word, only_known_parameters, read_time, since
from cloud.api.problems import FieldProblem, ProblemError
from cloud.drift.decide import Judged, Scope, Verdict
from cloud.drift.limits import Drift
from cloud.drift.look import Looked, Wanted, look
from cloud.drift.merge import Size
from cloud.store import drift_rows
from cloud.store.drift_rows import AlertWanted, Known, Span
from edge_agent.contract.messages import finite
from edge_agent.pipeline.alerts import iso

DAY_S = 86_400.0
# in one answer: half a minute of one core, at some 6,000 a second
MOST_MESSAGES = 200_000
FEW_MESSAGES = 2_000  # a vehicle's month: a third of a second, for which nobody waits his turn
TURN_WAIT_S = 30.0
RETRY_AFTER_S = 30
MOST_DAYS = 366  # a year of one vehicle is some 20,000 messages; of a fleet, ask by months

router = APIRouter(prefix="/v1/drift", tags=["drift"], dependencies=[Depends(only_known_parameters)], responses=WRONG)

Kind = Literal["signal", "feature", "score"]
Stratum = Literal["driving", "charging", "parked", "all"]
Time = Annotated[str | None, Query(max_length=40, examples=["2026-03-01T00:00:00Z"])]


class SampleSize(models.Answer):
    """How much stands behind a figure."""

    windows: int = Field(examples=[18_400], description="Counted, of the vehicles that are merged.")
    vehicles: int = Field(examples=[24], description="Merged: those with enough windows in the stratum.")
    effective_vehicles: float = Field(
        examples=[20.3], description="How many an equal merge of the same spread would have; limits go by it."
    )
    effective_windows: float = Field(examples=[15_100.0], description="Likewise, of windows.")
    reference_windows: int = Field(examples=[11_440], description="In the reference: windows, for a signal frames.")


class VariableDrift(models.Answer):
    """One signal, feature or score in one stratum."""

    name: str = Field(examples=["Vehicle.Powertrain.Inverter.Temperature"])
    kind: Kind
    stratum: Stratum
    verdict: Verdict
    why: str = Field(description="What there is too few of; empty for a verdict.", examples=[""])
    psi: float | None = Field(
        examples=[0.041], description="Population stability index in nats; half a count is added to every bin."
    )
    jensen_shannon: float | None = Field(examples=[0.083], description="Distance, base 2: 0 to 1.")
    ks: float | None = Field(examples=[0.052], description="Largest difference of the cumulative shares: 0 to 1.")
    threshold: float | None = Field(examples=[0.187], description="The psi from which it is drift.")
    threshold_source: Literal["release", "config"]
    size: SampleSize


class Calibration(models.Answer):
    """What the release's own limits promise."""

    false_alarm_rate: float = Field(examples=[0.01], description="Of any variable at all, in one look at a scope.")
    draws: int
    sizes: list[dict[str, int]] = Field(examples=[[{"vehicles": 10, "windows": 60}]])


class AgainstRelease(models.Answer):
    """Counts against the bins of one release, the largest index first. Counts of other bins never mix with them."""

    reference: str = Field(description="SHA-256 of the bins.")
    model_release: int
    model_name: str
    verdict: Verdict = Field(description="drift where any variable has drifted; too_few where none can be judged.")
    messages: int = Field(description="That were counted.")
    calibration: Calibration | None = Field(description="null: the release has no limits of its own.")
    note: str = Field(examples=[""], description="Says so where the configuration's limit stands in.")
    variables: list[VariableDrift]


class WaitingReference(models.Answer):
    """Counts against bins that nobody has registered here: stored, they count as soon as the release is known."""

    reference: str
    first_release: int = Field(description="The lowest release number that messages named.")
    last_release: int
    messages: int
    windows: int
    vehicles: int
    what_to_do: str


class SetAside(models.Answer):
    """Counts that do not fit the bins they name: stored, shown here, never added."""

    reference: str
    problem: str = Field(examples=["'Vehicle.Speed' has 4 counts, its bins are 9"])
    messages: int
    vehicles: int


class DriftLimits(models.Answer):
    """The configuration's part in the verdicts."""

    min_windows: int
    min_vehicles: int
    min_vehicle_windows: int
    max_vehicle_share: float
    psi: float
    least_psi: float


class DriftOut(models.Answer):
    """Drift of one scope over a span of time."""

    scope: Scope
    scope_id: str = Field(description="The vehicle or the make; empty for the fleet.")
    begin: str = Field(alias="from", serialization_alias="from")
    end: str = Field(alias="to", serialization_alias="to")
    verdict: Verdict = Field(description="Over all releases. too_few where nothing was counted.")
    references: list[AgainstRelease]
    unknown_references: list[WaitingReference]
    set_aside: list[SetAside]
    limits: DriftLimits


class DriftAlertOut(models.Answer):
    """One episode: a variable that left its reference, until it came back."""

    drift_alert_id: int
    scope: Scope
    scope_id: str
    state: Literal["open", "cleared"]
    variable: str
    kind: Kind
    stratum: Stratum
    measure: Literal["psi"]
    value: float | None = Field(description="The newest while it was open.")
    threshold: float | None
    windows: int
    vehicles: int
    reference: str
    model_release: int
    raised: str
    updated: str
    cleared: str | None


class DriftAlertPage(models.Answer):
    """A page of drift alerts, the newest first. `next` is the cursor of the following page."""

    alerts: list[DriftAlertOut]
    next: str | None = None


@router.get("", summary="Drift of a vehicle, a make or the fleet", responses={**AWAY, **NOT_FOUND})
async def drift(
    *,
    running: Running,
    vehicle_id: Annotated[Word | None, Query(description="Only this vehicle.", examples=["EV_001"])] = None,
    make: Annotated[
        str | None, Query(min_length=1, max_length=128, description="Only this make.", examples=["sim"])
    ] = None,
    begin: Annotated[Time, Query(alias="from", description="By default `drift.window_hours` before `to`.")] = None,
    end: Annotated[Time, Query(alias="to", description="By default now.")] = None,
    stratum: Annotated[Stratum | None, Query(description="What the vehicles were doing.")] = None,
    kind: Annotated[Kind | None, Query()] = None,
) -> DriftOut:
    """Compare what vehicles counted in a span of time with what each release saw in training.

    Without `vehicle_id` or `make` it is the whole fleet. A vehicle counts with its share of the windows, but at most
    `max_vehicle_share`; with fewer vehicles than 1 / `max_vehicle_share`, all count the same. What would read more than
    200,000 messages is a 422 that says how to narrow it; a 503 says that other large questions come first. Counts
    belong to the time at which their span ended: by the vehicle's clock where it is trusted or a recording was
    replayed, else by their arrival. A vehicle that was never heard of is a 404; one without counts is an empty answer
    with `too_few`.
    """
    if vehicle_id is not None and make is not None:
        words = "give vehicle_id or make, not both"
        raise ProblemError(422, f"make: {words}", errors=[FieldProblem(field="make", problem=words)])
    limits = running.limits.drift
    span = _span(begin, end, running.wall(), limits)
    scope: Scope = "vehicle" if vehicle_id is not None else "make" if make is not None else "fleet"
    wanted = Wanted(frozenset({scope}), vehicle_id=vehicle_id, make=make, stratum=stratum)
    against: list[AgainstRelease] = []
    unfit: list[SetAside] = []
    async with running.store.reading() as connection:
        if vehicle_id is not None and not await drift_rows.vehicle_known(connection, vehicle_id):
            raise ProblemError(404, f"vehicle {vehicle_id}: was never heard of here")
        messages = await drift_rows.messages_counted(
            connection, span, vehicle_id=vehicle_id, make=make, stratum=stratum
        )
    async with _turn(running.drift.turns, messages), running.store.reading() as connection:
        for known in await drift_rows.references_counted(connection, span):
            answer, wrong = await _against(connection, known, span, wanted, limits, kind)
            unfit += wrong
            if answer is not None:
                against.append(answer)
        waiting = await drift_rows.waiting(connection, span, vehicle_id)
        aside = await drift_rows.problems(connection, span, vehicle_id)
    return DriftOut(
        scope=scope, scope_id=vehicle_id or make or "", **{"from": iso(span.from_s), "to": iso(span.to_s)},
        verdict=_overall([a.verdict for a in against]), references=against,
        unknown_references=[
            WaitingReference(
                **{n: row[n] for n in ("reference", "first_release", "last_release", "messages", "vehicles")},
                windows=int(row["windows"]),
                what_to_do="start the service with this release's bundle, or register it: "
                "fleet-cloud register-reference BUNDLE",
            )
            for row in waiting
        ],
        set_aside=[*(SetAside(**row) for row in aside), *unfit],
        limits=DriftLimits(**{name: getattr(limits, name) for name in DriftLimits.model_fields}),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _turn(turns: asyncio.Semaphore, messages: int) -> AsyncIterator[None]:
    """Wait until so many messages may be read. Raises `ProblemError`; no connection of the store is held meanwhile."""
    if messages > MOST_MESSAGES:
        words = (
            f"{messages} drift messages lie between `from` and `to`, and one answer reads at most {MOST_MESSAGES}: "
            "shorten the time, or name a stratum, a make or a vehicle_id"
        )
        raise ProblemError(422, f"from: {words}", errors=[FieldProblem(field="from", problem=words)])
    if messages <= FEW_MESSAGES:
        yield
        return
    try:
        async with asyncio.timeout(TURN_WAIT_S):
            await turns.acquire()
    except TimeoutError:
        raise ProblemError(
            503, "other questions about the drift of many vehicles are being answered: try again later, or ask less",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        ) from None  # fmt: skip
    try:
        yield
    finally:
        turns.release()


def _span(begin: str | None, end: str | None, now_s: float, limits: Drift) -> Span:
    to_s = now_s if end is None else read_time("to", end)
    from_s = to_s - limits.window_hours * 3600.0 if begin is None else read_time("from", begin)
    words = ""
    if from_s >= to_s:
        words = "must lie before `to`"
    elif to_s - from_s > MOST_DAYS * DAY_S:
        words = f"must lie at most {MOST_DAYS} days before `to`"
    if words:
        raise ProblemError(422, f"from: {words}", errors=[FieldProblem(field="from", problem=words)])
    return Span(from_s, to_s)


async def _against(
    connection: AsyncConnection, known: Known, span: Span, wanted: Wanted, limits: Drift, kind: Kind | None
) -> tuple[AgainstRelease | None, list[SetAside]]:
    looked = Looked()
    judged: list[Judged] = []
    async for _, _, found in look(connection, known, span, wanted, limits, looked):
        judged += [one for one in found if kind in (None, one.kind)]
    unfit = [
        SetAside(reference=known.reference, problem=problem, messages=1, vehicles=1) for _, problem in looked.wrong
    ]
    if not looked.totals:
        return None, unfit
    judged.sort(key=lambda one: (-(one.distances.psi if one.distances else -1.0), one.variable, one.stratum))
    told = known.bins.reference.calibration
    calibration = None
    note = f"release {known.model_release} has no calibrated limits: drift.psi of the configuration stands in"
    if told is not None:
        sizes = [{"vehicles": size.vehicles, "windows": size.windows} for size in told.sizes]
        calibration = Calibration(false_alarm_rate=told.false_alarm_rate, draws=told.draws, sizes=sizes)
        note = ""
    return AgainstRelease(
        reference=known.reference, model_release=known.model_release, model_name=known.model_name,
        verdict=_overall([one.verdict for one in judged]), messages=sum(t.messages for t in looked.totals),
        calibration=calibration, note=note, variables=[_variable(one) for one in judged],
    ), unfit  # fmt: skip


def _overall(verdicts: list[Verdict]) -> Verdict:
    return "drift" if "drift" in verdicts else "ok" if "ok" in verdicts else "too_few"


def _variable(one: Judged) -> VariableDrift:
    found = one.distances
    return VariableDrift(
        name=one.variable, kind=one.kind, stratum=one.stratum, verdict=one.verdict, why=one.why,  # type: ignore[arg-type]
        psi=finite(found.psi) if found else None, jensen_shannon=finite(found.jensen_shannon) if found else None,
        ks=finite(found.ks) if found else None, threshold=one.threshold, threshold_source=one.threshold_source,
        size=_size(one.size, one.reference_windows),
    )  # fmt: skip


def _size(size: Size, reference_windows: int) -> SampleSize:
    return SampleSize(
        windows=size.windows, vehicles=size.vehicles, effective_vehicles=round(size.effective_vehicles, 3),
        effective_windows=round(size.effective_windows, 1), reference_windows=reference_windows,
    )  # fmt: skip


@router.get("/alerts", summary="Drift alerts", responses={**AWAY})
async def alerts(
    *,
    running: Running,
    scope: Annotated[Scope | None, Query()] = None,
    scope_id: Annotated[
        str | None, Query(max_length=128, description="Of this vehicle or make.", examples=["EV_001"])
    ] = None,
    state: Annotated[Literal["open", "cleared"] | None, Query()] = None,
    since_s: Annotated[float | None, Depends(since)] = None,
    limit: Limit = 100,
    cursor: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> DriftAlertPage:
    """List the variables that left the reference of a release, the newest episode first.

    The span of `drift.window_hours` that ends now is looked at again and again. An alert is raised at the threshold and
    cleared below `drift.clear_ratio` of it, or when a whole span gave too few counts to say. `since` is by when it was
    raised.
    """
    wanted = AlertWanted(
        scope=scope, scope_id=scope_id, is_open=None if state is None else state == "open", since_s=since_s
    )
    async with running.store.reading() as connection:
        rows = await drift_rows.alerts(connection, wanted, before=cursor, limit=limit + 1)
    page = rows[:limit]
    return DriftAlertPage(
        alerts=[alert_out(row) for row in page], next=str(page[-1]["drift_alert_id"]) if len(rows) > limit else None
    )


def alert_out(row: dict[str, Any]) -> DriftAlertOut:
    """Show a row of `drift_alert`."""
    same = (
        "drift_alert_id", "scope", "scope_id", "variable", "kind", "stratum", "measure", "windows", "vehicles",
        "reference", "model_release",
    )  # fmt: skip
    cleared = row["cleared_at_s"]
    return DriftAlertOut(
        **{name: row[name] for name in same}, value=finite(row["value"]), threshold=finite(row["threshold"]),
        state="open" if cleared is None else "cleared", raised=iso(row["raised_at_s"]),
        updated=iso(row["updated_at_s"]), cleared=None if cleared is None else iso(cleared),
    )  # fmt: skip

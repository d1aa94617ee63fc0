"""Whether a training run is due, and on what evidence; what the last run came to."""

from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from cloud.api import models
from cloud.api.endpoint import AWAY, WRONG, Running, only_known_parameters
from cloud.api.v1.drift import DriftAlertOut, alert_out
from cloud.drift import due
from cloud.drift.retraining import Trigger, TriggerName
from cloud.store import retraining_rows
from cloud.store.training_rows import TrainingRun
from edge_agent.contract.messages import finite
from edge_agent.pipeline.alerts import iso

COMMAND = "fleet-cloud retrain --data BASE_DATASET --models CHAMPION_MODELS --lake {lake} --database DATABASE_URL"

router = APIRouter(dependencies=[Depends(only_known_parameters)], responses=WRONG)


class TriggerOut(models.Answer):
    """One trigger; any one that is due is enough."""

    name: TriggerName
    due: bool
    value: float | None = Field(description="null: it cannot be known; `why` says for what reason.", examples=[4])
    threshold: float = Field(examples=[3])
    why: str = Field(
        examples=[
            "4 variables left the release's reference since the last training began, on the fleet or a make; due from 3"
        ]
    )


class PerformanceOut(models.Answer):
    """Precision of the release's alerts by people's labels, against the precision that the release states."""

    judged: int = Field(description="Alerts of this release's models with a verdict, of types with a stated precision.")
    confirmed: int = Field(description="Of them confirmed, as the type that the alert said.")
    observed_precision: float | None
    observed_precision_upper: float | None = Field(
        description="The true precision lies below, at 95 % confidence (one-sided, Clopper-Pearson): what is compared."
    )
    stated_precision: float | None = Field(
        description="By the release itself, on windows of vehicles it had not seen; weighted by judged alerts a type."
    )
    types_without_stated_precision: list[str] = Field(description="Judged, but left out.")


class ChampionOut(models.Answer):
    """The release that this service runs."""

    release: int
    created: str | None


class TrainingRunOut(models.Answer):
    """What a training run came to."""

    started: str
    finished: str
    champion_release: int | None
    verdict: str = Field(examples=["champion"], description="challenger: it may be exported and rolled out.")
    samples: int
    labels: int
    frozen_sha256: str


class RetrainingOut(models.Answer):
    """The four triggers of a training run."""

    due: bool
    triggers: list[TriggerOut]
    champion: ChampionOut | None = Field(description="null: no bundle is loaded here.")
    last_training: str | None = Field(description="The start of a run, or when the release was made.")
    counted_from: str | None = Field(
        description="Samples and drift alerts from then on were in no training: a run reads the lake when it begins."
    )
    last_training_source: Literal["training_run", "release", "unknown"] = Field(
        description="What says so: the newest recorded run, or the making of the release, whichever is later."
    )
    drift_alerts: list[DriftAlertOut] = Field(
        description="Against this release's reference, of the fleet and of makes, raised since; the newest 50."
    )
    drifted_variables: list[str] = Field(description="Of these alerts, each once: what the trigger counts.")
    performance: PerformanceOut
    last_run: TrainingRunOut | None
    command: str = Field(description="What to run where the base dataset and the champion's models are.")


@router.get("/v1/retraining", summary="Whether a training run is due", tags=["retraining"], responses={**AWAY})
async def retraining(running: Running) -> RetrainingOut:
    """Evaluate the triggers from this service's own store.

    Due at so many variables with a drift alert of the fleet or a make, at so many days since the last training, at so
    many new samples in the lake, or when the precision that labels show lies too far below the stated one; see
    `retraining` in the configuration. A run builds a challenger, which replaces the champion only if it is better on
    the same frozen set, and only when a person publishes it.
    """
    bundle = running.bundle
    champion = None if bundle is None else due.champion_of(bundle.manifest, bundle.thresholds)
    async with running.store.reading() as connection:
        found = await due.evaluate(connection, champion, running.limits.retraining, running.wall())
        alerts = await retraining_rows.drift_alerts(connection, champion, found.trained.since_s)
    told, at_s = found.performance, found.trained.at_s
    return RetrainingOut(
        due=found.is_due,
        triggers=[_trigger(t) for t in found.triggers],
        champion=None if bundle is None else ChampionOut(
            release=bundle.manifest.release,
            created=None if champion is None or champion.created_s is None else iso(champion.created_s),
        ),
        last_training=None if at_s is None else iso(at_s),
        counted_from=None if found.trained.since_s is None else iso(found.trained.since_s),
        last_training_source=found.trained.source,
        drift_alerts=[alert_out(row) for row in alerts],
        drifted_variables=list(found.evidence.drifted),
        performance=PerformanceOut(
            judged=told.judged, confirmed=told.confirmed, observed_precision=finite(told.observed),
            observed_precision_upper=finite(told.upper),
            stated_precision=finite(told.stated), types_without_stated_precision=list(told.unstated_types),
        ),
        last_run=None if found.run is None else _run(found.run),
        command=COMMAND.format(lake=running.settings.lake),
    )  # fmt: skip


def _trigger(told: Trigger) -> TriggerOut:
    return TriggerOut(
        name=told.name, due=told.due, value=finite(told.value), threshold=told.threshold, why=told.why
    )  # fmt: skip


def _run(run: TrainingRun) -> TrainingRunOut:
    same = ("champion_release", "verdict", "samples", "labels", "frozen_sha256")
    return TrainingRunOut(
        started=iso(run.started_at_s), finished=iso(run.finished_at_s), **{name: getattr(run, name) for name in same}
    )

"""Ask the store whether a training run is due: for the API, and for `fleet-cloud retrain --if-due`."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.drift import retraining
from cloud.drift.limits import Retraining
from cloud.drift.retraining import Champion, Evidence, Performance, Trained, Trigger, stated_precision
from cloud.store import retraining_rows, training_rows
from cloud.store.training_rows import TrainingRun
from cloud.store.wire_time import unix_s
from edge_agent.contract.bundle import DRIFT_REFERENCE, Manifest, Thresholds
from edge_agent.contract.errors import MessageError


@dataclass(frozen=True, slots=True)
class Due:
    """The answer, with everything that it stands on."""

    champion: Champion | None
    trained: Trained
    run: TrainingRun | None
    evidence: Evidence
    performance: Performance
    triggers: tuple[Trigger, ...]

    @property
    def is_due(self) -> bool:
        """Whether any trigger is."""
        return any(trigger.due for trigger in self.triggers)


def champion_of(manifest: Manifest, thresholds: Thresholds) -> Champion:
    """Describe a release by its own documents."""
    try:
        created: float | None = unix_s(manifest.created)
    except MessageError:  # free text in the manifest's contract
        created = None
    return Champion(
        manifest.release, created, stated_precision(thresholds), manifest.files[DRIFT_REFERENCE].sha256
    )  # fmt: skip


async def evaluate(connection: AsyncConnection, champion: Champion | None, limits: Retraining, now_s: float) -> Due:
    """Gather the evidence and evaluate the triggers."""
    run = await training_rows.last_training_run(connection)
    trained = retraining.last_training(champion, run.started_at_s if run else None)
    evidence = await retraining_rows.evidence(connection, champion, trained.since_s)
    return Due(
        champion, trained, run, evidence, retraining.performance(champion, evidence.judged),
        retraining.triggers(champion, trained, evidence, limits, now_s),
    )  # fmt: skip

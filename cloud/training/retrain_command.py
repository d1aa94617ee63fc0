"""`fleet-cloud retrain`: a challenger from the lake and people's verdicts, the comparison as a table, the run recorded.

The report is on disk before the store is told; a store that went away meanwhile costs the row, not the result.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cloud.drift import due
from cloud.drift.limits import Retraining
from cloud.store.connect import DEFAULT_URL, async_url
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.training_rows import TrainingRun, add_training_run
from cloud.training.commands import ConfigOption, SchemaOption, progress_bar
from cloud.training.config import DEFAULT_CONFIG, load_catalogue, load_config
from edge_agent.contract.errors import UnavailableError
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle

ATTEMPTS = 3
PAUSE_S = 5.0  # a migration or a restart of the database takes about so long
# ruff: noqa: PLC0415 - heavy imports stand inside: `--help` answers at once


def retrain(
    config: ConfigOption = DEFAULT_CONFIG,
    data: Annotated[Path, typer.Option("--data", help="Base dataset, as `prepare` wrote it; only read.")] = Path(
        "datasets"
    ),
    models: Annotated[Path, typer.Option("--models", help="The champion's models; only read.")] = Path("models"),
    lake: Annotated[str, typer.Option("--lake", envvar="VOLTWATCH_LAKE", help="Lake of samples: folder or URL.")] = (
        "var/lake"
    ),
    database: Annotated[
        str, typer.Option("--database", envvar="DATABASE_URL", help="The store with people's verdicts.")
    ] = DEFAULT_URL,
    output: Annotated[Path, typer.Option("--output", help="Where dataset, challenger and report go.")] = Path(
        "retraining"
    ),
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="The champion's bundle: says which alerts are its own, and how old it is."),
    ] = None,
    if_due: Annotated[bool, typer.Option("--if-due", help="Only where a trigger of the server's is due.")] = False,
    schema: SchemaOption = None,
) -> None:
    """Train a challenger from the lake's samples and operators' verdicts; say whether it beats the champion."""
    settings = load_config(config)
    catalogue = load_catalogue(settings, config, schema)
    release = None if bundle is None else load_bundle(bundle, catalogue)
    _require_store(database)
    if if_due and not _is_due(database, release, settings.retraining):
        return
    from cloud.training.retrain import Places
    from cloud.training.retrain import retrain as run
    from cloud.training.retraining_report import next_steps, sources, table, write_report

    started_at_s = time.time()
    champion_release = None if release is None else release.manifest.release
    places = Places(data, models, lake, database, output)
    with progress_bar() as progress:
        bar = progress.add_task("retraining", total=100)
        result = run(
            places,
            config=settings,
            catalogue=catalogue,
            champion_release=champion_release,
            on_step=lambda what, share: progress.update(bar, description=what, completed=round(100 * share)),
        )
    page = write_report(result.report, result.figures, output)
    console = Console()
    console.print(table(result.figures))
    for line in sources(result.report):
        console.print(escape(line))
    console.print(f"[bold]verdict: {result.verdict.winner}[/]")
    for reason in result.verdict.reasons:
        console.print(f"  {escape(reason)}")
    for step in next_steps(result.report):
        console.print(f"next: {escape(step)}", soft_wrap=True)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    row = TrainingRun(
        started_at_s=started_at_s,
        finished_at_s=time.time(),
        champion_release=champion_release,
        verdict=result.verdict.winner,
        samples=result.samples,
        labels=result.labels,
        frozen_sha256=result.frozen_sha256,
        report=json.dumps(result.report, allow_nan=False),
    )
    try:
        asyncio.run(record(database, row))
    except StoreAwayError as error:
        raise UnavailableError(f"{error}; the run is not recorded there, its report stays: {page}") from error


def _is_due(url: str, release: LoadedBundle | None, limits: Retraining) -> bool:
    """Ask the same triggers as the server's, and say what they say."""
    champion = None if release is None else due.champion_of(release.manifest, release.thresholds)

    async def ask() -> due.Due:
        store = FleetStore.over(url)
        try:
            await store.prepare()
            async with store.reading() as connection:
                return await due.evaluate(connection, champion, limits, time.time())
        finally:
            await store.close()

    found = asyncio.run(ask())
    for trigger in found.triggers:
        typer.echo(f"{'due    ' if trigger.due else 'not due'} {trigger.name}: {trigger.why}")
    if not found.is_due:
        typer.echo("nothing is due: no retraining")
    return found.is_due


def _require_store(url: str) -> None:
    """Raise `UnavailableError` for a SQLite file that is not there: an empty one would be made, and hold no verdict."""
    parsed = async_url(url)
    file = Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None
    if file is not None and not file.is_file():
        raise UnavailableError(
            f"store {file}: is not there; give the database that `fleet-cloud serve` writes (--database)"
        )


async def record(url: str, run: TrainingRun) -> int:
    """Write the run, trying again while the store is away. Raises `StoreAwayError` after the last attempt."""
    store = FleetStore.over(url)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with store.writing() as connection:
                    return await add_training_run(connection, run)
            except StoreAwayError:
                if attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(PAUSE_S)
        raise RuntimeError("no attempt")
    finally:
        await store.close()

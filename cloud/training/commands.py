"""`fleet-cloud prepare | train | evaluate`: the runbook's steps, with a progress bar each.

Heavy imports stand inside the commands: `--help` answers at once, and `prepare`'s workers start without lightgbm.
"""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cloud.training.config import DEFAULT_CONFIG, load_catalogue, load_config, load_mapping

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]
SchemaOption = Annotated[Path | None, typer.Option("--schema", help="Signal catalogue; default: the config's.")]
DataOption = Annotated[Path, typer.Option("--data", help="Folder that `prepare` wrote.")]
# ruff: noqa: PLC0415 - see the module's docstring


def prepare(
    config: ConfigOption = DEFAULT_CONFIG,
    source: Annotated[Path, typer.Option("--input", help="Folder with raw_frames/ and perhaps labels.parquet.")] = Path(
        "synthetic_data"
    ),
    output: Annotated[Path, typer.Option("--output", help="Where the dataset goes.")] = Path("datasets"),
    mapping: Annotated[
        Path | None, typer.Option("--map", help="Mapping of the columns; default: the config's.")
    ] = None,
    schema: SchemaOption = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Turn raw recordings into a labelled dataset: windows, features, split by vehicle."""
    settings = load_config(config)
    catalogue = load_catalogue(settings, config, schema)
    columns, _ = load_mapping(settings, config, mapping)
    # forkserver: workers start from a clean process that has the heavy imports done once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cloud.training.vehicle"])
    pool = ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=context, initializer=_end_with_parent)
    with progress_bar() as progress, pool as executor:
        executor.submit(int)  # starts the server, which imports while this process does the same
        from cloud.training.prepare import prepare_dataset

        bar = progress.add_task("preparing vehicles", total=None)
        info = prepare_dataset(
            source,
            output,
            config=settings,
            catalogue=catalogue,
            mapping=columns,
            executor=executor,
            on_vehicle=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for split, n in info.counts.items():
        _say(f"{split:<10} {n['vehicles']:>4} vehicles {n['windows']:>7} windows {n['episodes']:>4} failures")
    _say(f"dataset    {output} ({len(info.features)} features, {'labelled' if info.labelled else 'no labels'})")


def _end_with_parent() -> None:
    """In a worker: end when the command does, also by a signal that left it no time to say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True)
        watch.start()


def train(
    config: ConfigOption = DEFAULT_CONFIG,
    data: DataOption = Path("datasets"),
    output: Annotated[Path, typer.Option("--output", help="Where the models go.")] = Path("models"),
    schema: SchemaOption = None,
) -> None:
    """Train failure predictor, types, severity and autoencoder; choose thresholds."""
    settings = load_config(config)
    catalogue = load_catalogue(settings, config, schema)
    from cloud.training.train import train_models

    with progress_bar() as progress:
        bar = progress.add_task("training", total=100)
        thresholds = train_models(
            data,
            output,
            config=settings,
            catalogue=catalogue,
            on_step=lambda what, share: progress.update(bar, description=what, completed=round(100 * share)),
        )
    for name, limit in thresholds.policy.types.items():
        _say(f"{name:<24} raised at {limit.raise_at:.2f}")
    _say(f"models     {output} (thresholds: {thresholds.active})")


def evaluate(
    config: ConfigOption = DEFAULT_CONFIG,
    data: DataOption = Path("datasets"),
    models: Annotated[Path, typer.Option("--models", help="Folder that `train` wrote.")] = Path("models"),
    output: Annotated[Path | None, typer.Option("--output", help="Where the report goes; default: --models.")] = None,
    schema: SchemaOption = None,
) -> None:
    """Evaluate on the test vehicles; writes evaluation_report.json and evaluation_report.html."""
    settings = load_config(config)
    catalogue = load_catalogue(settings, config, schema)
    from cloud.training.evaluate import evaluate_models
    from cloud.training.report import summary, write_report

    with progress_bar() as progress:
        bar = progress.add_task("evaluating", total=100)
        report = evaluate_models(
            data,
            models,
            config=settings,
            catalogue=catalogue,
            on_step=lambda what, share: progress.update(bar, description=what, completed=round(90 * share)),
        )
        page = write_report(report, output or models)
        progress.update(bar, description="evaluated", completed=100)
    for line in summary(report):
        _say(line)
    _say(f"report     {page}")


def progress_bar() -> Progress:
    """Return the bar of every command here, on stderr."""
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _say(line: str) -> None:
    typer.echo(line)

"""`firmware-sim`: simulated vehicles, as training data (`generate`) or live (`drive`)."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_agent.contract.errors import VoltwatchError
from firmware_sim import fleet

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _callback() -> None:
    """Simulate vehicles, as training data (`generate`) or live (`drive`)."""


@app.command()
def generate(  # noqa: PLR0917  # typer options, given by name
    output: Annotated[Path, typer.Option(help="Folder to write; what lies there of an earlier run is replaced.")],
    vehicles: Annotated[int, typer.Option(min=1, help="Number of vehicles.")] = 60,
    days: Annotated[int, typer.Option(min=1, help="Simulated days.")] = 5,
    hours: Annotated[float, typer.Option(min=0.1, max=23.0, help="Hours awake a day.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files, whatever the number of workers.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    faulty: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of vehicles with a failure.")] = 0.5,
) -> None:
    """Simulate a fleet and write raw frames, labels and vehicles as Parquet."""
    spec = fleet.FleetSpec(vehicles=vehicles, days=days, hours=hours, seed=seed, faulty=faulty)
    console = Console(stderr=True)
    with Progress(
        TextColumn("simulating vehicles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("vehicles", total=vehicles)
        frames = fleet.generate(spec, output, workers=workers, on_progress=lambda done, _: progress.advance(task, done))
    print(f"{output}: {frames} frames of {vehicles} vehicles, {round(faulty * vehicles)} with a failure")


def main() -> None:
    """Run the command line; faults of the user or the outside are one line and an exit code."""
    try:
        app()
    except VoltwatchError as error:
        print(f"firmware-sim: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

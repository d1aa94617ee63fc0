"""`firmware-sim`: simulated vehicles, as training data (`generate`) or live (`drive`)."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES
from edge_agent.contract.topics import check_vehicle_id
from firmware_sim import faults, fleet
from firmware_sim.bus import open_bus
from firmware_sim.drive import Output, run
from firmware_sim.ride import RideSpec, build_vehicle
from firmware_sim.web import Post, Socket, WebOutput

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _callback() -> None:
    """Simulate vehicles, as training data (`generate`) or live (`drive`)."""


@app.command()
def generate(  # typer options, given by name
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


class Mode(StrEnum):
    """Whether the vehicle fails."""

    HEALTHY = "healthy"
    FAILURE = "failure"


@app.command()
def drive(  # typer options, given by name
    vehicle: Annotated[str, typer.Option(help="Id of the vehicle; its number and the seed decide what it is like.")],
    mode: Annotated[Mode, typer.Option(help="Stay healthy, or develop a failure.")] = Mode.HEALTHY,
    fault: Annotated[str, typer.Option(help=f"One of {', '.join(FAILURE_TYPES)}.")] = "inverter_overheating",
    variant: Annotated[str, typer.Option(help="Kind of that fault; the first of them unless given.")] = "",
    severity: Annotated[str, typer.Option(help=f"One of {', '.join(SEVERITIES)}.")] = "critical",
    fault_after: Annotated[float, typer.Option(min=0, help="Simulated seconds until the fault begins.")] = 60.0,
    speed: Annotated[float, typer.Option(min=0.01, max=1000, help="Simulated seconds a real second.")] = 1.0,
    duration: Annotated[float | None, typer.Option(min=1, help="Simulated seconds; without end unless given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed and vehicle, same drive.")] = 1,
    can: Annotated[str | None, typer.Option(help="slcan-pty:LINK, or INTERFACE:CHANNEL of python-can.")] = None,
    bitrate: Annotated[int, typer.Option(min=10_000, help="Of the CAN interface.")] = 500_000,
    http: Annotated[str | None, typer.Option(help="Address of the API: frames go to POST /telemetry.")] = None,
    ws: Annotated[str | None, typer.Option(help="Address of the API: frames go to WS /ws/telemetry.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report lines as JSON.")] = False,
) -> None:
    """Drive one vehicle live, onto a CAN bus or to the cloud's API."""
    check_vehicle_id(vehicle)
    if fault not in FAILURE_TYPES:
        raise ConfigError(f"--fault {fault!r}: no such failure type; one of {', '.join(FAILURE_TYPES)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"--severity {severity!r}: one of {', '.join(SEVERITIES)}")
    if variant and variant not in faults.variants(fault):
        raise ConfigError(f"--variant {variant!r}: {fault} has {', '.join(faults.variants(fault))}")
    spec = RideSpec(
        vehicle_id=vehicle,
        seed=seed,
        start_s=float(int(time.time())),
        fault=fault if mode is Mode.FAILURE else "",
        variant=variant,
        severity=severity,
        fault_after_s=fault_after,
    )
    output = _output(spec, can, http, ws, bitrate)
    seconds = run(
        spec, output, speed=speed, duration_s=duration, say=lambda line: print(line, flush=True), as_json=as_json
    )
    print(f"{vehicle}: {seconds} simulated seconds sent", file=sys.stderr)


def _output(spec: RideSpec, can: str | None, http: str | None, ws: str | None, bitrate: int) -> Output:
    if sum(target is not None for target in (can, http, ws)) != 1:
        raise ConfigError("give exactly one output: --can TARGET, --http URL or --ws URL")
    if can is not None:
        return open_bus(can, bitrate)
    make = build_vehicle(spec).make.name
    return WebOutput(Post(http) if http is not None else Socket(ws or ""), spec.vehicle_id, make)

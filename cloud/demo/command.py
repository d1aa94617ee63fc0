"""`fleet-cloud demo`: build what is not valid any more, start the processes, follow them until an alert or Ctrl-C."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from cloud.demo import screen
from cloud.demo.build import ROOT, build
from cloud.demo.fleet_api import FleetApi, advice_path
from cloud.demo.processes import Processes, answers, free_port, port_is_free
from edge_agent.contract.errors import UnavailableError

VEHICLES = ("EV_001", "EV_002", "EV_003")
FAILING = "EV_001"
FAULT = "motor_bearing_wear"  # no guard watches for it: what raises it is a model head over whole windows
FAULT_AFTER_S = 120
START_WITHIN_S = 30.0
ALERT_WITHIN_S = 3_000.0  # of the vehicle's time; a first window takes 300, two of three windows over threshold 60 more
REFRESH_S = 0.5
PLAIN_EVERY_S = 3.0


class _StopError(Exception):
    """Ctrl-C, or a polite request to end."""


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End with exit code 0 once an alert went all the way.")] = False,
    speed: Annotated[float, typer.Option(min=1, max=240, help="How much faster than real time.")] = 60,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the fleet API on 127.0.0.1.")] = 8000,
    work: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("var/demo"),
) -> None:
    """Show the whole way on one machine: simulate, train, export, drive three vehicles until one fails."""
    console = Console(highlight=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        if not port_is_free(port):
            raise UnavailableError(f"port {port} on 127.0.0.1 is in use: stop what uses it, or `make demo PORT=8001`")
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        build(work, console.print)
        with Processes(work / "logs") as processes:
            api = _start(work, port, speed, processes, console)
            _follow(api, processes, console, speed, once=once)
    except _StopError:
        console.print("stopped; every process it started has ended")


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # once is enough; what runs is being stopped
    raise _StopError


def _start(work: Path, port: int, speed: float, processes: Processes, console: Console) -> FleetApi:
    """Start broker, cloud, and three vehicles of two processes each."""
    vehicles = work / "vehicles"
    for old in (vehicles, work / "lake"):
        shutil.rmtree(old, ignore_errors=True)
    (work / "fleet.db").unlink(missing_ok=True)
    for leftover in work.glob("fleet.db-*"):
        leftover.unlink()
    broker_port = free_port()
    broker = broker_command(work, broker_port)
    processes.start("broker", broker)
    processes.wait_for("the broker did not accept connections", lambda: answers(broker_port), START_WITHIN_S)
    console.print(
        f"broker: {Path(broker[0]).name if 'mosquitto' in broker[0] else 'embedded'} on 127.0.0.1:{broker_port}"
    )

    python = (sys.executable, "-m")
    processes.start(
        "cloud",
        (*python, "cloud", "serve", "--port", str(port), "--broker", f"127.0.0.1:{broker_port}",
         "--database", f"sqlite:///{work / 'fleet.db'}", "--lake", str(work / "lake"), "--bundle",
         str(work / "bundle")),
    )  # fmt: skip
    api = FleetApi(port)
    processes.wait_for("the cloud did not answer", api.is_up, START_WITHIN_S)
    processes.wait_for("the collector did not reach the broker", api.collects, START_WITHIN_S)
    console.print(
        f"fleet API: {api.address}  (pages: {api.address}/docs, {api.address}/alerts, {api.address}/vehicles)"
    )

    for number, name in enumerate(VEHICLES):
        folder = vehicles / name
        folder.mkdir(parents=True)
        tty = folder / "can"
        fault = ("--mode", "failure", "--fault", FAULT, "--fault-after", str(FAULT_AFTER_S)) if name == FAILING else (
            "--mode", "healthy")  # fmt: skip
        processes.start(
            f"{name}-simulator",
            (*python, "firmware_sim", "drive", "--vehicle", name, *fault, "--can", f"slcan-pty:{tty}",
             "--speed", str(speed), "--seed", str(number + 1)),
        )  # fmt: skip
        processes.wait_for(f"{name} did not open its CAN port", tty.exists, START_WITHIN_S)
        config = folder / "agent.toml"
        config.write_text(agent_config(name, folder, work / "bundle", broker_port))
        processes.start(f"{name}-agent", (*python, "edge_agent", "run", "--config", str(config), "--speed", str(speed)))
    console.print(
        f"{len(VEHICLES)} vehicles drive at {speed:g} times real time, each a simulator and an agent; "
        f"{FAILING}'s motor bearing begins to fail after {FAULT_AFTER_S} s. Logs: {processes.logs}"
    )
    return api


def broker_command(work: Path, port: int) -> tuple[str, ...]:
    """Mosquitto where it is on the PATH (Debian puts it into /usr/sbin), else the embedded broker."""
    mosquitto = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if mosquitto is None:
        return (sys.executable, "-m", "cloud", "broker", "--port", str(port))
    config = work / "mosquitto.conf"
    # as root it would become another user, and the kernel would forget to end it with the demo
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_queued_messages 0\n{user}"
    )
    return (mosquitto, "-c", str(config))


def agent_config(vehicle_id: str, folder: Path, bundle: Path, broker_port: int) -> str:
    """Return a vehicle's `agent.toml`."""
    return f"""vehicle_id = "{vehicle_id}"
make = "sim"
data_dir = "{folder / "data"}"
bundle = "{bundle}"
[source]
kind = "can"
interface = "slcan"
channel = "{folder / "can"}"
bitrate = 500000
dbc = "{ROOT / "firmware_sim" / "ev.dbc"}"
mapping = "{ROOT / "firmware_sim" / "ev_can.toml"}"
[mqtt]
host = "127.0.0.1"
port = {broker_port}
"""


def _follow(api: FleetApi, processes: Processes, console: Console, speed: float, *, once: bool) -> None:
    """Show the vehicles and every alert until Ctrl-C, or with `once` until one alert of a model went all the way."""
    shown: set[tuple[str, int]] = set()
    advised: set[str] = set()
    deadline = time.monotonic() + ALERT_WITHIN_S / speed + START_WITHIN_S
    next_plain = 0.0
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            processes.check()
            vehicles, alerts = api.vehicles(), api.alerts()
            if console.is_terminal:
                live.update(screen.lines(vehicles, list(VEHICLES)))
            elif time.monotonic() >= next_plain:
                next_plain = time.monotonic() + PLAIN_EVERY_S
                console.print(screen.lines(vehicles, list(VEHICLES)))
            for alert in reversed(alerts):
                if (alert["alert_id"], alert["transitions"]) not in shown:
                    shown.add((alert["alert_id"], alert["transitions"]))
                    console.print(screen.alert(alert, api.address))
                    if alert["state"] != "cleared" and alert["alert_id"] not in advised:
                        advised.add(alert["alert_id"])
                        console.print(screen.advice(api.advice(alert), api.address + advice_path(alert)))
            done = went_all_the_way(vehicles, alerts)
            if once and done:
                break
            if once and time.monotonic() > deadline:
                raise UnavailableError(_why_not(alerts, processes.logs))
            time.sleep(REFRESH_S)
    console.print(
        f"[bold green]done[/]: the alert of {done} was stored by the collector, acknowledged to the vehicle "
        f"and read back from {api.address}/alerts"
    )


def went_all_the_way(vehicles: list[dict[str, Any]], alerts: list[dict[str, Any]]) -> str | None:
    """Return the vehicle whose model alert is stored and acknowledged: its outbox has released it."""
    for alert in alerts:
        if alert["origin"] != "model" or alert["vehicle_id"] != FAILING:
            continue
        vehicle = next((v for v in vehicles if v["vehicle_id"] == alert["vehicle_id"]), None)
        if vehicle is None or vehicle["outbox"].get("alert", 1) > 0:
            continue
        if vehicle["counters"].get("outbox_released", 0) >= 1:
            return FAILING
    return None


def _why_not(alerts: list[dict[str, Any]], logs: Path) -> str:
    of_model = [a for a in alerts if a["origin"] == "model" and a["vehicle_id"] == FAILING]
    if of_model:
        return (
            f"{FAILING}'s alert is stored, but its vehicle did not hear of it in time; see {logs}/{FAILING}-agent.log"
        )
    others = ", ".join(sorted({f"{a['vehicle_id']} {a['failure_type']} ({a['origin']})" for a in alerts})) or "none"
    return (
        f"no alert of a model for {FAILING} within {ALERT_WITHIN_S:.0f} s of its driving (alerts there are: {others}); "
        f"see {logs}"
    )

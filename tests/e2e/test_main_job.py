"""The main job on real processes: simulator → CAN → agent → broker → cloud, one alert followed all the way."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from cloud.demo.command import FAILING, went_all_the_way
from cloud.demo.processes import Processes, free_port
from tests.conftest import ROOT
from tests.fleets import PYTHON, Fleet

pytestmark = pytest.mark.e2e


def test_a_fault_on_the_bus_becomes_an_alert_in_the_fleet_api(
    processes: Processes, tmp_path: Path, bundle: Path, broker_kind: str
) -> None:
    fleet = Fleet(processes, tmp_path, bundle, broker_kind)
    fleet.vehicle(FAILING, "--mode", "failure", "--fault", "motor_bearing_wear", "--fault-after", "60", "--seed", "1")
    fleet.vehicle("EV_002", "--mode", "healthy", "--seed", "2")
    processes.wait_for(
        "no alert went all the way", lambda: bool(went_all_the_way(fleet.api.vehicles(), fleet.api.alerts())), 90
    )
    alert = fleet.alert(FAILING)
    assert alert is not None
    assert alert["failure_type"] == "motor_bearing_wear"
    assert alert["severity"] in {"low", "medium", "high", "critical"}
    assert alert["model_release"] == json.loads((bundle / "manifest.json").read_text())["release"]
    assert alert["evidence"], "an alert says what was seen"
    assert alert["type_probability"] > 0.5
    assert fleet.alert("EV_002") is None, "the healthy vehicle beside it raises nothing"
    vehicles = {v["vehicle_id"]: v for v in fleet.api.vehicles()}
    assert vehicles.keys() == {FAILING, "EV_002"}
    assert vehicles["EV_002"]["scores"]["failure_probability"] < 0.5


def test_a_collector_that_was_away_still_gets_the_alert_once(
    processes: Processes, tmp_path: Path, bundle: Path
) -> None:
    fleet = Fleet(processes, tmp_path, bundle)
    cloud = processes.named("cloud")
    os.kill(cloud.pid, signal.SIGSTOP)  # the broker is there, the collector does not answer
    try:
        fleet.vehicle(
            FAILING, "--mode", "failure", "--fault", "motor_bearing_wear", "--fault-after", "1", "--seed", "3"
        )
        log = processes.logs / f"{FAILING}-agent.log"
        processes.wait_for("the agent raised nothing", lambda: "transition=raised" in log.read_text(), 90)
        time.sleep(1)
        assert "\nack " not in log.read_text()
    finally:
        os.kill(cloud.pid, signal.SIGCONT)
    processes.wait_for(
        "no alert after the collector came back",
        lambda: bool(went_all_the_way(fleet.api.vehicles(), fleet.api.alerts())), 60,
    )  # fmt: skip
    seen = [a for a in fleet.api.alerts() if a["origin"] == "model"]
    assert len({a["alert_id"] for a in seen}) == len(seen)


def replay(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYTHON, "edge_agent", "replay", *words], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(("name", "cells"), [("vehicle_a", 96), ("vehicle_b", 87)])
def test_a_real_vehicle_is_replayed_published_and_stored_once(
    processes: Processes, tmp_path: Path, bundle: Path, real_data: Path, name: str, cells: int
) -> None:
    fleet = Fleet(processes, tmp_path, bundle)
    summary = tmp_path / "summary.json"
    words = (
        str(real_data / f"{name}.parquet"), "--map", f"edge_agent/mappings/{name}.toml", "--bundle", str(bundle),
        "--alerts", str(tmp_path / "alerts.jsonl"), "--publish", "--broker", f"127.0.0.1:{fleet.broker_port}",
        "--json", str(summary),
    )  # fmt: skip
    first = replay(*words)
    assert first.returncode == 0, first.stderr
    told = json.loads(summary.read_text())
    assert told["windows_scored"] > 100
    assert told["cells"] == cells, "every cell voltage is used"
    vehicles = fleet.api.vehicles()
    assert [(v["source"], v["model"]["release"]) for v in vehicles] == [("replay", told["model_release"])]
    assert vehicles[0]["last_arrival"].startswith({"vehicle_a": "2021-05-06", "vehicle_b": "2019-05-12"}[name])
    before = fleet.get("/health")["store"]["newest_ingest_id"]
    alerts = [(a["alert_id"], a["transitions"]) for a in fleet.api.alerts()]
    lines = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert {a for a, _ in alerts} == {line["data"]["alert_id"] for line in lines}

    second = replay(*words)
    assert second.returncode == 0, second.stderr
    assert fleet.get("/health")["store"]["newest_ingest_id"] == before, "published twice, stored once"
    assert [(a["alert_id"], a["transitions"]) for a in fleet.api.alerts()] == alerts


def test_the_demo_ends_with_an_alert_and_leaves_no_process(workspace: Path) -> None:
    assert workspace.is_dir()
    command = [*PYTHON, "cloud", "demo", "--once", "--port", str(free_port()), "--work", str(workspace)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "acknowledged to the vehicle" in run.stdout
    left = subprocess.run(["pgrep", "-f", str(workspace / "vehicles")], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_ctrl_c_ends_the_demo_and_every_process_of_it(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.log"
    with out.open("wb") as log:
        demo = subprocess.Popen(
            [*PYTHON, "cloud", "demo", "--port", str(free_port()), "--work", str(workspace)],
            stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 90
    while "vehicles drive at" not in out.read_text():
        assert demo.poll() is None, out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.2)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(40) == 0, out.read_text()
    left = subprocess.run(["pgrep", "-f", str(workspace / "vehicles")], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert "Traceback" not in out.read_text()


def in_session(leader: int) -> str:
    """Return the processes of a session that are still there (zombies are not)."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,stat=,args=", "-s", str(leader)], capture_output=True, text=True, check=False
    )
    return "\n".join(line for line in listed.stdout.splitlines() if line.split()[1][0] != "Z")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_stop_while_preparing_leaves_no_worker(workspace: Path, tmp_path: Path, number: signal.Signals) -> None:
    prepare = subprocess.Popen(
        [*PYTHON, "cloud", "prepare", "--input", str(workspace / "synthetic_data"), "--output", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while in_session(prepare.pid).count("forkserver") < 3:  # the server and two workers
        assert prepare.poll() is None
        assert time.monotonic() < deadline, in_session(prepare.pid)
        time.sleep(0.1)
    time.sleep(1)  # they are at work
    os.killpg(prepare.pid, number) if number == signal.SIGINT else prepare.send_signal(number)
    prepare.wait(30)
    deadline = time.monotonic() + 10
    while in_session(prepare.pid):
        assert time.monotonic() < deadline, in_session(prepare.pid)
        time.sleep(0.1)


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path, bundle: Path) -> None:
    recording = tmp_path / "short.csv"
    rows = "".join(f"{1.7e9 + i},50\n" for i in range(400))
    recording.write_text("time,Vehicle.Speed\n" + rows)
    mapping = tmp_path / "m.toml"
    mapping.write_text('[source.time]\ncolumn = "time"\n[signals."Vehicle.Speed"]\ncolumn = "Vehicle.Speed"\n')
    words = " ".join([*PYTHON, "edge_agent", "replay", str(recording), "--map", str(mapping), "--bundle", str(bundle)])
    run = subprocess.run(
        ["bash", "-c", f"{words} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "Traceback" not in run.stderr
    assert run.returncode in {0, 141}


def test_a_port_in_use_is_one_clear_line(workspace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words in (("demo", "--port", str(port), "--work", str(workspace)), ("serve", "--port", str(port))):
            run = subprocess.run([*PYTHON, "cloud", *words], capture_output=True, text=True, check=False, timeout=60)
            assert run.returncode == 69, run.stderr
            assert f"port {port}" in run.stderr
            assert "Traceback" not in run.stderr

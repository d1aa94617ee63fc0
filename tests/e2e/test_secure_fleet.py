"""Provisioned by its commands, run by its commands: agent → Mosquitto → cloud, all over TLS, each as itself."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud.demo.fleet_api import FleetApi
from cloud.demo.processes import Processes
from tests.brokers import free_port, wait_for
from tests.conftest import ROOT
from tests.e2e.test_agent import SPEED, VEHICLE, AgentProcess, drive, small_bundle
from tests.identities import Identities, TlsBroker
from tests.vehicles import Ecu, SlcanPty, write_files

pytestmark = pytest.mark.e2e
PYTHON = (sys.executable, "-m")


class Known(Identities):
    """A folder that the commands made."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[SlcanPty]:
    running = SlcanPty(tmp_path / "tty")
    yield running
    running.close()


def provision(*words: str) -> str:
    told = subprocess.run(
        [*PYTHON, "cloud", "provision", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_an_alert_goes_from_the_bus_to_the_api_over_tls_and_a_revoked_vehicle_is_cut_off(
    processes: Processes, adapter: SlcanPty, tmp_path: Path
) -> None:
    folder, port, api_port = tmp_path / "identity", free_port(), free_port()
    said = provision("init", "--output", str(folder), "--broker-host", "localhost", "--broker-port", str(port))
    write_files(tmp_path)
    (tmp_path / "base.toml").write_text(
        f"""data_dir = "data"
schema = "small.json"
bundle = "{tmp_path / small_bundle(tmp_path)}"
[source]
mapping = "small.toml"
dbc = "small.dbc"
interface = "slcan"
channel = "{adapter.path}"
"""
    )
    base = ("--config", str(tmp_path / "base.toml"))
    said += provision("vehicle", VEHICLE, "--make", "small", *base, "--output", str(folder))
    vehicle = tmp_path / "on the vehicle"
    shutil.copytree(folder / "vehicle" / VEHICLE, vehicle)

    identities = Known(folder, port)
    broker = TlsBroker(identities)
    broker.start()
    agent = None
    try:
        serve = shlex.split(next(line for line in said.splitlines() if line.startswith("collector: fleet-cloud serve")))
        processes.start(
            "cloud",
            [*PYTHON, "cloud", *serve[2:], "--port", str(api_port), "--database", f"sqlite:///{tmp_path}/fleet.db",
             "--lake", str(tmp_path / "lake")],
        )  # fmt: skip
        api = FleetApi(api_port)
        processes.wait_for("no cloud", api.is_up, 30)
        processes.wait_for("no collector", api.collects, 30)

        agent, ecu = AgentProcess(tmp_path, vehicle / "agent.toml", "--speed", str(SPEED)), Ecu()
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=up"), what="start")
        drive(adapter, ecu, 150, voltage=900.0, temperature=20.0)
        wait_for(lambda: any(a["origin"] == "model" for a in api.alerts()), 30, what="an alert in the API")
        assert {a["vehicle_id"] for a in api.alerts()} == {VEHICLE}
        wait_for(lambda: agent.says("ack", "rows="), what="the collector's ack")

        provision("revoke", VEHICLE, "--reason", "stolen", "--output", str(folder))
        broker.stop()  # a restart ends open connections too
        broker.start()
        wait_for(lambda: agent.says("link", "state=down"), what="the agent says that it is cut off")
        wait_for(lambda: "certificate verify failed" in broker.log(), what="the broker refuses it")
        wait_for(api.collects, what="the collector is back")
        assert broker.log().count(f" as {VEHICLE} (") == 1, "it never connects again"

        provision("renew", VEHICLE, "--output", str(folder))
        shutil.copy(folder / "vehicle" / VEHICLE / "identity.pem", vehicle / "identity.pem")
        broker.reload()
        ups = agent.text().count("state=up")
        wait_for(lambda: agent.text().count("state=up") > ups, 40, what="the renewed identity connects, no restart")
    finally:
        if agent is not None:
            agent.end(signal.SIGTERM)
        broker.stop()

    output = said + agent.text() + broker.log()
    for log in (tmp_path / "logs").glob("*.log"):
        output += log.read_text(errors="replace")
    keys = identities.private_keys()
    assert len(keys) == 4
    shown = "".join(output.split())
    assert VEHICLE in shown
    assert not [key for key in keys if key.decode() in shown], "no key is in any log or output"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"VOLTWATCH_BROKER_CA": "gone.crt"}, "broker authority gone.crt: no such file"),
        ({"VOLTWATCH_BROKER_CERTIFICATE": "identity.pem"}, "a broker certificate or key without --broker-ca"),
        ({"VOLTWATCH_BROKER_CA": "ca.crt", "VOLTWATCH_BROKER_KEY": "identity.pem"}, "give both"),
    ],
)
def test_serve_says_in_one_line_which_file_of_tls_it_cannot_use(
    tmp_path: Path, change: dict[str, str], line: str
) -> None:
    identities = Identities(tmp_path / "identity")
    for name in ("ca.crt", "identity.pem"):
        shutil.copy(identities.collector() / name, tmp_path / name)
    told = subprocess.run(
        [*PYTHON, "cloud", "serve", "--port", str(free_port())], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=60, env={**os.environ, **change},
    )  # fmt: skip
    assert told.returncode == 78
    assert line in told.stderr
    assert told.stderr.count("\n") == 1

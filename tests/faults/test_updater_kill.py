"""The updater killed anywhere leaves a vehicle with a model: the deciding slot whole, the candidate whole or absent.

Short by default; VOLTWATCH_CAMPAIGN=1 runs every system call and 120 random moments (`make campaign`).
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.update import slots
from edge_agent.update.outcome import UpdateResult
from tests.releases import Publisher, Server, Vehicle, shop
from tests.vehicles import catalogue

LONG = os.environ.get("VOLTWATCH_CAMPAIGN") == "1"
CALLS = "openat,write,rename,fsync,mkdir,unlink,rmdir,unlinkat"
MOMENTS = 120 if LONG else 12
pytestmark = pytest.mark.slow


class Killed(Vehicle):
    """A vehicle whose updater is a process."""

    def __init__(self, folder: Path, publisher: Publisher, server: Server) -> None:
        super().__init__(folder, server.url, publisher.root)
        self.file = folder / "agent.toml"
        self.file.write_text(
            f'vehicle_id = "EV_7"\ndata_dir = "{folder / "data"}"\nschema = "small.json"\n[source]\nmapping = "m"\n'
            f'dbc = "d"\ninterface = "virtual"\nchannel = "c"\n[update]\nrepository = "{server.url}"\n'
            f'root = "{publisher.root}"\n'
        )

    def command(self, target: str, counter: int) -> list[str]:
        return [sys.executable, "-m", "edge_agent", "update", "--config", str(self.file), "--target", target,
                "--counter", str(counter)]  # fmt: skip

    def run(self, target: str, counter: int, *before: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([*before, *self.command(target, counter)], capture_output=True, check=False, timeout=120)

    def check(self) -> None:
        """What must hold whenever an agent looks."""
        known = self.known
        content = known.installed(known.active)
        assert content is not None
        assert load_bundle(self.model / known.active, catalogue()).sha256 == content.sha256
        candidate = known.installed(known.candidate)
        if candidate is not None:
            assert load_bundle(self.model / known.candidate, catalogue()).sha256 == candidate.sha256


@pytest.fixture
def vehicle(tmp_path: Path) -> Iterator[tuple[Killed, str]]:
    """A vehicle on which release 1 decides, and the name of release 2."""
    with shop(tmp_path, now_s=time.time()) as (publisher, server):
        publisher.publish()
        second = publisher.publish(release=2)
        made = Killed(tmp_path / "vehicle", publisher, server)
        made.wall_s = time.time()
        assert made.update("bundles/tiny-1-1.tar", 1).ending == "installed"
        made.confirm()
        shutil.copytree(made.model, tmp_path / "before")
        yield made, second.target


def again(vehicle: Killed, before: Path) -> None:
    shutil.rmtree(vehicle.model)
    shutil.copytree(before, vehicle.model)


def test_killed_at_random_moments_it_never_leaves_a_vehicle_without_a_model(
    vehicle: tuple[Killed, str], tmp_path: Path
) -> None:
    killed, target = vehicle
    began = time.monotonic()
    assert killed.run(target, 2).returncode == 0
    whole_s = time.monotonic() - began
    drawn = random.Random(11)
    outcomes = {"before": 0, "after": 0}
    for moment in range(MOMENTS):
        if moment % 3 == 0:
            again(killed, tmp_path / "before")  # else: on top of what the kill before it left
        process = subprocess.Popen(
            killed.command(target, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(drawn.uniform(0.0, whole_s))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.check()
        outcomes["after" if killed.known.phase == "staged" else "before"] += 1
    assert outcomes["before"] > 0
    assert killed.run(target, 2).returncode == 0
    killed.check()
    assert killed.known.candidate == "b"


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace on this machine")
def test_killed_at_a_system_call_it_never_leaves_a_vehicle_without_a_model(
    vehicle: tuple[Killed, str], tmp_path: Path
) -> None:
    """Only calls that touch the vehicle's folder are counted: an interpreter's own are some thousands."""
    killed, target = vehicle
    log = tmp_path / "trace"
    strace = ["strace", "-o", str(log), "-e", f"trace={CALLS}", "-P", str(killed.model)]
    names = ("staging", "staging/bundle", "b", "slots.json", "slots.json.new", "metadata", "floor.json.new")
    paths = [part for name in names for part in ("-P", str(killed.model / name))]
    assert killed.run(target, 2, *strace, *paths).returncode == 0
    calls = Counter(re.findall(r"^([a-z]+)\(", log.read_text(), re.MULTILINE))
    points = [(call, number + 1) for call, count in sorted(calls.items()) for number in range(count)]
    assert {"rename", "fsync", "openat"} <= set(calls)
    for call, number in points if LONG else points[:: max(1, len(points) // 10)]:
        again(killed, tmp_path / "before")
        inject = ["-e", f"inject={call}:signal=SIGKILL:when={number}"]
        run = killed.run(target, 2, *strace, *paths, *inject)
        assert run.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (call, number, run.stderr)
        killed.check()
        result = killed.run(target, 2)
        assert result.returncode == 0, result.stderr
        assert msgspec.json.decode(result.stdout, type=UpdateResult).ending in ("installed", "current")
        killed.check()
        assert killed.known.candidate == "b"


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace on this machine")
@pytest.mark.parametrize(("call", "error"), [("fsync", "EIO"), ("rename", "EIO"), ("write", "ENOSPC")])
def test_a_disk_that_refuses_is_said_and_the_old_release_stays(
    vehicle: tuple[Killed, str], tmp_path: Path, call: str, error: str
) -> None:
    killed, target = vehicle
    names = ("staging", "slots.json.new", "floor.json.new", "b")
    paths = [part for name in names for part in ("-P", str(killed.model / name))]
    inject = ["-e", f"inject={call}:error={error}:when=1+"]
    run = killed.run(
        target, 2, "strace", "-o", "/dev/null", "-e", f"trace={call}", "-P", str(killed.model), *paths, *inject
    )
    assert run.returncode == 75, (run.stdout, run.stderr)
    assert msgspec.json.decode(run.stdout, type=UpdateResult).reason == "disk"
    assert len(run.stderr.splitlines()) == 1
    killed.check()
    assert slots.read(killed.model).active == "a"
    assert killed.run(target, 2).returncode == 0


def test_a_torn_pointer_is_read_from_its_copy_and_the_next_update_works(vehicle: tuple[Killed, str]) -> None:
    killed, target = vehicle
    (killed.model / slots.POINTER).write_bytes(b"")
    killed.check()
    assert killed.run(target, 2).returncode == 0
    killed.check()

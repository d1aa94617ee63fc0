"""A disk without a free byte: alerts use the space held for them; counts and samples wait, and what is shed is said.

The disk is a real one: a small file system of the test's own, in a mount namespace that ends with it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE

# Fills the disk, says eight alerts, and counts and samples thirty times, and frees the space; prints what is held.
SCRIPT = """
import json, os, sys
from pathlib import Path
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.outcomes import AlertChange, Sampled
from tests.telemetry import CATALOGUE
from tests.unit.test_reporting import Vehicle, counts

disk = Path(sys.argv[1])
vehicle = Vehicle(disk / "outbox", load_bundle(Path(sys.argv[2]), CATALOGUE), reserve_bytes=256 * 2**10)

def say(number):
    change = AlertChange(700.0, 640.0, "charging_fault", "raised", "high", "model", key=f"/{number}")
    sample = Sampled(f"/{number}", 700.0, 60.0, 1.0, "driving", "alert", os.urandom(10_000))
    vehicle.reporter.store([sample, counts(number, 7), *([change] if number < 9 else [])], 0.0)

def show():
    print(json.dumps({"rows": vehicle.rows(), "counters": vehicle.reporter.counters, "outbox": vehicle.outbox.counters,
                      "problem": vehicle.reporter.problem}), flush=True)

say(0)
show()
with (disk / "ballast").open("wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(b"x" * 4096)
    except OSError:
        pass
for number in range(1, 31):
    say(number)
show()
(disk / "ballast").unlink()
vehicle.reporter.retry(0.0, now=True)
show()
"""


def on_a_small_disk(folder: Path, *command: str) -> list[str]:
    """Return a command that runs `command` where `folder` is a file system of 8 MB; skips where it may not."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=8m none '{folder}'"
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("no file system of its own may be mounted here")
        pytest.skip("no file system of its own may be mounted here")
    return [*inside, f'{mount} && exec "$@"', "sh", *command]


def test_on_a_full_disk_alerts_are_stored_while_counts_and_samples_wait_and_what_is_given_up_is_counted(
    tmp_path: Path,
) -> None:
    disk, bundle = tmp_path / "disk", build_bundle(tmp_path / "bundle", CATALOGUE)
    disk.mkdir()
    command = on_a_small_disk(disk, sys.executable, "-c", SCRIPT, str(disk), str(bundle))
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    before, full, after = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert before["rows"] == {"alert": 1, "drift": 1, "sample": 1}
    assert full["rows"] == {"alert": 9, "drift": 1, "sample": 1}, "counts and samples take none of the alerts' space"
    assert full["outbox"]["reserve_used"] == 1
    assert full["counters"].keys() == {"drift_not_stored", "sample_not_stored", "sample_given_up"}
    assert full["counters"]["sample_given_up"] == 10
    assert "what is left is for alerts" in full["problem"]
    assert after["rows"] == {"alert": 9, "drift": 31, "sample": 21}, "twenty samples were kept in memory"
    assert after["problem"] == ""

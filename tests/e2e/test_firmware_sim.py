"""`firmware-sim` as its users run it: real processes, signals, exit codes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import can
import pytest

pytestmark = pytest.mark.e2e
COMMAND = (sys.executable, "-m", "firmware_sim")


def drive(link: Path, *more: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        (*COMMAND, "drive", "--vehicle", "EV_001", "--can", f"slcan-pty:{link}", *more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not link.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_slow_drive_at_once_and_leaves_no_link(tmp_path: Path, how: signal.Signals) -> None:
    """At a twentieth of real time the next second is far away; nobody waits for it."""
    process = drive(tmp_path / "can", "--speed", "0.05")
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(how)
    _, errors = process.communicate(timeout=5)
    assert time.monotonic() - begun < 2
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not (tmp_path / "can").is_symlink()


def test_a_host_on_the_pty_gets_every_frame_of_an_accelerated_drive(tmp_path: Path) -> None:
    process = drive(tmp_path / "can", "--speed", "60", "--json")
    try:
        bus = can.Bus(interface="slcan", channel=str(tmp_path / "can"), bitrate=500_000, sleep_after_open=0)
        counters: dict[int, int] = {}
        seen, until = 0, time.monotonic() + 3
        while time.monotonic() < until:
            message = bus.recv(0.2)
            if message is None:
                continue
            counter = message.data[1] & 0xF
            if message.arbitration_id in counters:
                assert counter == (counters[message.arbitration_id] + 1) % 16, "no frame was lost"
            counters[message.arbitration_id] = counter
            seen += 1
        assert 1200 < seen < 2400  # some 600 a second
        assert len(counters) == 8
        bus.shutdown()
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=5)
    state = json.loads(output.splitlines()[-1])
    assert state["vehicle_id"] == "EV_001"
    assert state["simulated_s"] % 60 == 0
    assert state["can_sent"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("drive", "--vehicle", "EV_1", "--fault", "engine", "--can", "slcan-pty:x"), 78, "no such failure type"),
        (("drive", "--vehicle", "EV_1", "--severity", "dire", "--can", "slcan-pty:x"), 78, "one of low, medium"),
        (("drive", "--vehicle", "EV_1", "--variant", "ball", "--can", "slcan-pty:x"), 78, "solder, coolant_loss"),
        (("drive", "--vehicle", "EV/1", "--can", "slcan-pty:x"), 65, "vehicle id 'EV/1' is not allowed"),
        (("drive", "--vehicle", "EV_1"), 78, "exactly one output"),
        (("drive", "--vehicle", "EV_1", "--can", "nosuch:can0"), 78, "no such interface"),
        (("drive", "--vehicle", "EV_1", "--can", "slcan-pty:/does/not/exist/can"), 69, "cannot make the CAN port"),
        (("drive", "--vehicle", "EV_1", "--http", "http://127.0.0.1:9"), 69, "is the cloud running there"),
        (("generate", "--output", "/dev/null/x", "--vehicles", "1", "--days", "1"), 69, "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line_and_an_exit_code(arguments: tuple[str, ...], code: int, says: str) -> None:
    done = subprocess.run((*COMMAND, *arguments), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    line = [text for text in done.stderr.splitlines() if text.startswith("firmware-sim: error: ")]
    assert len(line) == 1
    assert says in line[0]
    assert "Traceback" not in done.stderr


def test_generate_says_what_it_wrote(tmp_path: Path) -> None:
    done = subprocess.run(
        (*COMMAND, "generate", "--output", str(tmp_path / "out"), "--vehicles", "2", "--days", "1", "--hours", "0.2"),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "2 vehicles" in done.stdout
    assert (tmp_path / "out" / "labels.parquet").is_file()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        (*COMMAND, "generate", "--output", str(tmp_path), "--vehicles", "60", "--days", "60", "--workers", "2"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("raw_frames/*/part-0.parquet"))) < 20:  # both workers are at work
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(timeout=10) != 0
    deadline = time.monotonic() + 10
    listing = ("ps", "-o", "args=", "-g", str(process.pid))
    while group := subprocess.run(listing, capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, group
        time.sleep(0.1)
    assert not (tmp_path / "generation.json").exists(), "an incomplete fleet is not marked as a whole one"

"""The outbox against SIGKILL at any instant, power loss, a failing fsync and a full disk."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edge_agent.delivery.outbox import DATABASE, Outbox

# Appends rows one by one; prints a number only after `append` returned it.
WRITER = """
import sys
from pathlib import Path
from edge_agent.delivery.outbox import Outbox, OutboxError
outbox = Outbox(Path(sys.argv[1]), notice_topic="n", build_loss=lambda l, i, s: b"loss", reserve_bytes=0)
print("open", flush=True)
for number in range(1, int(sys.argv[2]) + 1):
    try:
        seq = outbox.append("alert", f"key {number}", lambda i, s: f"{number}:{s}".encode() * 50, "t")
    except OutboxError as error:
        print("failed", number, error, flush=True)
        continue
    print("stored", number, seq, flush=True)
"""


def open_again(folder: Path) -> Outbox:
    return Outbox(folder, notice_topic="n", build_loss=lambda *_: b"loss", reserve_bytes=0)


def stored_numbers(folder: Path) -> dict[int, int]:
    """What the outbox holds: the writer's number by seq, every row whole."""
    outbox = open_again(folder)
    found = {}
    for seq in outbox.waiting()["alert"]:
        row = outbox.get("alert", seq)
        assert row is not None
        number = int(row.payload.split(b":")[0])
        assert row.payload == f"{number}:{seq}".encode() * 50
        found[seq] = number
    assert not outbox.losses_waiting
    outbox.close()
    return found


def said(output: str) -> dict[int, int]:
    """What the writer was told is stored: number by seq (a line that was cut is not counted)."""
    lines = output.split("\n")[:-1]
    words = [line.split() for line in lines if line.startswith("stored")]
    return {int(seq): int(number) for _, number, seq in words}


def strace(*arguments: str) -> list[str]:
    path = shutil.which("strace")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no strace on this machine")
        pytest.skip("no strace on this machine (apt-get install strace)")
    allowed = subprocess.run([path, "-e", "trace=none", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip("strace may not trace here")
    return [path, "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,fdatasync,fsync", *arguments]


def test_sigkill_at_any_instant_loses_no_row_that_append_returned_for(tmp_path: Path) -> None:
    pick = random.Random(7)
    total = 0
    for turn in range(25):
        folder = tmp_path / str(turn)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), "100000"], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            time.sleep(pick.uniform(0.001, 0.030))
            child.send_signal(signal.SIGKILL)
            told = said(child.stdout.read())
        stored = stored_numbers(folder)
        assert told.items() <= stored.items()
        assert len(stored) <= len(told) + 1  # at most the one whose append had not returned yet
        assert sorted(stored) == list(range(1, len(stored) + 1))
        total += len(told)
    assert total > 25


def test_sigkill_at_each_write_loses_nothing_and_a_repeated_append_stores_once(tmp_path: Path) -> None:
    rows, survived = 2, 0
    for when in range(1, 200):
        folder = tmp_path / str(when)
        inject = strace("-e", f"inject=pwrite64:signal=SIGKILL:when={when}")
        child = subprocess.run(
            [*inject, sys.executable, "-c", WRITER, str(folder), str(rows)], capture_output=True, text=True, check=False
        )
        told, stored = said(child.stdout), stored_numbers(folder)
        assert told.items() <= stored.items()
        again = subprocess.run(
            [sys.executable, "-c", WRITER, str(folder), str(rows)], capture_output=True, text=True, check=True
        )
        assert said(again.stdout) == stored_numbers(folder) == {n: n for n in range(1, rows + 1)}
        survived += child.returncode == 0
        if child.returncode == 0:  # no such write any more: the sweep is complete
            break
    assert survived == 1
    assert when > 10


def test_a_failing_fsync_is_an_error_of_append_and_never_a_success(tmp_path: Path) -> None:
    failures = 0
    for when in range(5, 13):  # the first few are of the file's making
        folder = tmp_path / str(when)
        inject = strace("-e", f"inject=fdatasync:error=EIO:when={when}")
        child = subprocess.run(
            [*inject, sys.executable, "-c", WRITER, str(folder), "5"], capture_output=True, text=True, check=False
        )
        failures += "failed" in child.stdout or child.returncode != 0
        assert said(child.stdout).items() <= stored_numbers(folder).items()
        assert "Traceback" not in child.stderr or "OutboxError" in child.stderr
    assert failures >= 5


def test_a_full_disk_is_an_error_of_append_and_what_was_stored_stays(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    inject = strace("-e", "inject=pwrite64:error=ENOSPC:when=45+")
    child = subprocess.run(
        [*inject, sys.executable, "-c", WRITER, str(folder), "20"], capture_output=True, text=True, check=False
    )
    assert "failed" in child.stdout
    assert "full" in child.stdout
    told, stored = said(child.stdout), stored_numbers(folder)
    assert told
    assert told.items() <= stored.items()
    again = subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), "20"], capture_output=True, text=True, check=True
    )
    assert sorted(said(again.stdout).values()) == list(range(1, 21))  # space returned: it goes on


def test_a_wal_cut_at_any_length_keeps_exactly_the_commits_before_the_cut(tmp_path: Path) -> None:
    live = tmp_path / "live"
    outbox = open_again(live)
    wal = live / (DATABASE + "-wal")
    ends = []
    for number in range(1, 9):
        outbox.append("alert", str(number), lambda _i, s: f"{s}:{s}".encode() * 50, "t")
        ends.append(wal.stat().st_size)
    image, log, streams = (live / DATABASE).read_bytes(), wal.read_bytes(), (live / "streams.json").read_bytes()
    outbox.close()
    first = next(i for i, end in enumerate(ends) if end > 0)
    cuts = sorted(
        {*range(0, len(log), 997), *(end + d for end in ends for d in (-1, 0, 1) if 0 <= end + d <= len(log))}
    )
    kept = []
    for cut in cuts:
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / DATABASE).write_bytes(image)
        (folder / "streams.json").write_bytes(streams)
        (folder / (DATABASE + "-wal")).write_bytes(log[:cut])
        torn = open_again(folder)
        seqs = torn.waiting()["alert"]
        if torn.stream_ids == open_ids(streams):
            assert seqs == list(range(1, sum(end <= cut for end in ends) + 1))
            kept.append(len(seqs))
        else:  # cut inside the file's creation: its streams are reported as gone
            assert torn.losses_waiting
            assert cut < ends[first]
        torn.close()
        shutil.rmtree(folder)
    assert max(kept) == 8
    assert len(set(kept)) >= 8


def open_ids(streams: bytes) -> dict[str, str]:
    return msgspec.json.decode(streams, type=dict[str, str])

"""Drift counts against SIGKILL: between what is said and what is saved, no window is counted twice, and what is lost
is bounded by a number that the agent states."""

import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from edge_agent.clock import from_iso
from edge_agent.contract import messages
from edge_agent.contract.bundle import WindowSpec
from edge_agent.delivery.outbox import Outbox
from tests.bundles import build_bundle
from tests.vehicles import catalogue, write_config

VEHICLE = "EV_7"
WALL_S = 1.8e9
STRIDE_S = 20.0
# A real agent without its threads: a row a second of a clock that is handed in, until it is killed or told to end.
# Prints the end of each scored window before anything is stored, and how many windows a restart says may be lost.
AGENT = """
import os, signal, sys
import numpy as np
from pathlib import Path
from edge_agent import health
from edge_agent.agent import Agent
from edge_agent.config import load_config
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.pipeline.outcomes import Scored

class Clock:
    boot_id, trusted_rate, now_s = "boot", True, float(sys.argv[2])
    def wall(self):
        return 1.8e9 + self.now_s
    def monotonic(self):
        return self.now_s

def counting(name, work):
    def wrapped(*arguments, **more):
        global left
        if kill == "before " + name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        result = work(*arguments, **more)
        if kill == "after " + name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

kill, left = sys.argv[4], int(sys.argv[5])
clock = Clock()
agent = Agent(load_config(Path(sys.argv[1])), clock)
print("lost", agent.counters["drift_windows_lost_at_most"], flush=True)
health.save_state = counting("save", health.save_state)
append = counting("append", agent.outbox.append)
agent.outbox.append = lambda stream, *a, **k: append(stream, *a, **k)
push = agent.pipeline.push
def heard(block):
    outcomes = push(block)
    for outcome in outcomes:
        if isinstance(outcome, Scored):
            print("scored", outcome.window.end_s, flush=True)
    return outcomes
agent.pipeline.push = heard
take = counting("window", agent.take)
nothing = np.empty((1, 0))
for second in range(int(sys.argv[2]), int(sys.argv[3])):
    clock.now_s = float(second)
    values = np.array([[400.0 + second % 7, 25.0]])
    block = ArrivalBlock(np.array([clock.now_s]), values, np.full((1, 2), 3.7), nothing)
    (take if second % 20 == 0 else agent.take)(block)
    if clock.now_s >= agent._snapshot_at_s:
        agent._save()
agent._shut_down()
print("ended", flush=True)
"""


@dataclass
class Life:
    """What an agent said over all its restarts."""

    config: Path
    at_s: int = 0
    scored: list[float] = field(default_factory=list)
    lost_at_most: int = 0

    def run(self, until_s: int, kill: str = "never", times: int = 0) -> bool:
        """Let it live until a kill or `until_s`; True where it ended in order."""
        arguments = [str(self.config), str(self.at_s), str(until_s), kill, str(times)]
        done = subprocess.run([sys.executable, "-c", AGENT, *arguments], capture_output=True, text=True, check=False,
                              timeout=120)  # fmt: skip
        words = [line.split() for line in done.stdout.splitlines()]
        ended = ["ended"] in words
        assert ended or done.returncode == -9, done.stderr
        self.scored += [float(w[1]) for w in words if w[0] == "scored"]
        self.lost_at_most += sum(int(w[1]) for w in words if w[0] == "lost")
        self.at_s = until_s if ended else int(max([*self.scored, self.at_s])) + 30  # half a minute until it is back
        return ended


def counts_in(folder: Path) -> list[messages.DriftCounts]:
    outbox = Outbox(folder, notice_topic="n", build_loss=lambda *_: b"loss")
    found = []
    for seq in outbox.waiting()["drift"]:
        row = outbox.get("drift", seq)
        assert row is not None
        _, data = messages.decode_event(row.payload, VEHICLE)
        assert isinstance(data, messages.DriftCounts)
        found.append(data)
    outbox.close()
    return found


@pytest.fixture
def life(tmp_path: Path) -> Life:
    build_bundle(
        tmp_path / "bundle", catalogue(), spec=WindowSpec(frames=60, stride_s=STRIDE_S, vector_period_s=10),
        failure_types=("battery_degradation", "motor_bearing_wear"),
    )  # fmt: skip
    config = write_config(tmp_path, port=1, channel="none", bundle="bundle")
    config.write_text(config.read_text() + "[drift]\npublish_s = 300\n")
    return Life(config)


def check(life: Life, folder: Path) -> tuple[int, int]:
    """Hold the counts against the windows; returns (windows counted, windows scored)."""
    found = counts_in(folder)
    spans = sorted((from_iso(c.first_time) - WALL_S, from_iso(c.last_time) - WALL_S, c.windows) for c in found)
    assert all(last < first for (_, last, _), (first, _, _) in pairwise(spans)), spans
    for first_s, last_s, windows in spans:
        assert windows <= sum(first_s - 0.01 <= end_s <= last_s + 0.01 for end_s in life.scored)
    return sum(c.windows for c in found), len(life.scored)


def test_without_a_kill_every_window_is_counted_once_also_over_a_restart(life: Life, tmp_path: Path) -> None:
    assert life.run(700)
    assert life.run(1500)
    counted, scored = check(life, tmp_path / "data")
    assert counted == scored > 60
    assert life.lost_at_most == 0
    assert len(counts_in(tmp_path / "data")) >= 5


@pytest.mark.parametrize(
    ("kill", "times"),
    [("after append", 1), ("after append", 2), ("before append", 1), ("before save", 1), ("before save", 2),
     ("after save", 2), ("after window", 21), ("after window", 29)],
)  # fmt: skip
def test_a_kill_between_what_is_said_and_what_is_saved_counts_no_window_twice(
    life: Life, tmp_path: Path, kill: str, times: int
) -> None:
    assert not life.run(2000, kill, times)
    killed_s = life.at_s
    assert life.run(killed_s + 700)
    counted, scored = check(life, tmp_path / "data")
    assert scored - life.lost_at_most <= counted <= scored
    assert life.lost_at_most <= 600 / STRIDE_S, "what a state is saved for: ten minutes of the source's time"


def test_killed_again_and_again_it_counts_no_window_twice(life: Life, tmp_path: Path) -> None:
    for kill, times in (("after append", 1), ("before save", 1), ("after window", 7), ("after append", 1)):
        assert not life.run(life.at_s + 3000, kill, times)
    assert life.run(life.at_s + 400)
    counted, scored = check(life, tmp_path / "data")
    assert scored - life.lost_at_most <= counted <= scored

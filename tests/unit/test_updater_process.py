"""When the updater is started again: at once for another release, with growing pauses after a failure."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract.messages import Desired
from edge_agent.update.outcome import UpdateResult
from edge_agent.update.process import RETRY_S, UpdaterProcess
from tests.brokers import wait_for


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def updater(now: Now, tmp_path: Path) -> Iterator[UpdaterProcess]:
    """A real process each time; its configuration is missing, so that it ends soon and without an answer."""
    made = UpdaterProcess(tmp_path / "absent.toml", poll_s=3600.0, timeout_s=60.0, now=now, jitter=lambda: 0.5)
    yield made
    made.stop()


def desired(counter: int) -> Desired:
    return Desired(target=f"bundles/x-{counter}.tar", counter=counter, time="2026-11-24T00:00:00.000Z")


def ended(updater: UpdaterProcess) -> UpdateResult:
    results: list[UpdateResult] = []

    def look() -> bool:
        result = updater.step()
        if result is not None:
            results.append(result)
        return bool(results)

    wait_for(look)
    return results[0]


def test_nothing_is_started_before_the_first_poll_and_then_the_cloud_is_asked(
    updater: UpdaterProcess, now: Now
) -> None:
    updater.step()
    assert not updater.running
    now.s = 3600.0
    updater.step()
    assert updater.running
    result = ended(updater)
    assert (result.ending, result.reason) == ("failed", "no_trial")
    assert "78" in result.detail


def test_a_desired_release_is_tried_at_once_and_the_same_again_is_not_news(updater: UpdaterProcess, now: Now) -> None:
    updater.want(desired(2))
    updater.step()
    assert updater.running
    ended(updater)
    updater.want(desired(2))  # retained: it comes again with every connection
    updater.step()
    assert not updater.running
    updater.want(desired(3))
    updater.step()
    assert updater.running


def test_failures_are_tried_again_with_growing_pauses(updater: UpdaterProcess, now: Now) -> None:
    updater.want(desired(2))
    pauses = []
    for _ in range(3):
        updater.step()
        assert updater.running
        ended(updater)
        began = now.s
        while not updater.running:
            now.s += 1.0
            updater.step()
        pauses.append(now.s - began)
        ended(updater)
        now.s += 3600.0
    assert pauses[0] == pytest.approx(RETRY_S, abs=2)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 3 * pauses[0]


def test_an_updater_that_hangs_is_ended(now: Now, tmp_path: Path) -> None:
    """Its own alarm comes first; this is for a process that does not even hear it."""
    updater = UpdaterProcess(tmp_path / "absent.toml", poll_s=1.0, timeout_s=1.0, now=now, jitter=lambda: 0.0)
    now.s = 10.0
    updater.step()
    now.s = 1000.0
    began = time.monotonic()
    assert ended(updater).ending == "failed"
    assert time.monotonic() - began < 10

"""A link that breaks anywhere in a release: the next piece goes on where it broke, and only the whole one counts."""

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import UpdateConfig
from edge_agent.update import download
from edge_agent.update.download import Fetcher, fetch_target
from edge_agent.update.outcome import UpdateError
from tests.releases import Server, Vehicle, refusal, shop

BODY = random.Random(1).randbytes(700)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    (folder / "targets").mkdir(parents=True)
    (folder / "targets" / "x").write_bytes(BODY)
    running = Server(folder)
    yield running
    running.close()


def fetch(server: Server, partial: Path, *, length: int = len(BODY), sha256: str = SHA256) -> list[float]:
    pauses: list[float] = []
    fetcher = Fetcher(UpdateConfig(repository=server.url, root="r"))
    fetch_target(fetcher, f"{server.url}targets/x", partial, length=length, sha256=sha256, sleep=pauses.append)
    return pauses


def test_cut_at_every_byte_the_download_goes_on_and_is_whole(server: Server, tmp_path: Path) -> None:
    for at in range(1, len(BODY)):
        partial = tmp_path / f"{at}.part"
        server.faults.cut_after, server.faults.cuts_left = at, 1
        server.faults.asked.clear()
        fetch(server, partial)
        assert partial.read_bytes() == BODY
        assert [wanted for _, wanted in server.faults.asked] == ["", f"bytes={at}-"]


def test_a_link_that_breaks_again_and_again_still_ends(server: Server, tmp_path: Path) -> None:
    server.faults.cut_after = 100
    pauses = fetch(server, tmp_path / "x.part")
    assert (tmp_path / "x.part").read_bytes() == BODY
    assert pauses == sorted(pauses)  # it grows more patient


def test_a_link_that_brings_nothing_is_given_up_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    partial = tmp_path / "x.part"
    partial.write_bytes(BODY[:300])
    server.faults.cut_after = 0
    with pytest.raises(UpdateError) as caught:
        fetch(server, partial)
    assert caught.value.reason == "network"
    assert partial.read_bytes() == BODY[:300]
    server.faults.cut_after = None
    server.faults.asked.clear()
    fetch(server, partial)
    assert partial.read_bytes() == BODY
    assert server.faults.asked == [("targets/x", "bytes=300-")]


def test_a_server_without_ranges_is_read_from_the_beginning(server: Server, tmp_path: Path) -> None:
    partial = tmp_path / "x.part"
    partial.write_bytes(BODY[:300])
    server.faults.no_ranges = True
    fetch(server, partial)
    assert partial.read_bytes() == BODY


@pytest.mark.parametrize("left", [b"other bytes", BODY[:200] + b"!" + BODY[201:400], BODY + b"more"])
def test_what_an_earlier_run_left_is_not_believed(server: Server, tmp_path: Path, left: bytes) -> None:
    partial = tmp_path / "x.part"
    partial.write_bytes(left)
    try:
        fetch(server, partial)
    except UpdateError as error:
        assert error.reason == "tampered"  # noqa: PT017 - a false beginning is found by the hash of the whole
        assert not partial.exists()
        fetch(server, partial)
    assert partial.read_bytes() == BODY


def test_headers_that_never_end_are_ended_by_the_clock(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps every socket's timeout quiet: a process of its own has an alarm."""
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    from tests.vehicles import write_config  # noqa: PLC0415

    with shop(tmp_path / "shop", now_s=time.time()) as (publisher, served):
        release = publisher.publish()
        served.faults.header_drip_s = 0.2
        extra = ""
        config = write_config(tmp_path, port=1, channel="x", extra=extra)
        config.write_text(config.read_text() + f'[update]\nrepository = "{served.url}"\n'
                          f'root = "{publisher.root}"\ntimeout_s = 3\n')  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-m", "edge_agent", "update", "--config", str(config), "--target", release.target,
             "--counter", "1"], capture_output=True, text=True, timeout=40, check=False,
        )  # fmt: skip
        assert run.returncode == 75, run.stderr
        assert '"reason":"slow"' in run.stdout


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_agent.update import installation  # noqa: PLC0415

    with shop(tmp_path) as (publisher, served):
        vehicle = Vehicle(tmp_path / "vehicle", served.url, publisher.root)
        release = publisher.publish()
        monkeypatch.setattr(installation, "SPARE_BYTES", 2**60)
        assert "are needed" in refusal(vehicle.update(release), "disk")
        assert not any(path.startswith("targets/") for path, _ in served.faults.asked)


def test_the_rate_is_judged_over_a_span_and_a_pause_is_no_attack() -> None:
    now = [0.0]
    guard = download.RateGuard(100, now=lambda: now[0])
    guard.took(1)
    now[0] = download.RATE_SPAN_S - 0.1
    guard.took(2000)
    now[0] = 2 * download.RATE_SPAN_S
    guard.took(10)
    now[0] = 3 * download.RATE_SPAN_S + 1
    with pytest.raises(Exception, match="bytes a second"):
        guard.took(10)

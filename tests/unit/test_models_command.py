"""`fleet-cloud models`: a repository made, published into and renewed; what is wrong is one line, and costs nothing."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from cloud.rollouts import keys
from cloud.rollouts.archive import pack
from cloud.rollouts.renewal import Renewal
from cloud.rollouts.repository import ModelRepository
from edge_agent.contract.errors import ConfigError
from tests.bundles import build_bundle
from tests.conftest import ROOT
from tests.releases import DAY_S, NOW_S, Publisher, Vehicle, shop
from tests.telemetry import CATALOGUE


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cloud", "models", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def good(folder: Path, *arguments: str) -> str:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(folder: Path, *arguments: str) -> str:
    """The one line, whatever was wrong."""
    done = run(folder, *arguments)
    assert done.returncode not in (0, 1), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fleet-cloud: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `init` was run, with a bundle to publish."""
    folder = tmp_path_factory.mktemp("workshop")
    build_bundle(folder / "bundle", CATALOGUE, golden=True)
    good(folder, "init")
    return folder


@pytest.fixture
def place(workshop: Path, tmp_path: Path) -> Path:
    shutil.copytree(workshop, tmp_path / "here")
    return tmp_path / "here"


def test_a_repository_is_made_and_keys_are_for_their_owner_alone(place: Path) -> None:
    made = {path.name for path in (place / "var/keys/offline").iterdir()}
    assert made == {"root-1.pem", "root-2.pem", "targets-1.pem"}
    assert {path.name for path in (place / "var/keys/online").iterdir()} == {"snapshot-1.pem", "timestamp-1.pem"}
    for key in (place / "var/keys").rglob("*.pem"):
        assert key.stat().st_mode & 0o777 == 0o600
    root = Metadata.from_file(str(place / "var/models/metadata/1.root.json")).signed
    assert root.consistent_snapshot
    assert "exists already" in refused(place, "init")


def test_a_bundle_is_published_listed_and_the_same_bytes_again_under_a_higher_counter(place: Path) -> None:
    assert "counter 1" in good(place, "publish", "bundle")
    assert "counter 2" in good(place, "publish", "bundle")
    listed = json.loads(good(place, "list", "--json"))
    assert [r["counter"] for r in listed["releases"]] == [2, 1]
    assert len({r["sha256"] for r in listed["releases"]}) == 1
    assert "timestamp: version 3" in good(place, "list")


@pytest.mark.parametrize("counter", ["1", "2"])
def test_a_counter_that_is_not_above_all_is_refused(place: Path, counter: str) -> None:
    good(place, "publish", "bundle", "--counter", "2")
    before = sorted(p.name for p in (place / "var/models").rglob("*"))
    assert "the next is 3" in refused(place, "publish", "bundle", "--counter", counter)
    assert sorted(p.name for p in (place / "var/models").rglob("*")) == before


def test_an_unfit_bundle_is_refused(place: Path) -> None:
    model = place / "bundle" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    assert "model.onnx" in refused(place, "publish", "bundle")
    assert "nothing is published" in good(place, "list")


def test_missing_wrong_and_readable_keys_are_one_line_each(place: Path) -> None:
    assert "no such folder" in refused(place, "publish", "bundle", "--offline-keys", "nowhere")
    (place / "empty").mkdir()
    assert "holds no key" in refused(place, "publish", "bundle", "--offline-keys", "empty")
    keys.create(place / "foreign", "targets", 1)
    assert "needed for targets" in refused(place, "publish", "bundle", "--offline-keys", "foreign")
    (place / "broken").mkdir()
    (place / "broken" / "targets-1.pem").write_text("no key")
    (place / "broken" / "targets-1.pem").chmod(0o600)
    assert "cannot be used" in refused(place, "publish", "bundle", "--offline-keys", "broken")
    (place / "var/keys/offline/targets-1.pem").chmod(0o644)
    assert "others may read it" in refused(place, "publish", "bundle")
    assert "there is none" in refused(place, "list", "--repository", "nowhere")
    assert "there is none" in refused(place, "renew", "--repository", "nowhere")
    assert not (place / "nowhere").exists()


def test_no_key_is_ever_shown_or_published(place: Path) -> None:
    shown = good(place, "publish", "bundle") + good(place, "list") + good(place, "renew", "--force")
    served = b"".join(path.read_bytes() for path in (place / "var/models").rglob("*") if path.is_file())
    for key in (place / "var/keys").rglob("*.pem"):
        body = key.read_text().splitlines()[1]
        assert body not in shown
        assert body.encode() not in served


def test_the_same_bundle_is_always_the_same_bytes(workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "bundle", tmp_path / "copy", copy_function=shutil.copyfile)
    assert pack(workshop / "bundle") == pack(tmp_path / "copy")


def test_a_publication_killed_anywhere_leaves_a_repository_that_vehicles_believe(tmp_path: Path) -> None:
    """By the files written: the first n of them are there, the rest are not, and something unfinished lies about."""
    with shop(tmp_path) as (publisher, server):
        first = publisher.publish()
        folder = publisher.folder / "repo"
        shutil.copytree(folder, tmp_path / "before")
        publisher.publish(release=2)
        shutil.copytree(folder, tmp_path / "after")
        targets = [p for p in (tmp_path / "after/targets/bundles").iterdir()
                   if not (tmp_path / "before/targets/bundles" / p.name).exists()]  # fmt: skip
        written = [
            *targets,
            *(tmp_path / "after/metadata" / n for n in ("3.targets.json", "3.snapshot.json", "timestamp.json")),
        ]
        for done in range(len(written)):
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "before", folder)
            for file in written[:done]:
                shutil.copy(file, folder / file.relative_to(tmp_path / "after"))
            (folder / "metadata" / ".unfinished-1").write_bytes(b"half")
            assert [r.counter for r in publisher.repository.releases()] == [1]
            vehicle = Vehicle(tmp_path / f"vehicle-{done}", server.url, publisher.root)
            assert vehicle.update(first).ending == "installed"
            second = publisher.publish(release=2)  # and the next try works
            vehicle.confirm()
            assert vehicle.update(second).ending == "installed"
            assert not list(folder.rglob(".unfinished-*"))


def test_a_publisher_killed_at_random_leaves_a_repository_that_can_be_published_into(place: Path) -> None:
    for delay_s in (0.2, 0.35, 0.5, 0.65):
        command = [sys.executable, "-m", "cloud", "models", "publish", "bundle"]
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        good(place, "list")
    assert "published" in good(place, "publish", "bundle")


def test_the_online_keys_renew_what_is_half_over_and_nothing_else(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    online = keys.read_all(publisher.online, "online")
    assert publisher.repository.renew(online) == ()
    publisher.now_s = NOW_S + 0.6 * DAY_S
    assert publisher.repository.renew(online) == ("timestamp",)
    publisher.now_s = NOW_S + 4 * DAY_S
    assert publisher.repository.renew(online) == ("snapshot", "timestamp")
    offline = keys.read_all(publisher.offline, "offline")
    publisher.now_s = NOW_S + 5 * DAY_S
    with pytest.raises(ConfigError, match="needed for timestamp"):
        publisher.repository.renew(offline)


def test_the_servers_renewal_keeps_vehicles_believing_and_says_what_it_cannot(tmp_path: Path) -> None:
    with shop(tmp_path) as (publisher, server):
        release = publisher.publish()
        renewal = Renewal(publisher.repository, publisher.online)
        vehicle = Vehicle(tmp_path / "vehicle", server.url, publisher.root)
        for day in range(1, 40):
            publisher.now_s = NOW_S + day * 0.5 * DAY_S
            asyncio.run(renewal.step())
            assert renewal.detail == ""
        vehicle.wall_s = publisher.now_s
        assert vehicle.update(release).ending == "installed"
        publisher.now_s = NOW_S + 340 * DAY_S
        asyncio.run(renewal.step())
        assert "root ends in 25 days" in renewal.detail
        without = Renewal(publisher.repository, None)
        publisher.now_s += 0.9 * DAY_S
        asyncio.run(without.step())
        assert "ends in" in without.detail
        broken = Renewal(publisher.repository, tmp_path / "nowhere")
        asyncio.run(broken.step())
        assert "no such folder" in broken.detail


def test_renewal_and_publication_take_turns(tmp_path: Path) -> None:
    """Both write snapshot and timestamp: neither may overwrite the other's."""
    publisher = Publisher(tmp_path)
    bundle = publisher.bundle(1)
    code = (
        "import sys; from pathlib import Path; from cloud.rollouts import keys;"
        "from cloud.rollouts.repository import ModelRepository;"
        "repository = ModelRepository(Path(sys.argv[1]) / 'repo', wall=lambda: 1.8e9);"
        "online = keys.read_all(Path(sys.argv[1]) / 'online', 'online');"
        "[repository.renew(online, force=True) for _ in range(40)]"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    for _ in range(8):
        publisher.publish(bundle)
    assert process.wait(60) == 0
    roles = {role.role: role.version for role in ModelRepository(tmp_path / "repo").roles()}
    assert roles == {"root": 1, "targets": 9, "snapshot": 49, "timestamp": 49}
    assert len(publisher.repository.releases()) == 8

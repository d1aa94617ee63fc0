"""A trained bundle, made once by the same commands the demo uses, and real processes around it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud.demo.build import build
from cloud.demo.processes import Processes
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def workspace() -> Path:
    """Fleet, dataset, models and bundle; reused by the next run where nothing it depends on has changed."""
    work = ROOT / "var" / "tests"
    work.mkdir(parents=True, exist_ok=True)
    build(work, print)
    return work


@pytest.fixture(scope="session")
def bundle(workspace: Path) -> Path:
    """The exported bundle."""
    return workspace / "bundle"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Real child processes, all gone at the end of the test; their logs are shown where it fails."""
    with Processes(tmp_path / "logs") as running:
        yield running
    for log in sorted((tmp_path / "logs").glob("*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(params=["mosquitto", "embedded"])
def broker_kind(request: pytest.FixtureRequest) -> str:
    """Both brokers that a run may have."""
    kind: str = request.param
    if kind == "mosquitto" and not (shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")):
        pytest.skip("mosquitto is not installed")
    return kind

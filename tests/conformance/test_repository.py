"""What holds for the repository as a whole: what the base installs, what files may say, which tests may be skipped."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", r, maxsplit=1)[0].lower() for r in requirements}


def test_the_base_install_is_light() -> None:
    base = names(PROJECT["dependencies"])
    assert base == {"numpy", "onnxruntime", "msgspec", "paho-mqtt", "tuf", "securesystemslib"}


def test_what_must_agree_is_pinned() -> None:
    pinned = [r for extra in PROJECT["optional-dependencies"].values() for r in extra] + PROJECT["dependencies"]
    for name in ("onnx", "onnxruntime", "lightgbm", "onnxmltools", "skl2onnx"):
        assert any(re.match(rf"{name}==", r) for r in pinned), f"{name} is not pinned"
    assert "torch==2.13.0" in pinned


@pytest.mark.parametrize("module", ["edge_agent.agent", "edge_agent.__main__", "cloud.api", "cloud.collector.mqtt"])
def test_importing_a_service_pulls_in_no_training_library(module: str) -> None:
    heavy = {"torch", "lightgbm", "onnx", "sklearn", "pandas", "matplotlib"}
    heavy |= {"fastapi", "sqlalchemy", "typer", "pyarrow"} if module.startswith("edge_agent") else set()
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "extra"), [("cloud", "cloud"), ("export", "training"), ("firmware_sim", "sim")])
def test_a_command_whose_extra_is_absent_says_which_one_it_needs(module: str, extra: str) -> None:
    code = f"import sys; sys.modules['typer'] = None; from {module}.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 1
    assert f"needs typer: install voltwatch[{extra}]" in run.stderr
    assert "Traceback" not in run.stderr


def tracked() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_no_tracked_file_is_large() -> None:
    large = {name: size for name in tracked() if (size := (ROOT / name).stat().st_size) > 2**20}
    assert not large


def test_no_file_names_a_path_of_one_machine() -> None:
    home = re.compile(rb"(?<![\w.])/(?:home|root|Users)/\w+/")
    found = [name for name in tracked() if home.search((ROOT / name).read_bytes())]
    assert not found


def test_in_ci_every_system_package_the_tests_need_is_there() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("only CI must have them all")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    assert [name for name in ("mosquitto", "strace", "ps") if shutil.which(name, path=path) is None] == []


def test_the_agent_never_imports_the_updaters_libraries() -> None:
    """TUF and its keys cost 25 MB: they are of the updater's own short-lived process, and the agent runs for years."""
    code = (
        "import sys, edge_agent.__main__, edge_agent.models, edge_agent.update.slots, edge_agent.update.process;"
        "print(sorted({'tuf', 'securesystemslib', 'cryptography', 'urllib3'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"

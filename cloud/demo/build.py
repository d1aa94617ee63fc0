"""What the demo prepares before it runs: fleet, dataset, models, bundle. A step that is still valid is not run again.

A step's fingerprint covers its command, the code it runs, the versions of the libraries that compute, and the
fingerprint of the step before. It is written after the step has succeeded, so a step that was cut off runs again.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from edge_agent.contract.errors import UnavailableError

ROOT = Path(__file__).resolve().parents[2]
COMPUTES_WITH = ("numpy", "onnx", "onnxruntime", "lightgbm", "torch")

# Small enough for a first alert within minutes, large enough that every failure type is in each split.
FLEET_VEHICLES = 60
FLEET_DAYS = 5
FLEET_HOURS_A_DAY = 1.5
FLEET_SEED = 7
_OWN_END_S = 3.0


@dataclass(frozen=True, slots=True)
class Step:
    """One command, what it makes, and the code that decides the result."""

    name: str
    says: str
    command: tuple[str, ...]
    makes: Path
    code: tuple[str, ...]


def steps(work: Path) -> list[Step]:
    """Return the steps in order; each reads what the one before made."""
    fleet, datasets, models, bundle = (work / n for n in ("synthetic_data", "datasets", "models", "bundle"))
    python = (sys.executable, "-m")
    return [
        Step(
            "simulate", f"simulating {FLEET_VEHICLES} vehicles over {FLEET_DAYS} days",
            (*python, "firmware_sim", "generate", "--output", str(fleet), "--vehicles", str(FLEET_VEHICLES),
             "--days", str(FLEET_DAYS), "--hours", str(FLEET_HOURS_A_DAY), "--seed", str(FLEET_SEED), "--workers", "2"),
            fleet, ("firmware_sim", "edge_agent/contract"),
        ),
        Step(
            "prepare", "windows and features, by the feature graph that will run in the vehicle",
            (*python, "cloud", "prepare", "--input", str(fleet), "--output", str(datasets)),
            datasets, ("edge_agent/pipeline", "edge_agent/mappings", "export", "cloud/training", "cloud/config.json"),
        ),
        Step(
            "train", "training failure predictor, failure types, severity and autoencoder",
            (*python, "cloud", "train", "--data", str(datasets), "--output", str(models)),
            models, (),
        ),
        Step(
            "evaluate", "evaluating on vehicles that no model has seen",
            (*python, "cloud", "evaluate", "--data", str(datasets), "--models", str(models)),
            models / "evaluation_report.json", (),
        ),
        Step(
            "export", "exporting one quantized ONNX bundle",
            (*python, "export", "build", "--models", str(models), "--datasets", str(datasets), "--output", str(bundle)),
            bundle, (),
        ),
    ]  # fmt: skip


def build(work: Path, say: Callable[[str], None]) -> None:
    """Bring every step up to date. Raises `UnavailableError` naming the step that failed."""
    fingerprint = ""
    for step in steps(work):
        fingerprint = _fingerprint(step, fingerprint)
        stamp = work / f".{step.name}"
        if step.makes.exists() and stamp.is_file() and stamp.read_text() == fingerprint:
            say(f"[dim]{step.says}: still valid, reused[/]")
            continue
        say(f"[bold]{step.says}[/]")
        stamp.unlink(missing_ok=True)
        if step.makes.is_dir():
            shutil.rmtree(step.makes)
        began = time.monotonic()
        if _run(step.command) != 0:
            raise UnavailableError(
                f"the step {step.name!r} failed (its own message stands above): {_typed(step.command)}"
            )
        stamp.write_text(fingerprint)
        say(f"  done in {time.monotonic() - began:.0f} s")


def _run(command: Sequence[str]) -> int:
    """Run to the end; when this process is told to stop, so is the command, and nothing of it stays."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    except BaseException:
        try:
            process.wait(_OWN_END_S)  # Ctrl-C in a terminal has reached it too
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise


def _fingerprint(step: Step, before: str) -> str:
    digest = hashlib.sha256(before.encode())
    for word in (*step.command, *(f"{name}=={version(name)}" for name in COMPUTES_WITH)):
        digest.update(word.encode() + b"\0")
    for path in _files(step.code):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _files(code: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for name in code:
        path = ROOT / name
        found.extend([path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()))
    return sorted(p for p in found if p.suffix not in {".pyc", ".so"})


def _typed(command: Sequence[str]) -> str:
    return " ".join(("python", *command[1:]))

"""The first load of a release, in a process that may die of it: memory and time are limited, golden vectors replayed.

`try_load` starts that process and says what became of it; run as a module, this file is the process. It reports by one
JSON line; whatever kills it is the release's fault, and costs the vehicle nothing. Limits are set when the libraries
are loaded and count from there: they are of the model alone.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.contract import bundle as contract
from edge_agent.contract import signals
from edge_agent.contract.errors import BundleError
from edge_agent.update.outcome import Reason, UpdateError

MAX_ANSWER_BYTES = 65_536
START_S = 30.0  # for the interpreter and its libraries, on a slow card
READY = b"ready\n"
SPARE_BYTES = 64 * 2**20  # address space that mappings of files take beside the data
WIDTHS = ((1, 1), (96, 8))  # cells and probes: the least, and a usual pack


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the process says. `slowest_s` is the longest that one golden window took."""

    reason: Reason = ""
    detail: str = ""
    cases: int = 0
    slowest_s: float = 0.0


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told, as JSON in its argument."""

    bundle: str
    schema: str
    make: str
    memory_bytes: int
    load_s: float
    window_s: float


class _TooSlow(Exception):  # noqa: N818 - it ends a loop
    """One golden window took longer than a window may."""


def try_load(trial: Trial) -> Verdict:
    """Load a release in a process of its own. Raises `UpdateError` with why it is not to be run."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "HOME") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.update.first_load", msgspec.json.encode(trial).decode()],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        answer, _ = process.communicate(timeout=START_S + trial.load_s)
    except subprocess.TimeoutExpired as error:
        raise UpdateError("timeout", f"first load: not done after {trial.load_s:g} s") from error
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if READY not in answer:
        raise UpdateError("no_trial", f"first load: its process did not come so far (code {process.returncode})")
    if process.returncode == -signal.SIGXCPU:
        raise UpdateError("timeout", f"first load: took more than {trial.load_s:g} s of the processor")
    if process.returncode < 0:
        raise UpdateError("crashed", f"first load: killed by {signal.Signals(-process.returncode).name}")
    said = answer[-MAX_ANSWER_BYTES:].partition(READY)[2]
    try:
        verdict = msgspec.json.decode(said, type=Verdict)
    except msgspec.DecodeError as error:
        raise UpdateError("crashed", f"first load: ended with code {process.returncode} and no answer") from error
    if verdict.reason:
        raise UpdateError(verdict.reason, f"first load: {verdict.detail}")
    return verdict


def main(argument: str) -> Verdict:
    """Load and try the release, under the limits. The process of `try_load`."""
    trial = msgspec.json.decode(argument, type=Trial)
    # loaded before the limits are set, so that these are the model's alone
    from edge_agent.pipeline import bundle_dir, golden, inference  # noqa: PLC0415 - loaded by the process alone

    text = Path(trial.schema).read_bytes() if trial.schema else b""
    catalogue = signals.parse_schema(text, trial.schema) if text else signals.default_catalogue()
    os.write(sys.stdout.fileno(), READY)  # what happens from here on is the model's doing
    _limit(trial)
    slowest_s = 0.0

    def spent(seconds: float) -> None:
        nonlocal slowest_s
        slowest_s = max(slowest_s, seconds)
        if seconds > trial.window_s:
            raise _TooSlow

    try:
        loaded = bundle_dir.load_bundle(Path(trial.bundle), catalogue, trial.make)
        scorer = inference.Scorer(loaded, catalogue)
        vectors = (loaded.path / contract.GOLDEN).read_bytes()
        cases, _ = golden.replay(scorer.session, vectors, "golden.npz", spent=spent, now=time.monotonic)
        problem = _no_score(scorer, catalogue)
    except _TooSlow:
        return Verdict(
            reason="slow_model", detail=f"a window took {slowest_s:.2f} s, at most {trial.window_s:g} s are given"
        )
    except MemoryError:
        return Verdict(reason="memory", detail=f"needs more than {trial.memory_bytes} bytes")
    except BundleError as error:
        detail = str(error)
        if "alloc" in detail or "memory" in detail:
            return Verdict(reason="memory", detail=detail)
        return Verdict(reason="golden" if "golden" in detail else "unfit", detail=detail)
    if problem:
        return Verdict(reason="not_finite", detail=problem)
    return Verdict(cases=cases, slowest_s=slowest_s)


def _no_score(scorer: Any, catalogue: signals.Catalogue) -> str:
    """Score a window in which every signal stands in the middle of its range; return why there is no score, or ""."""
    import numpy as np  # noqa: PLC0415

    from edge_agent.pipeline.outcomes import NoScore, Window  # noqa: PLC0415

    spec = scorer.manifest.window
    middle = np.array([(s.min + s.max) / 2 for s in catalogue.scalars], np.float32)
    for cells, probes in WIDTHS:
        window = Window(
            end_s=spec.length_s, values=np.tile(middle, (spec.frames, 1)),
            cell_voltage=np.full((spec.vector_frames, cells), 3.7, np.float32),
            cell_temperature=np.full((spec.vector_frames, probes), 25.0, np.float32),
            elapsed_s=spec.stride_s, coverage=1.0,
        )  # fmt: skip
        scores, _ = scorer.score(window, scorer.initial_state(cells, probes))
        if isinstance(scores, NoScore):
            return scores.detail
    return ""


def _limit(trial: Trial) -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    used = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Vm")}
    cpu_s = int(trial.load_s) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))  # at the second it is killed without a word
    for what, bytes_ in (
        (resource.RLIMIT_DATA, used["VmData"] + trial.memory_bytes),
        (resource.RLIMIT_AS, used["VmSize"] + trial.memory_bytes + SPARE_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (bytes_, bytes_))


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(main(sys.argv[1])).decode() + "\n")

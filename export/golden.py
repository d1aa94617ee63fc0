"""`golden.npz`: inputs of the graph and the outputs they must give, replayed wherever a bundle is to be trusted.

Arrays are named `NNN.in.NAME` and `NNN.out.NAME`. Cases follow each other as windows of one vehicle do: where the
number of cells and probes allows it, a case's state is what the case before left. On one kind of processor answers are
equal to the last bit; across kinds they stay within `TOLERANCE`.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import StateSpec
from edge_agent.contract.errors import BundleError
from export.features import INPUTS, initial_state

TOLERANCE = 1e-5  # relative to max(1, |expected|)
LEAST_CASES = 24
Case = dict[str, npt.NDArray[Any]]


def read_windows(path: Path) -> list[Case]:
    """Read the raw windows that preparation set aside, as graph inputs. Raises `BundleError` for fewer than 24."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            numbers = sorted(name.removeprefix("window_") for name in stored.files if name.startswith("window_"))
            cases = [
                {name: np.atleast_1d(np.asarray(stored[f"{name}_{n}"], np.float32)) for name in INPUTS} for n in numbers
            ]
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; prepare the dataset first") from error
    except (OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
    if len(cases) < LEAST_CASES:
        raise BundleError(f"{path}: holds {len(cases)} windows, at least {LEAST_CASES} are needed; prepare again")
    return [{name: x if name == "elapsed_s" else x[None] for name, x in case.items()} for case in cases]


def record(session: Any, windows: list[Case], states: tuple[StateSpec, ...]) -> tuple[list[Case], list[Case]]:
    """Run the windows in order; returns the full inputs (states included) and all outputs of each."""
    names = [o.name for o in session.get_outputs()]
    inputs: list[Case] = []
    outputs: list[Case] = []
    state: Case = {}
    for window in windows:
        fresh = initial_state(states, window["cell_voltage"].shape[2], window["cell_temperature"].shape[2])
        if any(name not in state or state[name].shape != x.shape for name, x in fresh.items()):
            state = dict(fresh)
        inputs.append({**window, **state})
        outputs.append(dict(zip(names, session.run(names, inputs[-1]), strict=True)))
        state = {s.name: outputs[-1][f"{s.name}_out"] for s in states}
    return inputs, outputs


def encode(inputs: list[Case], outputs: list[Case]) -> bytes:
    """Write `golden.npz`; the same cases always give the same bytes."""
    arrays: Case = {}
    for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        arrays.update({f"{number:03d}.in.{name}": x for name, x in given.items()})
        arrays.update({f"{number:03d}.out.{name}": x for name, x in expected.items()})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for an array
    return buffer.getvalue()


def replay(session: Any, golden: bytes, origin: str) -> tuple[int, float]:
    """Run every case; returns how many there are and the largest relative difference found.

    Raises `BundleError` when a case differs by more than `TOLERANCE` or holds other tensors than the graph.
    """
    worst, numbers = 0.0, 0
    with np.load(io.BytesIO(golden), allow_pickle=False) as stored:
        cases = sorted({name.split(".")[0] for name in stored.files})
        for case in cases:
            given = {n.split(".", 2)[2]: stored[n] for n in stored.files if n.startswith(f"{case}.in.")}
            expected = {n.split(".", 2)[2]: stored[n] for n in stored.files if n.startswith(f"{case}.out.")}
            try:
                found = dict(zip(expected, session.run(list(expected), given), strict=True))
            except Exception as error:  # onnxruntime's exceptions share no base but Exception
                line = str(error).splitlines()[0][:160]
                raise BundleError(f"{origin}: golden case {case} does not run: {line}") from error
            for name, answer in expected.items():
                difference = _difference(found[name], answer)
                if not difference <= TOLERANCE:
                    raise BundleError(
                        f"{origin}: golden case {case}: {name} differs by {difference:.1e}, not the model"
                    )
                worst = max(worst, difference)
            numbers += 1
    if numbers < LEAST_CASES:
        raise BundleError(f"{origin}: holds {numbers} golden cases, at least {LEAST_CASES} are needed")
    return numbers, worst


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b) / np.maximum(np.abs(b), 1.0), initial=0.0))

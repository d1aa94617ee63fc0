"""`golden.npz`: inputs of the graph and the outputs they must give, replayed wherever a bundle is to be trusted.

Arrays are named as `edge_agent.pipeline.golden`, which replays them, says. Cases follow each other as windows of one
vehicle do: where the number of cells and probes allows it, a case's state is what the case before left.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.contract.bundle import StateSpec
from edge_agent.contract.errors import BundleError
from edge_agent.pipeline.golden import LEAST_CASES, TOLERANCE, Case, replay
from export.features import INPUTS, initial_state

__all__ = ["LEAST_CASES", "TOLERANCE", "Case", "encode", "read_windows", "record", "replay"]


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

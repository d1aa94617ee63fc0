"""One onnxruntime session over the bundle's graph: a window in, finite scores out, or no score with the reason.

Promises: one window at a time, one thread, no idle CPU; every number that leaves is finite (features may be NaN: a
missing signal has no mean); the state changes only with a window that was scored. onnxruntime passes NaN on in silence,
hence the check behind it. What the scores mean is left to `decision`; that the bytes are the bundle's own was checked
by `bundle_dir`.
"""

import os
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.contract.bundle import Manifest
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.outcomes import Float32Array, NoScore, Scores, Window

State = dict[str, npt.NDArray[np.float32]]

_INPUTS = ("window", "cell_voltage", "cell_temperature", "elapsed_s")
_HEAD_OUTPUTS = {
    "failure": ("failure_probability",),
    "type": ("type_probability",),
    "severity": ("severity",),
    "anomaly": ("reconstruction_error", "anomaly_score"),
    "cells": ("worst_cell", "worst_cell_deviation_v"),
}


def session_options() -> ort.SessionOptions:
    """Return the options under which every graph of ours runs (design section 4): one thread that never spins."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: they come back as exceptions too
    return options


class Scorer:
    """A loaded bundle's graph, bound to the catalogue's columns by name.

    Raises `BundleError` when the graph does not load, or when its inputs and outputs are not those of its manifest.
    """

    def __init__(self, loaded: LoadedBundle, catalogue: Catalogue) -> None:
        self.manifest: Manifest = loaded.manifest
        manifest = loaded.manifest
        absent = [s.name for s in manifest.signals if s.name not in catalogue.scalar_index]
        if absent:
            raise BundleError(f"{loaded.path}: is for another feature set: {absent[0]!r} is no scalar of this schema")
        self._columns = np.array([catalogue.scalar_index[s.name] for s in manifest.signals], np.intp)
        try:
            self._session = ort.InferenceSession(
                loaded.model_bytes, session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            line = str(error).splitlines()[0][:200]
            raise BundleError(f"{loaded.path}/model.onnx: does not load: {line}") from error
        self._outputs = self._check_graph(str(loaded.path))

    def _check_graph(self, origin: str) -> list[str]:
        manifest = self.manifest
        states = [s.name for s in manifest.states]
        wanted_in = {*_INPUTS, *states}
        found_in = {i.name for i in self._session.get_inputs()}
        if wanted_in != found_in:
            raise BundleError(
                f"{origin}/model.onnx: its inputs are {', '.join(sorted(found_in))}; "
                f"the manifest asks for {', '.join(sorted(wanted_in))}"
            )
        outputs = ["features", "feature_deviation"]
        for head in manifest.heads:
            outputs += _HEAD_OUTPUTS[head]
        outputs += [name + "_out" for name in states]
        absent = sorted(set(outputs) - {o.name for o in self._session.get_outputs()})
        if absent:
            raise BundleError(f"{origin}/model.onnx: has no output {', '.join(absent)}, which the manifest lists")
        window = next(i for i in self._session.get_inputs() if i.name == "window")
        expected = [1, manifest.window.frames, len(manifest.signals)]
        if list(window.shape) != expected:
            raise BundleError(f"{origin}/model.onnx: window is {list(window.shape)}; the manifest says {expected}")
        return outputs

    @property
    def session(self) -> Any:
        """The session of onnxruntime, for who replays golden vectors."""
        return self._session

    def initial_state(self, cells: int, probes: int) -> State:
        """Return the state before a vehicle's first window, for `cells` voltages and `probes` temperatures."""
        width = {"C": max(1, cells), "P": max(1, probes)}
        return {
            s.name: np.full([width[d] if isinstance(d, str) else d for d in s.shape], s.initial, np.float32)
            for s in self.manifest.states
        }

    def fits(self, state: State, cells: int, probes: int) -> bool:
        """Whether `state` has the tensors that this bundle asks for on this vehicle."""
        wanted = self.initial_state(cells, probes)
        return wanted.keys() == state.keys() and all(wanted[k].shape == state[k].shape for k in wanted)

    def score(self, window: Window, state: State) -> tuple[Scores | NoScore, State]:
        """Score one window; return the scores and the state after it, or a `NoScore` and the state unchanged."""
        feed: dict[str, Any] = {
            "window": window.values[None, :, self._columns],
            "cell_voltage": window.cell_voltage[None],
            "cell_temperature": window.cell_temperature[None],
            "elapsed_s": np.array([window.elapsed_s], np.float32),
            **state,
        }
        try:
            answers = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        except Exception as error:  # noqa: BLE001  # onnxruntime's exceptions share no base but Exception
            line = str(error).splitlines()[0][:160]
            return NoScore(window.end_s, "model_failed", f"the graph failed: {line}"), state
        # A feature without a value has no deviation either: evidence of nothing.
        answers["feature_deviation"] = np.where(
            np.isnan(answers["features"]), np.float32(0), answers["feature_deviation"]
        )
        for name, values in answers.items():
            bad = np.isinf(values) if name == "features" else ~np.isfinite(values)
            if bad.any():
                return NoScore(window.end_s, "not_finite", f"output {name} of the model is not finite"), state
        return self._scores(answers), {s.name: answers[s.name + "_out"] for s in self.manifest.states}

    def _scores(self, answers: dict[str, Any]) -> Scores:
        def number(name: str) -> float | None:
            return float(answers[name].reshape(-1)[0]) if name in answers else None

        def row(name: str) -> Float32Array | None:
            return np.asarray(answers[name][0], np.float32) if name in answers else None

        cell = number("worst_cell")
        return Scores(
            features=np.asarray(answers["features"][0], np.float32),
            feature_deviation=np.asarray(answers["feature_deviation"][0], np.float32),
            failure_probability=number("failure_probability"),
            type_probability=row("type_probability"),
            severity=row("severity"),
            reconstruction_error=row("reconstruction_error"),
            anomaly_score=number("anomaly_score"),
            worst_cell=None if cell is None or cell < 0 else int(cell),
            worst_cell_deviation_v=None if cell is None or cell < 0 else number("worst_cell_deviation_v"),
        )

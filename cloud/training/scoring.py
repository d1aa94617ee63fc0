"""Windows of a dataset through the heads graph as it ships: int8 autoencoder, one window at a time.

Dynamic quantisation makes an int8 result depend on the batch's composition, so thresholds and metrics come from batch
1, as on a vehicle. Two threads take turns on one session; onnxruntime releases the interpreter while it runs.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloud.training.dataset import Windows
from edge_agent.contract.signals import Catalogue, FloatArray
from export.features import session_options
from export.graph import build_heads

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

WORKERS = 2
ANSWERS = ("failure_probability", "type_probability", "severity", "reconstruction_error", "anomaly_score")


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Answers for W windows; a head that was not trained is None.

    failure [W], types [W, T] probabilities; severity [W, T, 4]; error [W, S]; anomaly [W].
    """

    failure: FloatArray | None
    types: FloatArray | None
    severity: FloatArray | None
    error: FloatArray | None
    anomaly: FloatArray | None


class Heads:
    """The heads graph of a models folder. Raises `BundleError` where a model is missing or cannot be exported."""

    def __init__(self, models: Path, datasets: Path, catalogue: Catalogue) -> None:
        model = build_heads(models, datasets, catalogue).SerializeToString()
        self._session = ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs() if o.name in ANSWERS]

    def score(self, windows: Windows) -> HeadScores:
        """Score every window; all must carry their pooled form (validation and test do)."""
        if len(windows.pooled_row) != len(windows):
            raise ValueError("every window needs its pooled form to be scored")
        out: dict[str, npt.NDArray[Any]] = {}
        bounds = np.linspace(0, len(windows), WORKERS + 1).astype(int)
        with ThreadPoolExecutor(WORKERS) as pool:
            parts = list(pool.map(lambda i: self._run(windows, int(bounds[i]), int(bounds[i + 1])), range(WORKERS)))
        for name in self._outputs:
            out[name] = np.concatenate([part[name] for part in parts]).astype(np.float64)
        return HeadScores(
            failure=out.get("failure_probability"),
            types=out.get("type_probability"),
            severity=out.get("severity"),
            error=out.get("reconstruction_error"),
            anomaly=out.get("anomaly_score"),
        )

    def _run(self, windows: Windows, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        rows: list[list[npt.NDArray[Any]]] = []
        for i in range(start, stop):
            feed = {"features": windows.features[i : i + 1], "pooled": windows.pooled[i : i + 1]}
            rows.append(self._session.run(self._outputs, {k: v for k, v in feed.items() if k in self._inputs}))
        if not rows:
            shapes = {o.name: [d for d in o.shape[1:] if isinstance(d, int)] for o in self._session.get_outputs()}
            return {name: np.empty((0, *shapes[name]), np.float32) for name in self._outputs}
        return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(self._outputs)}

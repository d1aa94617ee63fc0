"""`calibration.json`: how a booster's raw margin becomes a probability, in numbers and in the graph.

Two methods: "sigmoid", 1 / (1 + exp(-(a·margin + b))), and "isotonic", linear between the points (x, y) and flat beyond
them. Both are computed in float64 in the graph, since an isotonic step may be steep.
"""

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from edge_agent.contract.errors import BundleError
from export.nodes import Nodes

EXPONENT_LIMIT = 60.0  # e⁶⁰ is still finite in float32, and 1 - e⁻⁶⁰ is 1


class Calibrator(msgspec.Struct, frozen=True, kw_only=True):
    """One entry: from raw margin to probability."""

    method: Literal["sigmoid", "isotonic"]
    a: float = 1.0
    b: float = 0.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __call__(self, margin: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return probabilities of margins, any shape."""
        if self.method == "isotonic":
            return np.interp(margin, self.x, self.y)
        z = np.clip(self.a * margin + self.b, -EXPONENT_LIMIT, EXPONENT_LIMIT)
        return np.asarray(1.0 / (1.0 + np.exp(-z)))

    def emit(self, nodes: Nodes, margin: str) -> str:
        """Add the same to a graph: `margin` float64, any shape → probabilities float64."""
        return self._emit_isotonic(nodes, margin) if self.method == "isotonic" else self._emit_sigmoid(nodes, margin)

    def _emit_sigmoid(self, nodes: Nodes, margin: str) -> str:
        def constant(value: float) -> str:
            return nodes.constant(value, np.float64)

        z = nodes.add("Add", nodes.add("Mul", margin, constant(self.a)), constant(self.b))
        z = nodes.add("Clip", z, constant(-EXPONENT_LIMIT), constant(EXPONENT_LIMIT))
        e = nodes.add("Exp", nodes.add("Neg", z))
        return nodes.add("Div", constant(1.0), nodes.add("Add", e, constant(1.0)))

    def _emit_isotonic(self, nodes: Nodes, margin: str) -> str:
        x, y = np.array(self.x, np.float64), np.array(self.y, np.float64)
        slope = np.append(np.diff(y) / np.diff(x), 0.0) if len(x) > 1 else np.zeros(1)
        clipped = nodes.add("Clip", margin, nodes.constant(x[0], np.float64), nodes.constant(x[-1], np.float64))
        below = nodes.add(
            "Cast",
            nodes.add(
                "GreaterOrEqual",
                nodes.add("Unsqueeze", clipped, nodes.constant([-1], np.int64)),
                nodes.constant(x, np.float64),
            ),
            to=TensorProto.INT64,
        )
        count = nodes.add("ReduceSum", below, nodes.constant([-1], np.int64), keepdims=0)
        index = nodes.add("Sub", count, nodes.constant(1, np.int64))  # ≥ 0, since margin was clipped to x[0]
        left, base, steep = (
            nodes.add("Gather", nodes.constant(table, np.float64), index, axis=0) for table in (x, y, slope)
        )
        return nodes.add("Add", base, nodes.add("Mul", steep, nodes.add("Sub", clipped, left)))


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file: one entry for the failure head, one a failure type."""

    failure: Calibrator | None = None
    types: dict[str, Calibrator] = {}


def load_calibration(path: Path) -> Calibration:
    """Read `calibration.json`. Raises `BundleError` when it is missing or cannot be used."""
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; train the models first") from error
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: {error}; train the models again") from error
    entries = {**calibration.types, **({"failure": calibration.failure} if calibration.failure else {})}
    for name, entry in entries.items():
        if entry.method == "sigmoid" and not np.isfinite([entry.a, entry.b]).all():
            raise BundleError(f"{path}: calibration of {name!r} is not finite; train the models again")
        if entry.method == "isotonic":
            x, y = np.array(entry.x), np.array(entry.y)
            if len(x) == 0 or len(x) != len(y) or not (np.diff(x) > 0).all() or not np.isfinite([*x, *y]).all():
                raise BundleError(f"{path}: calibration of {name!r} needs as many y as x, and rising x; train again")
    return calibration

"""Counts against the bundle's reference bins: what the fleet's data looks like now, mergeable by adding.

Promises: counts of two spans, two vehicles or two orders add up exactly; the last bin counts what is missing; signals
are counted over the frames of the newest stride, so that overlapping windows count no frame twice, features and scores
once a window. Pure: no clock, no decision; what the counts mean is the cloud's business.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import DriftReference, WindowSpec
from edge_agent.contract.messages import DriftVariable, Stratum
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.outcomes import Scored, Scores, Window

IntArray = npt.NDArray[np.int64]

DRIVING_KMH = 1.0  # a speed sensor's zero is not always 0
CHARGING_A = 1.0  # into the battery, at standstill


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts since the last `take`, with the span they cover in the source's time."""

    first_s: float
    last_s: float
    windows: int
    variables: tuple[DriftVariable, ...]


def stratum(window: Window, catalogue: Catalogue) -> Stratum:
    """Say what the vehicle did for most of the window: driving, charging or parked; "all" where nothing tells."""
    speed = _mean(window, catalogue.column("speed"))
    current = _mean(window, catalogue.column("pack_current"))
    flag = _mean(window, catalogue.column("is_charging"))
    if speed is not None and speed > DRIVING_KMH:
        return "driving"
    if flag is not None:
        return "charging" if flag >= 0.5 else "parked"
    if current is not None and current > CHARGING_A:
        return "charging"
    return "parked" if speed is not None or current is not None else "all"


def _mean(window: Window, column: int | None) -> float | None:
    if column is None:
        return None
    values = window.values[:, column]
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def count(edges: npt.ArrayLike, values: npt.ArrayLike) -> IntArray:
    """Count `values` into the bins of B-1 inner `edges`; returns [B + 1], the last being the missing (NaN) ones.

    A value on an edge belongs to the bin above it.
    """
    inner = np.asarray(edges, np.float64)
    flat = np.asarray(values, np.float64).reshape(-1)
    missing = np.isnan(flat)
    counts = np.zeros(inner.shape[0] + 2, np.int64)
    bins = np.searchsorted(inner, flat[~missing], side="right")
    counts[:-1] = np.bincount(bins, minlength=inner.shape[0] + 1)
    counts[-1] = int(missing.sum())
    return counts


class DriftCounter:
    """Counts scored windows against one reference."""

    def __init__(
        self,
        reference: DriftReference,
        catalogue: Catalogue,
        *,
        features: tuple[str, ...],
        failure_types: tuple[str, ...] = (),
        spec: WindowSpec | None = None,
    ) -> None:
        spec = spec or WindowSpec()
        self._stride = max(1, round(spec.stride_s / spec.period_s))
        self._signals = [
            (v, catalogue.scalar_index[v.name])
            for v in reference.variables
            if v.kind == "signal" and v.name in catalogue.scalar_index
        ]
        index = {name: i for i, name in enumerate(features)}
        self._features = [(v, index[v.name]) for v in reference.variables if v.kind == "feature" and v.name in index]
        self._scores = [v for v in reference.variables if v.kind == "score"]
        self._types = failure_types
        self._counts: dict[tuple[str, Stratum], IntArray] = {}
        self._span: tuple[float, float] | None = None
        self._windows = 0

    def add(self, scored: Scored) -> None:
        """Count one scored window."""
        group = scored.stratum
        newest = scored.window.values[-self._stride :]
        for variable, column in self._signals:
            self._add(variable.name, group, count(variable.edges, newest[:, column]))
        for variable, column in self._features:
            self._add(variable.name, group, count(variable.edges, scored.scores.features[column]))
        for variable in self._scores:
            value = score_value(scored.scores, variable.name, self._types)
            self._add(variable.name, group, count(variable.edges, np.nan if value is None else value))
        end = scored.window.end_s
        self._span = (end, end) if self._span is None else (min(self._span[0], end), max(self._span[1], end))
        self._windows += 1

    def _add(self, name: str, group: Stratum, counts: IntArray) -> None:
        held = self._counts.get((name, group))
        self._counts[name, group] = counts if held is None else held + counts

    def take(self) -> Counted | None:
        """Return what was counted since the last call and begin anew; None when nothing was."""
        if self._span is None:
            return None
        taken = Counted(
            *self._span,
            self._windows,
            tuple(
                DriftVariable(name=name, stratum=group, counts=tuple(int(c) for c in counts))
                for (name, group), counts in sorted(self._counts.items())
            ),
        )
        self._counts, self._span, self._windows = {}, None, 0
        return taken


def score_value(scores: Scores, name: str, failure_types: tuple[str, ...]) -> float | None:
    """Return the score called `name`: failure_probability, anomaly_score, or type_probability.TYPE."""
    if name.startswith("type_probability."):
        kind = name.partition(".")[2]
        if scores.type_probability is None or kind not in failure_types:
            return None
        return float(scores.type_probability[failure_types.index(kind)])
    if name == "failure_probability":
        return scores.failure_probability
    return scores.anomaly_score if name == "anomaly_score" else None

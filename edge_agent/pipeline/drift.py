"""Counts against the bundle's reference bins: what the fleet's data looks like now, mergeable by adding.

Promises: counts of two spans, two vehicles or two orders add up exactly; every scored window is in exactly one span and
one stratum; the last bin counts what is missing; signals are counted over the frames of the newest stride, so that
overlapping windows count no frame twice, features and scores once a window. A span has a key from its first window on,
which a snapshot keeps. Pure: no clock, no decision; what the counts mean is the cloud's business.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import DriftReference, WindowSpec
from edge_agent.contract.messages import DriftVariable, Stratum
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.outcomes import Counted, Scored, Scores, Window

IntArray = npt.NDArray[np.int64]

DRIVING_KMH = 1.0  # a speed sensor's zero is not always 0
CHARGING_A = 1.0  # into the battery, at standstill
PUBLISH_S = 3600.0  # of the source's time; one message a stratum is about 9 kB, whatever it counted


class StratumSpan(msgspec.Struct, frozen=True, kw_only=True):
    """What one stratum of the open span has counted so far; `variables` as they would leave now."""

    stratum: Stratum
    first_s: float
    last_s: float
    windows: int
    variables: tuple[DriftVariable, ...]


class DriftState(msgspec.Struct, frozen=True, kw_only=True):
    """What `DriftCounter` keeps between two windows. `reference` says whose bins these are."""

    reference: str
    ordinal: int
    key: str
    first_s: float | None
    strata: tuple[StratumSpan, ...]


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


def bin_of(edges: npt.ArrayLike, values: npt.ArrayLike) -> IntArray:
    """Return for each value [N] its bin among those of B-1 inner `edges`; B is the bin of what is missing (NaN).

    A value on an edge belongs to the bin above it.
    """
    inner = np.asarray(edges, np.float64)
    flat = np.asarray(values, np.float64).reshape(-1)
    bins = np.searchsorted(inner, flat, side="right")
    return np.where(np.isnan(flat), inner.shape[0] + 1, bins).astype(np.int64)


def count(edges: npt.ArrayLike, values: npt.ArrayLike) -> IntArray:
    """Count `values` into the bins of B-1 inner `edges`; returns [B + 1], the last being the missing (NaN) ones."""
    return np.bincount(bin_of(edges, values), minlength=np.asarray(edges).shape[0] + 2).astype(np.int64)


@dataclass(slots=True)
class _Span:
    """One stratum of the open span."""

    first_s: float
    last_s: float
    windows: int
    counts: dict[str, IntArray]


class DriftCounter:
    """Counts scored windows against one reference.

    reference_id  identity of the bins (sha256 of the file): a snapshot of others is refused
    release       of the bundle that the bins belong to
    timeline      part of a span's key: "" where times are Unix seconds, else the boot id
    publish_s     a span is over when so much of the source's time has passed since its first window
    """

    def __init__(
        self,
        reference: DriftReference,
        catalogue: Catalogue,
        *,
        features: tuple[str, ...],
        failure_types: tuple[str, ...] = (),
        spec: WindowSpec | None = None,
        reference_id: str = "",
        release: int = 0,
        timeline: str = "",
        publish_s: float = PUBLISH_S,
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
        self._reference_id = reference_id
        self._release = release
        self._timeline = timeline
        self._publish_s = publish_s
        self._ordinal = 0  # of the open span: two spans never share a key, though a clock be set back between them
        self._key = ""
        self._first_s: float | None = None
        self._strata: dict[Stratum, _Span] = {}

    def due(self, now_s: float) -> bool:
        """Whether the open span is over at `now_s`: its time has passed, or time was set back behind its beginning."""
        return self._first_s is not None and not 0 <= now_s - self._first_s < self._publish_s

    def add(self, scored: Scored) -> None:
        """Count one scored window into the open span."""
        end_s = scored.window.end_s
        if self._first_s is None:
            self._first_s = end_s
            self._key = f"{self._timeline}/{self._ordinal}/{round(end_s * 1000)}"
        span = self._strata.setdefault(scored.stratum, _Span(end_s, end_s, 0, {}))
        span.first_s, span.last_s = min(span.first_s, end_s), max(span.last_s, end_s)
        span.windows += 1
        newest = scored.window.values[-self._stride :]
        for variable, column in self._signals:
            _add(span.counts, variable.name, count(variable.edges, newest[:, column]))
        for variable, column in self._features:
            _add(span.counts, variable.name, count(variable.edges, scored.scores.features[column]))
        for variable in self._scores:
            value = score_value(scored.scores, variable.name, self._types)
            _add(span.counts, variable.name, count(variable.edges, np.nan if value is None else value))

    @property
    def open(self) -> tuple[Counted, ...]:
        """What `take` would return now."""
        return tuple(
            Counted(
                self._key, s.stratum, s.first_s, s.last_s, s.windows, s.variables, self._reference_id, self._release
            )
            for s in self._stratum_spans()
        )

    def take(self) -> tuple[Counted, ...]:
        """End the open span: return its counts, one of each stratum that had a window, and begin anew."""
        taken = self.open
        if taken:
            self._ordinal += 1
        self._strata, self._first_s, self._key = {}, None, ""
        return taken

    def _stratum_spans(self) -> tuple[StratumSpan, ...]:
        return tuple(
            StratumSpan(
                stratum=name, first_s=span.first_s, last_s=span.last_s, windows=span.windows,
                variables=tuple(
                    DriftVariable(name=variable, stratum=name, counts=tuple(counts.tolist()))
                    for variable, counts in sorted(span.counts.items())
                ),
            )
            for name, span in sorted(self._strata.items())
        )  # fmt: skip

    def state(self) -> DriftState:
        """Return what has to be kept so that another counter goes on exactly here."""
        return DriftState(
            reference=self._reference_id, ordinal=self._ordinal, key=self._key, first_s=self._first_s,
            strata=self._stratum_spans(),
        )  # fmt: skip

    def restore(self, state: DriftState, shift_s: float = 0.0) -> int:
        """Go on from `state`, its times moved by `shift_s`; returns how many windows were refused: all, or none.

        Counts of another reference's bins are refused; the ordinal goes on, so that no key comes twice.
        """
        self._ordinal = state.ordinal
        if state.reference != self._reference_id:
            self._ordinal += 1
            return sum(span.windows for span in state.strata)
        self._key = state.key
        self._first_s = None if state.first_s is None else state.first_s + shift_s
        self._strata = {
            span.stratum: _Span(
                span.first_s + shift_s, span.last_s + shift_s, span.windows,
                {v.name: np.array(v.counts, np.int64) for v in span.variables},
            )
            for span in state.strata
        }  # fmt: skip
        return 0


def _add(held: dict[str, IntArray], name: str, counts: IntArray) -> None:
    held[name] = counts if name not in held else held[name] + counts


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

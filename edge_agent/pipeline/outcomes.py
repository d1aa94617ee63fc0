"""What the pipeline says: windows, scores, windows without a score, changes of alerts, drift counts, samples.

Plain frozen values. Times are seconds on the source's timeline (see `ArrivalBlock.time_s`); turning them into wall time
is the business of whoever owns a clock.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.contract.messages import DriftVariable, Severity, Stratum, Transition

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """One window on the grid, ready for the graph.

    end_s             time of the newest grid point, seconds
    values            [frames, S] float32, NaN = missing
    cell_voltage      [vector_frames, C] float32, C ≥ 1 (one column of NaN where the source has none)
    cell_temperature  [vector_frames, P] float32, P ≥ 1
    elapsed_s         since the previous window of this vehicle, at most the window's length; the length for the first
    coverage          share of the expected arrivals that came, 0 to 1
    """

    end_s: float
    values: Float32Array
    cell_voltage: Float32Array
    cell_temperature: Float32Array
    elapsed_s: float
    coverage: float


@dataclass(frozen=True, slots=True)
class Scores:
    """The graph's answers for one window; a head that the bundle lacks is None. All finite where not None.

    type_probability [T]; severity [T, 4]; reconstruction_error [S]; features and feature_deviation [F] (NaN allowed in
    features: a missing signal has no mean).
    """

    features: Float32Array
    feature_deviation: Float32Array
    failure_probability: float | None = None
    type_probability: Float32Array | None = None
    severity: Float32Array | None = None
    reconstruction_error: Float32Array | None = None
    anomaly_score: float | None = None
    worst_cell: int | None = None
    worst_cell_deviation_v: float | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A window that was scored, with the stratum its drift counts belong to."""

    window: Window
    scores: Scores
    stratum: Stratum


@dataclass(frozen=True, slots=True)
class NoScore:
    """A window that was not scored, and why, in plain words that name the signal or the limit.

    `reason` is a short code that counts are kept under: low_coverage, signal_missing, no_bundle, not_finite, too_slow.
    """

    end_s: float
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Reason:
    """One piece of evidence: a signal, feature or rule input; `deviation` is a robust z where there is one."""

    name: str
    value: float
    deviation: float | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class AlertChange:
    """One transition of one alert, from the decision table (origin "model") or a guard (origin "guard").

    `key` identifies the alert together with vehicle, type and origin: it stays the same from raised to cleared, also
    over a restart on another timeline, where `since_s` moves with the clock.
    """

    time_s: float
    since_s: float
    failure_type: str
    transition: Transition
    severity: Severity
    origin: Literal["model", "guard"]
    rule: str = ""
    key: str = ""
    scores: Scores | None = None
    type_index: int | None = None
    windows_over_threshold: int | None = None
    windows_considered: int | None = None
    evidence: tuple[Reason, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Counted:
    """Drift counts of one span of time and one stratum; spans follow each other without overlap or gap.

    `key` identifies the span together with vehicle and stratum: it is given with the span's first window and stays the
    same over a restart. `first_s` and `last_s` are the ends of the stratum's first and last window. `reference` (sha256
    of its bins) and `model_release` are of the bundle they were counted with, whichever is installed when they leave.
    """

    key: str
    stratum: Stratum
    first_s: float
    last_s: float
    windows: int
    variables: tuple[DriftVariable, ...]
    reference: str
    model_release: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A raw window chosen for training, packed (`samples.pack`) with the model's state from before it.

    `key` identifies the window together with vehicle and release; alert_id and failure_type are empty for one of the
    random share. `state_id` and `model_release` are of the bundle whose state it carries; "" and None without one.
    """

    key: str
    end_s: float
    elapsed_s: float
    coverage: float
    stratum: Stratum
    reason: Literal["alert", "random"]
    packed: bytes
    state_id: str = ""
    model_release: int | None = None
    alert_id: str = ""
    failure_type: str = ""


Outcome = Scored | NoScore | AlertChange | Counted | Sampled

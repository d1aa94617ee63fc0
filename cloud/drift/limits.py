"""The sections `drift` and `retraining` of `config.json`: the limits that the service itself decides by.

The service reads these two alone (`load_limits`); a training run reads the whole file, with the same types
(`cloud.training.config`). A misspelt key in either section is refused with the nearest known one.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.contract.errors import ConfigError

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "config.json"

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0.0)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's sections."""


class Retraining(Section, frozen=True, kw_only=True):
    """Any one of these starts a training run."""

    drift_alerts: Count = 3  # variables that raised one since the last training
    max_age_days: Positive = 30.0
    new_samples: Count = 10_000
    performance_drop: Share = 0.1  # relative, of the precision that the release states
    min_labelled_alerts: Count = 20  # fewer say nothing: of 20 at 0.9 the standard error is 0.07


class Drift(Section, frozen=True, kw_only=True):
    """Limits of the fleet's drift decision."""

    min_windows: Count = 500  # in a stratum, below which there is no verdict; also of the reference
    min_vehicles: Count = 3  # of a make or the fleet: fewer are judged as vehicles
    min_vehicle_windows: Count = 60  # a vehicle with fewer in a stratum is left out of a merge: half of it is chance
    false_alarm_rate: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.01  # of any variable, a look; export calibrates to it
    max_vehicle_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.05
    psi: Positive = 0.25  # where the release has no calibrated limits: "a major shift" (Siddiqi 2006)
    least_psi: Annotated[float, Meta(ge=0.0)] = 0.1  # below it "no shift" (Siddiqi 2006), however sure one can be
    clear_ratio: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.7  # of the limit: the hysteresis
    window_hours: Positive = 168.0  # the span that is watched: a vehicle's week has every stratum


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the service reads of the file; the other sections are the training's."""

    drift: Drift = Drift()
    retraining: Retraining = Retraining()


def load_limits(path: Path | None) -> Limits:
    """Read the two sections of `path`, or of the file that comes with the package. Raises `ConfigError`."""
    origin = path or DEFAULT_CONFIG
    try:
        return msgspec.json.decode(origin.read_bytes(), type=Limits)
    except OSError as error:
        raise ConfigError(f"config {origin}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {origin}: {error}{_nearest(str(error))}") from error


def _nearest(message: str) -> str:
    unknown = re.search(r"unknown field `([^`]*)` - at `\$\.(drift|retraining)`", message)
    if unknown is None:
        return ""
    section: type[Section] = Drift if unknown[2] == "drift" else Retraining
    known = section.__struct_encode_fields__
    near = get_close_matches(unknown[1], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"

"""The signal catalogue: which signals exist, in what unit and range, and for how long a value stands.

Names are COVESA VSS 5 paths; a signal VSS lacks is marked `overlay`. The sign convention is VSS's: traction battery
current is positive INTO the battery. Nothing is tied to the default catalogue: another schema file gives another one,
and code that needs a particular quantity asks for its `role`.

Words: a *CAN frame* is what the bus carries; an *arrival* is one decoded value with its time; a *frame* is one row of
the grid.
"""

from collections.abc import Iterator
from functools import cached_property
from importlib import resources
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.errors import ConfigError

FAILURE_TYPES = (
    "battery_degradation",
    "motor_bearing_wear",
    "inverter_overheating",
    "thermal_runaway_risk",
    "charging_fault",
)
SEVERITIES = ("low", "medium", "high", "critical")
STRATA = ("driving", "charging", "parked")
VECTOR_ROLES = ("cell_voltage", "cell_temperature")  # the graph's two vector inputs

FloatArray = npt.NDArray[np.float64]


class Signal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the schema: a physical quantity with its unit (VSS spelling), range and staleness limit.

    `kind` "scalar" lives on the fast grid, "vector" (every cell, every probe; the length differs by vehicle) on the
    slow one. `role` is how domain code finds it whatever its name. `invalid` lists codes that mean "no value" in the
    converted unit; `min`/`max` are the widest physically possible range, inclusive.
    """

    name: str
    unit: str
    min: float
    max: float
    max_age_s: float
    kind: Literal["scalar", "vector"] = "scalar"
    role: str = ""
    invalid: tuple[float, ...] = ()
    overlay: bool = False
    description: str = ""


class Schema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The schema file as written: `telemetry_schema.json`."""

    schema_name: str
    signals: tuple[Signal, ...]
    description: str = ""


class Catalogue:
    """The signals of one schema, in the order that every array in the system uses.

    Raises `ConfigError` when a name or role is used twice, a range is empty, or a vector has no known role.
    """

    def __init__(self, name: str, signals: tuple[Signal, ...]) -> None:
        self.name = name
        self.scalars = tuple(s for s in signals if s.kind == "scalar")
        self.vectors = tuple(s for s in signals if s.kind == "vector")
        self._by_name = {s.name: s for s in signals}
        self._by_role = {s.role: s for s in signals if s.role}
        if len(self._by_name) != len(signals):
            twice = _first_repeated(s.name for s in signals)
            raise ConfigError(f"schema {name!r}: signal {twice!r} is listed twice; names must be unique")
        if len(self._by_role) != sum(1 for s in signals if s.role):
            twice = _first_repeated(s.role for s in signals if s.role)
            raise ConfigError(f"schema {name!r}: role {twice!r} is given to two signals; a role has one owner")
        for s in signals:
            if not s.min < s.max:
                raise ConfigError(f"schema {name!r}: signal {s.name!r} has min {s.min} ≥ max {s.max}")
            if s.kind == "vector" and s.role not in VECTOR_ROLES:
                raise ConfigError(f"schema {name!r}: vector {s.name!r} needs a role, one of {', '.join(VECTOR_ROLES)}")
        if not self.scalars:
            raise ConfigError(f"schema {name!r} has no scalar signal; at least one is needed for a window")

    @cached_property
    def scalar_names(self) -> tuple[str, ...]:
        """Names of the scalar signals, in array order (S of them)."""
        return tuple(s.name for s in self.scalars)

    @cached_property
    def scalar_index(self) -> dict[str, int]:
        """Column of each scalar in every `[…, S]` array."""
        return {s.name: i for i, s in enumerate(self.scalars)}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Signal:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._by_name.values())

    def role(self, role: str) -> Signal | None:
        """Return the signal that plays `role`, or None where this schema has none."""
        return self._by_role.get(role)

    def column(self, role: str) -> int | None:
        """Column of the scalar that plays `role`, or None."""
        signal = self._by_role.get(role)
        return None if signal is None or signal.kind != "scalar" else self.scalar_index[signal.name]

    @cached_property
    def scalar_min(self) -> FloatArray:
        """Lower range limits, [S]."""
        return np.array([s.min for s in self.scalars])

    @cached_property
    def scalar_max(self) -> FloatArray:
        """Upper range limits, [S]."""
        return np.array([s.max for s in self.scalars])

    @cached_property
    def scalar_max_age_s(self) -> FloatArray:
        """For how long a value stands without a new one, [S] seconds."""
        return np.array([s.max_age_s for s in self.scalars])


def _first_repeated(names: Iterator[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def parse_schema(text: bytes | str, origin: str) -> Catalogue:
    """Read a schema file's text. Raises `ConfigError` naming `origin`, the place and what is wrong."""
    try:
        schema = msgspec.json.decode(text, type=Schema)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"schema {origin}: {error}") from error
    return Catalogue(schema.schema_name, schema.signals)


def default_catalogue() -> Catalogue:
    """Return the electric vehicle's catalogue that comes with the package (`telemetry_schema.json`)."""
    text = resources.files("edge_agent.contract").joinpath("telemetry_schema.json").read_bytes()
    return parse_schema(text, "telemetry_schema.json")

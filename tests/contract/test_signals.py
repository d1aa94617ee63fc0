"""The catalogue refuses a schema that would make two readings of one array possible."""

import json

import pytest

from edge_agent.contract import signals
from edge_agent.contract.errors import ConfigError


def schema(*entries: dict[str, object]) -> str:
    base = {"unit": "V", "min": 0, "max": 1, "max_age_s": 1}
    return json.dumps({"schema_name": "pump", "signals": [base | e for e in entries]})


def test_the_default_catalogue_follows_vss_and_has_both_vectors() -> None:
    catalogue = signals.default_catalogue()
    assert all(s.name.startswith("Vehicle.") for s in catalogue)
    assert {s.role for s in catalogue.vectors} == set(signals.VECTOR_ROLES)
    assert (
        catalogue.column("pack_current") == catalogue.scalar_index["Vehicle.Powertrain.TractionBattery.CurrentCurrent"]
    )
    assert catalogue.column("cell_voltage") is None, "a vector has no scalar column"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"name": "a"}, {"name": "a"}], "'a' is listed twice"),
        ([{"name": "a", "role": "r"}, {"name": "b", "role": "r"}], "'r' is given to two"),
        ([{"name": "a", "min": 2}], "min 2"),
        ([{"name": "a", "kind": "vector"}], "needs a role"),
        ([{"name": "a", "kind": "vector", "role": "cell_voltage"}], "no scalar signal"),
        ([{"name": "a", "colour": "red"}], "colour"),
        ([{"name": 3}], r"signals\[0\]|\$\.signals"),
    ],
)
def test_a_schema_with_a_contradiction_is_refused_with_its_place(entries: list[dict[str, object]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        signals.parse_schema(schema(*entries), "pump.json")


def test_a_pump_with_eight_sensors_is_a_catalogue_too() -> None:
    catalogue = signals.parse_schema(schema(*({"name": f"Pump.S{i}"} for i in range(8))), "pump.json")
    assert len(catalogue.scalars) == 8
    assert catalogue.scalar_max.tolist() == [1.0] * 8
    assert catalogue.role("speed") is None

"""A mapping converts once and exactly, masks what is no value, and names what it cannot use."""

import numpy as np
import pytest

from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.mapping import BoundMapping, Masked, parse_mapping
from edge_agent.contract.signals import default_catalogue

BATTERY = "Vehicle.Powertrain.TractionBattery"
TEXT = f"""
[source]
period_s = 10.0
[source.time]
column = "t"
utc_offset_h = 8.0
[signals."Vehicle.Speed"]
column = "v"
[signals."{BATTERY}.CurrentCurrent"]
column = "i"
scale = -1.0
[signals."{BATTERY}.Temperature.CellTemperature"]
columns = "T_*"
offset = -40.0
invalid = [255]
[signals."{BATTERY}.CellVoltage.CellVoltages"]
columns = "V_*"
"""
COLUMNS = ["t", "v", "i", "T_1", "T_2", "V_1", "V_2", "V_10"]


def bound(text: str = TEXT, columns: list[str] = COLUMNS) -> BoundMapping:
    return BoundMapping(parse_mapping(text, "m.toml"), default_catalogue(), columns, "m.toml")


def test_sign_scale_offset_invalid_codes_and_ranges_are_applied_and_counted() -> None:
    mapping, masked = bound(), Masked()
    block = mapping.convert(
        {
            "v": np.array([10.0, np.inf, 900.0]),
            "i": np.array([5, -7, 0]),
            "T_1": np.array([60, 255, 61]),
            "T_2": np.array([62, 63, 64]),
            "V_1": np.array([3.7, 66.535, np.nan]),
            "V_2": np.array([3.7, 3.7, 5.0]),
            "V_10": np.array([3.6, 3.6, 3.6]),
        },
        np.arange(3.0),
        masked,
    )
    catalogue = default_catalogue()
    assert block.scalars[:, catalogue.column("pack_current")].tolist() == [-5.0, 7.0, 0.0]
    speed = block.scalars[:, catalogue.column("speed")]
    assert speed[0] == 10.0
    assert np.isnan(speed[1:]).all()
    assert block.cell_temperature[:, 1].tolist() == [22.0, 23.0, 24.0]
    assert np.isnan(block.cell_temperature[1, 0])
    assert np.isnan(block.cell_voltage[1, 0])
    assert np.isnan(block.cell_voltage[2, 1])
    assert masked.counts == {
        ("Vehicle.Speed", "not_finite"): 1,
        ("Vehicle.Speed", "out_of_range"): 1,
        (f"{BATTERY}.Temperature.CellTemperature", "invalid_code"): 1,
        (f"{BATTERY}.CellVoltage.CellVoltages", "out_of_range"): 2,
    }


def test_vector_columns_are_in_the_order_of_their_numbers() -> None:
    assert bound().columns[-3:] == ("V_1", "V_2", "V_10")
    assert (bound().cells(), bound().probes()) == (3, 2)


def test_times_are_unix_seconds_whatever_they_were_written_in() -> None:
    expected = 1_620_205_800.0  # 2021-05-05T09:10:00Z
    naive = np.array(["2021-05-05T17:10:00"], dtype="datetime64[us]")
    assert bound().times(naive).tolist() == [expected]
    assert bound().times(np.array(["2021-05-05 17:10:00.5"])).tolist() == [expected + 0.5]
    milli = bound(TEXT.replace("utc_offset_h = 8.0", 'unit = "ms"'))
    assert milli.times(np.array([expected * 1000])).tolist() == [expected]
    assert np.isnan(bound().times(np.array(["NaT"], dtype="datetime64[us]"))).all()
    with pytest.raises(SourceError, match="'t'"):
        bound().times(np.array(["yesterday"]))


def test_a_column_of_text_is_one_clear_line_not_a_traceback() -> None:
    with pytest.raises(SourceError, match=r"column 'v' \(for Vehicle.Speed\)"):
        bound().convert({"v": np.array(["fast"])}, np.zeros(1), Masked())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[signals", "not valid TOML"),
        (TEXT.replace('"Vehicle.Speed"', '"Vehicle.Sped"'), "did you mean 'Vehicle.Speed'"),
        (TEXT.replace('column = "v"', 'column = "vv"'), "column 'vv'.*did you mean 'v'"),
        (TEXT.replace('column = "v"', 'columns = "V_*"'), "is a scalar"),
        (TEXT.replace('columns = "V_*"', 'columns = "W_*"'), "no column matches 'W_[*]'"),
        (TEXT.replace('column = "v"', "scale = 2.0"), "exactly one of"),
        (TEXT.replace("period_s = 10.0", "period_s = 0"), "above 0"),
        (TEXT.replace("period_s", "perod_s"), "perod_s"),
        (TEXT.replace("scale = -1.0", "scal = -1.0"), r"unknown key 'scal' in .*CurrentCurrent.*did you mean 'scale'"),
        (TEXT.replace('column = "t"', 'column = "time"'), "time column 'time'"),
    ],
)
def test_a_mapping_that_cannot_be_used_says_what_and_where(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bound(text)

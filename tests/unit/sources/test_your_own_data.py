"""docs/your-own-data.md is true: its mapping is read by the real reader, over a real file of that shape."""

import re
from pathlib import Path

import numpy as np

from edge_agent.contract.mapping import Masked, SignalRule, parse_mapping
from edge_agent.sources.replay import open_recording
from tests.conftest import ROOT
from tests.telemetry import CATALOGUE, column

PAGE = (ROOT / "docs" / "your-own-data.md").read_text()


def test_the_pages_mapping_reads_a_file_of_that_shape(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "my-car.csv"
    path.write_text(
        "time,speed_mph,current,charge_status,V_1,V_2,V_10,T_1,T_2\n"
        "2024-05-06 08:00:00,10,50,3,3.7,66.535,3.8,65,255\n"
        "2024-05-06 08:00:10,0,-20,1,3.7,5.0,3.8,66,255\n"
        "2024-05-06 08:00:20,0,-20,9,3.7,0.0,3.8,66,254\n"
    )
    recording = open_recording(path, parse_mapping(text, "my-car.toml"), CATALOGUE)
    (block,) = recording.blocks()
    assert block.time_s[0] == np.datetime64("2024-05-06T00:00:00", "s").astype(float)
    assert block.scalars[0, column("speed")] == 16.09344
    assert block.scalars[:, column("pack_current")].tolist() == [-50.0, 20.0, 20.0]
    assert np.array_equal(block.scalars[:, column("is_charging")], [0.0, 1.0, np.nan], equal_nan=True)
    assert np.array_equal(block.cell_voltage[0], [3.7, np.nan, 3.8], equal_nan=True)
    assert np.array_equal(block.cell_temperature[:, 0], [25.0, 26.0, 26.0])
    assert np.isnan(block.cell_temperature[:, 1]).all()
    assert {reason: n for (_, reason), n in recording.masked.counts.items()}["out_of_range"] == 1
    assert recording.masked.total() == 7


def test_the_page_names_every_key_of_a_rule() -> None:
    for key in SignalRule.__struct_fields__:
        assert f"`{key}`" in PAGE


def test_the_page_names_every_reason_of_masking() -> None:
    masked = Masked()
    for reason in ("invalid_code", "out_of_range", "not_finite"):
        masked.add("x", reason, 1)
        assert f"`{reason}`" in PAGE
    assert masked.total() == 3

"""Limits of counts and samples: the configuration's, and what they come to in bytes of real windows."""

from pathlib import Path

import pytest

from edge_agent.config import parse_config
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.samples import unpack
from edge_agent.contract.signals import default_catalogue
from edge_agent.mappings import read_mapping
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.drift import PUBLISH_S
from edge_agent.pipeline.outcomes import Sampled, Scored
from edge_agent.pipeline.sampling import SamplingLimits, message_bytes
from edge_agent.sources.replay import open_recording
from tests.bundles import build_bundle
from tests.conftest import ROOT
from tests.unit.test_agent_parts import GOOD


def test_the_limits_of_counts_and_samples_are_configured_and_have_defaults() -> None:
    config = parse_config(GOOD, "c.toml", Path("/"))
    assert config.drift.publish_s == PUBLISH_S == 3600.0
    assert config.samples.limits == SamplingLimits()
    samples = "[samples]\nbytes_a_day = 0\nrandom_share = 0.5\nwindows_before = 3\nwindows_after = 0\n"
    config = parse_config(GOOD + "[drift]\npublish_s = 600\n" + samples, "c.toml", Path("/"))
    assert config.drift.publish_s == 600
    assert config.samples.limits == SamplingLimits(0, 0.5, 3, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[samples]\nbytes_per_day = 1", "unknown key 'samples.bytes_per_day'; did you mean 'bytes_a_day'?"),
        ("[samples]\nrandom_share = 1.5", "samples.random_share"),
        ("[samples]\nbytes_a_day = -1", "samples.bytes_a_day"),
        ("[samples]\nwindows_before = 13", "samples.windows_before"),
        ("[drift]\npublish_s = 1", "drift.publish_s"),
    ],
)
def test_a_limit_that_cannot_be_is_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(GOOD + text, "c.toml", Path("/"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("vehicle", "cells"), [("a", 96), ("b", 87)])
def test_real_windows_stay_within_the_budget_and_are_as_small_as_stated(
    real_data: Path, tmp_path: Path, vehicle: str, cells: int
) -> None:
    catalogue = default_catalogue()
    mapping = read_mapping(ROOT / "edge_agent" / "mappings" / f"vehicle_{vehicle}.toml")
    recording = open_recording(
        real_data / f"vehicle_{vehicle}.parquet", mapping.mapping, catalogue, origin=mapping.origin
    )
    limits = SamplingLimits(random_share=0.2)
    pipeline = Pipeline(
        catalogue, vehicle_id="EV_R", period_s=mapping.mapping.source.period_s, cells=recording.bound.cells(),
        probes=recording.bound.probes(), bundle=load_bundle(build_bundle(tmp_path, catalogue), catalogue),
        expected=tuple(mapping.mapping.signals), sampling=limits,
    )  # fmt: skip
    outcomes = [o for block in recording.blocks() for o in pipeline.push(block)] + pipeline.flush()
    samples = [o for o in outcomes if isinstance(o, Sampled)]
    scored = [o.window.end_s for o in outcomes if isinstance(o, Scored)]
    assert unpack(samples[0].packed).cell_voltage.shape == (30, cells)
    sizes = [message_bytes(len(s.packed)) for s in samples]
    assert max(sizes) < 20_000, "an alert's four windows fit a day's budget, and those of its escalation nearly"
    days = 1 + (max(scored) - min(scored)) / 86_400
    assert sum(sizes) == pipeline.counters["sample_bytes"] <= limits.bytes_a_day * days
    assert pipeline.counters["samples_over_budget.random"] > 0, "a fifth of all windows is more than half of the budget"

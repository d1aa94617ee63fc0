"""The manual: ours is whole and speaks of things that exist; one that is not whole is one clear line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.advice import manual as manuals
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, default_catalogue
from edge_agent.pipeline import guards

OURS: dict[str, Any] = json.loads(manuals.DEFAULT_PATH.read_bytes())


def test_every_failure_type_has_its_repair_and_safety_sections() -> None:
    manual = manuals.load()
    for failure_type in FAILURE_TYPES:
        of_type = [s for s in manual.sections if failure_type in s.failure_types]
        assert sum(s.kind == "repair" for s in of_type) >= manuals.MIN_SECTIONS
        for severity in SEVERITIES:
            assert any(s.kind == "safety" and severity in s.severities for s in of_type), (failure_type, severity)
            assert any(s.kind == "repair" and severity in s.severities for s in of_type), (failure_type, severity)


def test_every_signal_feature_and_rule_that_the_manual_names_exists() -> None:
    from cloud.advice.advise import stem  # noqa: PLC0415
    from export.features import FeatureGraph  # noqa: PLC0415 - imports torch

    catalogue = default_catalogue()
    source = Path(guards.__file__).read_text()
    features = {stem(name) for name in FeatureGraph(catalogue, WindowSpec()).feature_names}
    known = features | {s.name for s in (*catalogue.scalars, *catalogue.vectors)}
    for section in manuals.load().sections:
        for name in section.signals:
            assert name in known or f'"{name}"' in source, f"{section.id} names {name}"


def test_every_section_that_a_step_points_to_exists() -> None:
    import re  # noqa: PLC0415

    manual = manuals.load()
    ids = {s.id for s in manual.sections}
    for section in manual.sections:
        for line in (*section.steps, section.stop):
            for named in re.findall(r"\b(?:BAT|MOT|INV|THR|CHG|HV|EM)-\d+", line):
                assert named in ids, f"{section.id} points to {named}"
                assert named != section.id or "here" in line, f"{section.id} points to itself"


def duplicate(manual: dict[str, Any]) -> None:
    manual["sections"][3]["id"] = manual["sections"][2]["id"]


def without_steps(manual: dict[str, Any]) -> None:
    del manual["sections"][5]["steps"]


def unknown_type(manual: dict[str, Any]) -> None:
    manual["sections"][20]["failure_types"] = ["flat_tyre"]


def misspelt_field(manual: dict[str, Any]) -> None:
    manual["sections"][20]["tool"] = manual["sections"][20].pop("tools")


def too_few(manual: dict[str, Any]) -> None:
    keep = [s for s in manual["sections"] if not s["id"].startswith("MOT")]
    manual["sections"] = keep + [s for s in manual["sections"] if s["id"] in ("MOT-01", "MOT-02", "MOT-03")]


def no_safety(manual: dict[str, Any]) -> None:
    for section in manual["sections"]:
        if section["kind"] == "safety":
            section["failure_types"] = [t for t in section["failure_types"] if t != "motor_bearing_wear"] or [
                "charging_fault"
            ]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (duplicate, "section EM-03 stands twice"),
        (without_steps, "section HV-02: .*steps"),
        (unknown_type, "section .*-0.: .*flat_tyre"),
        (misspelt_field, "section .*: .*tool"),
        (too_few, "motor_bearing_wear has 3 repair sections; every failure type needs at least 4"),
        (no_safety, "no safety section applies to motor_bearing_wear"),
    ],
)
def test_a_manual_that_is_not_whole_is_refused_in_one_line_that_names_the_place(
    tmp_path: Path, break_it: Callable[[dict[str, Any]], None], said: str
) -> None:
    manual = copy.deepcopy(OURS)
    break_it(manual)
    path = tmp_path / "manual.json"
    path.write_text(json.dumps(manual))
    with pytest.raises(ConfigError, match=said) as caught:
        manuals.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_manual_that_is_absent_or_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        manuals.load(tmp_path / "absent.json")
    data = manuals.DEFAULT_PATH.read_bytes().rstrip()
    for end in range(0, len(data), 997):
        with pytest.raises(ConfigError) as caught:
            manuals.parse(data[:end], "m.json")
        assert "\n" not in str(caught.value)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sections", "title", "id", "x"]), inner)
), max_leaves=8).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_a_manual_or_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        manuals.parse(data, "m.json")

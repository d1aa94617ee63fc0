"""A manifest is refused when it is malformed, not whole, altered, or for something else."""

import json

import pytest

from edge_agent.contract import bundle
from edge_agent.contract.errors import BundleError

ENTRY = {"length": 3, "sha256": "0" * 64}
GOOD: dict[str, object] = {
    "contract_version": "1.0", "release": 1, "name": "n", "created": "t", "state_id": "s", "opset": 17,
    "onnxruntime": "1.32.0", "schema_name": "voltwatch-ev", "signals": [{"name": "Vehicle.Speed", "unit": "km/h"}],
    "heads": ["failure"], "features": ["f"], "states": [{"name": "cell_trend", "shape": [1, "C", 8]}],
    "files": dict.fromkeys(bundle.MEMBERS, ENTRY),
}  # fmt: skip


def parse(**changes: object) -> bundle.Manifest:
    return bundle.parse_manifest(json.dumps(GOOD | changes).encode(), "b")


def test_window_defaults_are_300_frames_of_a_second_every_minute() -> None:
    window = parse().window
    assert (window.frames, window.period_s, window.stride_s, window.vector_frames) == (300, 1.0, 60.0, 30)


@pytest.mark.parametrize(
    "changes",
    [
        {"contract_version": "2.0"}, {"contract_version": "x"}, {"release": 0}, {"release": "1"}, {"signals": []},
        {"signals": [{"name": "a", "unit": ""}, {"name": "a", "unit": ""}]}, {"heads": ["telepathy"]},
        {"files": {"model.onnx": ENTRY}}, {"files": {"../../etc/passwd": ENTRY}},
        {"files": {"model.onnx": {"length": -1, "sha256": "0" * 64}}}, {"window": {"frames": 0}},
        {"states": [{"name": "x", "shape": ["Q"]}]},
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_trusted_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"b/manifest\.json"):
        parse(**changes)


def test_a_file_that_is_absent_or_altered_is_named() -> None:
    manifest = parse()
    found = dict(manifest.files)
    bundle.check_files(manifest, found, "b")
    with pytest.raises(BundleError, match=r"b/model\.onnx: is missing"):
        bundle.check_files(manifest, {k: v for k, v in found.items() if k != "model.onnx"}, "b")
    found["golden.npz"] = bundle.FileEntry(length=3, sha256="1" * 64)
    with pytest.raises(BundleError, match=r"b/golden\.npz: hash does not match"):
        bundle.check_files(manifest, found, "b")


@pytest.mark.parametrize(
    ("known", "make", "says"),
    [
        ({}, "", "another feature set"),
        ({"Vehicle.Speed": "mph"}, "", "'km/h'"),
        ({"Vehicle.Speed": "km/h"}, "zoe", "is for leaf"),
    ],
)
def test_a_bundle_for_another_vehicle_is_refused(known: dict[str, str], make: str, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        bundle.check_compatible(parse(compatible_makes=["leaf"]), known, make, "b")
    bundle.check_compatible(parse(compatible_makes=["leaf"]), {"Vehicle.Speed": "km/h"}, "leaf", "b")


def test_thresholds_and_drift_reference_are_held_against_themselves() -> None:
    policy = {"description": "d", "types": {"x": {"raise_at": 0.5, "clear_below": 0.3}}}
    text = json.dumps({"active": "p", "policies": {"p": policy}}).encode()
    assert bundle.parse_thresholds(text, "b").policy.types["x"].raise_at == 0.5
    with pytest.raises(BundleError, match="active policy"):
        bundle.parse_thresholds(text.replace(b'"active": "p"', b'"active": "q"'), "b")
    for wrong, says in (
        (b'"clear_below": 0.51', "'x' clears below 0.51, above where it is raised"),
        (b'"clear_below": -1e999', "b/thresholds.json"),
        (b'"clear_below": NaN', "b/thresholds.json"),
    ):
        with pytest.raises(BundleError, match=says):
            bundle.parse_thresholds(text.replace(b'"clear_below": 0.3', wrong), "b")
    variable = {"name": "v", "kind": "signal", "edges": [0.0, 1.0], "counts": {"all": [1, 2, 3, 0]}}
    bundle.parse_drift_reference(json.dumps({"variables": [variable]}).encode(), "b")
    variable["counts"] = {"all": [1, 2, 3]}
    with pytest.raises(BundleError, match="do not fit"):
        bundle.parse_drift_reference(json.dumps({"variables": [variable]}).encode(), "b")

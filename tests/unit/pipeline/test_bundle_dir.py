import hashlib
from pathlib import Path

import pytest

from edge_agent.contract import bundle as contract
from edge_agent.contract.errors import BundleError
from edge_agent.pipeline.bundle_dir import load_bundle
from tests.bundles import build_bundle, rewrite_manifest
from tests.telemetry import CATALOGUE, PUMP


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build_bundle(tmp_path / "bundle", CATALOGUE)


def refused(path: Path, *words: str, make: str = "", catalogue=CATALOGUE) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BundleError) as caught:
        load_bundle(path, catalogue, make)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_whole_bundle_is_read(bundle: Path) -> None:
    loaded = load_bundle(bundle, CATALOGUE)
    assert loaded.manifest.release == 1
    assert loaded.sha256 == hashlib.sha256((bundle / contract.MANIFEST).read_bytes()).hexdigest()
    assert loaded.model_bytes == (bundle / contract.MODEL).read_bytes()
    assert loaded.thresholds.policy.types.keys() == set(loaded.manifest.failure_types)


def test_any_flipped_bit_of_the_model_is_refused(bundle: Path) -> None:
    model = bundle / contract.MODEL
    good = model.read_bytes()
    for at in range(0, len(good), 97):
        model.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused(bundle, "model.onnx", "hash does not match the manifest")


def test_any_truncated_model_is_refused(bundle: Path) -> None:
    model = bundle / contract.MODEL
    good = model.read_bytes()
    for length in range(0, len(good), 211):
        model.write_bytes(good[:length])
        refused(bundle, "model.onnx")


@pytest.mark.parametrize("name", contract.MEMBERS)
def test_a_missing_member_is_refused_by_name(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, name, "missing")


def test_a_member_of_another_release_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = build_bundle(tmp_path / "other", CATALOGUE, release=2, signals=CATALOGUE.scalar_names[:5])
    (bundle / contract.MODEL).write_bytes((other / contract.MODEL).read_bytes())
    refused(bundle, "hash")


def test_no_directory_and_no_manifest_are_said_plainly(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent", "no such bundle directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "manifest.json", "cannot be read")


def test_a_path_in_the_manifest_that_leaves_the_bundle_is_refused(bundle: Path) -> None:
    manifest = contract.parse_manifest((bundle / contract.MANIFEST).read_bytes(), "")
    files = {k: {"length": v.length, "sha256": v.sha256} for k, v in manifest.files.items()}
    rewrite_manifest(bundle, files=files | {"../secret": {"length": 0, "sha256": "0" * 64}})
    refused(bundle, "manifest.json")


def test_a_model_over_the_size_limit_is_refused_before_it_is_read_whole(bundle: Path) -> None:
    with (bundle / contract.MODEL).open("wb") as stream:
        stream.truncate(contract.MAX_MODEL_BYTES + 1)
    refused(bundle, "larger than")


def test_a_bundle_for_another_schema_make_or_major_version_is_refused(bundle: Path) -> None:
    refused(bundle, "another feature set", catalogue=PUMP)
    rewrite_manifest(bundle, compatible_makes=["one", "two"])
    refused(bundle, "'three'", make="three")
    assert load_bundle(bundle, CATALOGUE, "two").manifest.release == 1
    rewrite_manifest(bundle, contract_version="2.0")
    refused(bundle, "2.0")

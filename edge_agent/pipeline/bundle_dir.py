"""Read a bundle from its directory, and hold every byte against the manifest.

Promises: what is returned was hashed in memory, so nothing can change between the check and the use; a file over its
size limit is refused before it is read; every fault is a `BundleError` with one line. One in ten single-bit flips of a
model loads and answers wrongly (design section 4), hence the hash at every load. What may run where is the contract's
business (`check_compatible`); running it is `inference`'s.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract import bundle as contract
from edge_agent.contract.bundle import DriftReference, FileEntry, Manifest, Thresholds
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import Catalogue

MAX_DOCUMENT_BYTES = 4 * 2**20  # manifest, thresholds, reference and card are some 100 kB at most
MAX_GOLDEN_BYTES = 64 * 2**20  # some dozen windows with their cells, uncompressed


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A verified bundle. `sha256` is the manifest's, and by its hashes the whole bundle's identity."""

    path: Path
    manifest: Manifest
    thresholds: Thresholds
    drift_reference: DriftReference
    model_bytes: bytes
    sha256: str

    @property
    def drift_reference_sha256(self) -> str:
        """Identity of the bins: counts against other bins never mix."""
        return self.manifest.files[contract.DRIFT_REFERENCE].sha256


def load_bundle(path: Path | str, catalogue: Catalogue, make: str = "") -> LoadedBundle:
    """Read and verify the bundle in directory `path` for a vehicle of `make` ("" = not known: every make is accepted).

    Raises `BundleError` when it is absent, incomplete, altered, malformed, or not for this catalogue or make.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"{path}: no such bundle directory; build one with `model-export build` or give another path")
    manifest_bytes = _read(path / contract.MANIFEST, MAX_DOCUMENT_BYTES)
    manifest = contract.parse_manifest(manifest_bytes, str(path))
    contents: dict[str, bytes] = {}
    found: dict[str, FileEntry] = {}
    for name in manifest.files:
        file = path / name
        if file.is_file():
            data = _read(file, size_limit(name))
            found[name] = FileEntry(length=len(data), sha256=hashlib.sha256(data).hexdigest())
            contents[name] = data
    contract.check_files(manifest, found, str(path))
    contract.check_compatible(manifest, {s.name: s.unit for s in catalogue}, make, str(path))
    thresholds = contract.parse_thresholds(contents[contract.THRESHOLDS], str(path))
    _check_thresholds(manifest, thresholds, path)
    return LoadedBundle(
        path,
        manifest,
        thresholds,
        contract.parse_drift_reference(contents[contract.DRIFT_REFERENCE], str(path)),
        contents[contract.MODEL],
        hashlib.sha256(manifest_bytes).hexdigest(),
    )


def _check_thresholds(manifest: Manifest, thresholds: Thresholds, path: Path) -> None:
    policy = thresholds.policy
    unknown = sorted(set(policy.types) - set(manifest.failure_types))
    if unknown:
        raise BundleError(
            f"{path}/{contract.THRESHOLDS}: threshold for {unknown[0]!r}, which the bundle does not score"
        )
    if "type" in manifest.heads:
        absent = sorted(set(manifest.failure_types) - set(policy.types))
        if absent:
            raise BundleError(f"{path}/{contract.THRESHOLDS}: active policy has no threshold for {', '.join(absent)}")


def size_limit(name: str) -> int:
    """Return how many bytes a member of a bundle may have."""
    return {contract.MODEL: contract.MAX_MODEL_BYTES, contract.GOLDEN: MAX_GOLDEN_BYTES}.get(name, MAX_DOCUMENT_BYTES)


def _read(file: Path, limit_bytes: int) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(data) > limit_bytes:
        raise BundleError(f"{file}: is larger than {limit_bytes} bytes; this is not one of our bundles")
    return data

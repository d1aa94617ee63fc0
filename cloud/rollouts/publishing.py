"""From a bundle's directory to a published release: verified first, then packed, then signed.

What a vehicle would refuse is refused here: a file altered, a graph that does not load or gives other answers than its
golden vectors, a name that is no file name.
"""

import re
from pathlib import Path

from cloud.rollouts.archive import pack
from cloud.rollouts.repository import ModelRepository, Release, Signers
from edge_agent.contract import bundle as contract
from edge_agent.contract.errors import BundleError
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline import golden
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.inference import Scorer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)


def verified(bundle: Path, catalogue: Catalogue) -> LoadedBundle:
    """Load a bundle and replay its golden vectors through its graph. Raises `BundleError`, one line."""
    loaded = load_bundle(bundle, catalogue)
    if not NAME.fullmatch(loaded.manifest.name):
        raise BundleError(f"{bundle}: name {loaded.manifest.name[:80]!a} cannot be a file's; build it with another")
    text = (bundle / contract.GOLDEN).read_bytes()
    golden.replay(Scorer(loaded, catalogue).session, text, str(bundle / contract.GOLDEN))
    return loaded


def publish(
    repository: ModelRepository, bundle: Path, catalogue: Catalogue, signers: Signers, *, counter: int | None = None
) -> Release:
    """Publish a bundle under `counter`, by default one above the highest.

    Raises `BundleError` for an unfit bundle, `ConfigError` for a counter that is not above all, and for missing keys.
    """
    loaded = verified(bundle, catalogue)
    manifest = loaded.manifest
    if counter is None:
        counter = max((r.counter for r in repository.releases()), default=0) + 1
    custom = {
        "counter": counter, "release": manifest.release, "name": manifest.name, "state_id": manifest.state_id,
        "contract_version": manifest.contract_version, "compatible_makes": list(manifest.compatible_makes),
        "manifest_sha256": loaded.sha256,
    }  # fmt: skip
    target = f"bundles/{manifest.name}-{counter}.tar"
    return repository.publish(pack(loaded.path), custom, target, signers)

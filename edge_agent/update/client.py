"""The signed repository as a vehicle sees it: TUF's client with the embedded root, and a time it can rely on.

Promises: what `look` returns was verified from the root that the vehicle was built with, is not expired at the latest
time that is known (the wall clock, or signed time where that clock is behind it), and is not older than what was seen
before. Every way in which that can fail is an `UpdateError` with its code. This file and `download` are the only ones
that import TUF; the agent imports neither.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from tuf.api import exceptions
from tuf.api.metadata import Root, Signed, TargetFile, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from edge_agent.update import files
from edge_agent.update.download import plain_words
from edge_agent.update.floor import Floor
from edge_agent.update.outcome import Reason, UpdateError

LIMITS = UpdaterConfig(  # ours are some kB each; a year of weekly releases makes 30 kB of targets
    max_root_rotations=256, max_delegations=0, root_max_length=64_000, timestamp_max_length=16_384,
    snapshot_max_length=64_000, targets_max_length=2_000_000,
)  # fmt: skip


class Custom(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed with a release (docs/adr/0090); unknown fields are of a newer repository."""

    counter: Annotated[int, Meta(ge=1, le=2**53)]
    release: int
    name: str
    state_id: str
    contract_version: str
    compatible_makes: tuple[str, ...]
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class SignedRelease:
    """One signed release. `path` is its file below the repository's targets/ (with its hash: consistent snapshots)."""

    target: str
    path: str
    length: int
    sha256: str
    custom: Custom


class _Client(Updater):
    """TUF's client, for which it is `wall_s` or the latest signed time, whichever is later."""

    wall_s = 0.0
    floor = Floor()

    def _load_root(self) -> None:
        """Follow the root's changes first: which keys have said the floor is known only then (TUF 5.3, then 5.4)."""
        super()._load_root()
        root = self._trusted_set.root
        at_s = max(self.wall_s, self.floor.known_by(root.roles[Timestamp.type].keyids), _signed_s(root))
        # TUF's client takes the operating system's time, as an attribute that tests replace; 5.3.10 leaves it to us
        self._trusted_set.reference_time = datetime.fromtimestamp(at_s, UTC)

    @property
    def root(self) -> Root:
        """The newest root that is trusted."""
        return self._trusted_set.root

    @property
    def time(self) -> datetime:
        """The time it went by."""
        return self._trusted_set.reference_time

    @property
    def timestamp(self) -> Timestamp:
        """The verified timestamp."""
        return self._trusted_set.timestamp


class Repository:
    """The repository at `url`, trusted by `root` (bytes of a root's metadata). `folder` keeps what was seen.

    Raises `UpdateError` where `root` itself is no root.
    """

    def __init__(
        self, url: str, root: bytes, folder: Path, fetcher: FetcherInterface, *, wall_s: float, floor: Floor
    ) -> None:
        self._folder = folder
        self.url = url.rstrip("/") + "/"
        folder.mkdir(exist_ok=True)
        with self._refusals("update.root"):
            self._client = _Client(str(folder), self.url + "metadata/", fetcher=fetcher, config=LIMITS, bootstrap=root)
        self._client.wall_s, self._client.floor = wall_s, floor

    def refresh(self) -> Floor:
        """Fetch and verify what is new. Returns the floor as the verified timestamp raises it. Raises `UpdateError`."""
        with self._refusals(self.url):
            self._client.refresh()
            files.sync_tree(self._folder)  # its files are what rollback is known by
        keys = self._client.root.roles[Timestamp.type].keyids
        return self._client.floor.raised(_signed_s(self._client.timestamp), keys)

    def look(self, target: str) -> SignedRelease:
        """Return the signed release `target`. Raises `UpdateError` (not_found, tampered)."""
        with self._refusals(self.url):
            found = self._client.get_targetinfo(target)
        if found is None:
            raise UpdateError("not_found", f"{target}: is not among the signed releases")
        return _release(found)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Turn TUF's errors into ours."""
        try:
            yield
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            reason, words = _reason(error)
            if reason == "expired":
                words = f"{error}; it is {self._client.time:%Y-%m-%d %H:%M} by the clock or by what was signed"
            raise UpdateError(reason, words if what in words else f"{what}: {words}") from error


_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (exceptions.ExpiredMetadataError, "expired"),
    (exceptions.BadVersionNumberError, "rollback"),
    (exceptions.UnsignedMetadataError, "unsigned"),
    (exceptions.LengthOrHashMismatchError, "tampered"),
    (exceptions.DownloadLengthMismatchError, "oversize"),
    (exceptions.SlowRetrievalError, "slow"),
    (exceptions.DownloadError, "network"),
    (exceptions.RepositoryError, "tampered"),
)


def _reason(error: Exception) -> tuple[Reason, str]:
    reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
    cause = error.__cause__
    words = str(error) or (str(cause) if cause is not None else type(error).__name__)
    if reason == "network" and cause is not None:
        words = f"{words}: {plain_words(error)}"
    return reason, words[:300]


def _release(found: TargetFile) -> SignedRelease:
    try:
        custom = msgspec.convert(found.custom or {}, Custom)
        sha256 = found.hashes["sha256"]
    except (msgspec.ValidationError, KeyError) as error:
        raise UpdateError("foreign", f"{found.path}: is no release of ours: {error}") from error
    folder, _, name = found.path.rpartition("/")
    return SignedRelease(found.path, f"{folder}/{sha256}.{name}".lstrip("/"), found.length, sha256, custom)


def _signed_s(part: Signed) -> float:
    """Return when a verified part says it was signed, never after its own end; 0 where it does not say."""
    said = part.unrecognized_fields.get("signed_at", 0)
    return min(float(said), part.expires.timestamp()) if isinstance(said, int) else 0.0

"""The TUF repository of releases on a disk: made, published into, renewed and read. Serving it is `cloud.api`'s.

    metadata/N.root.json  N.targets.json  N.snapshot.json  timestamp.json
    targets/bundles/SHA256.NAME-COUNTER.tar

Promises: every file is whole or absent, and timestamp.json, written last and by one rename, is what makes a publication
happen: a crash before it leaves the repository as it was. Two writers take turns. What is current is known from the
timestamp down, never from which files lie there. Every signed part carries `signed_at` (Unix seconds), by which a
vehicle without a clock learns the earliest time it can be.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Role, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from cloud.identity import durable
from cloud.identity.durable import PUBLIC, Content
from edge_agent.contract.errors import ConfigError

LIFE = {  # docs/adr/0090
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=365),
    Snapshot.type: timedelta(days=7),
    Timestamp.type: timedelta(days=1),
}
ONLINE = (Timestamp.type, Snapshot.type)
T = TypeVar("T", Root, Targets, Snapshot, Timestamp)
Signers = Mapping[str, CryptoSigner]  # by key id


class Release(NamedTuple):
    """One published release, as its target's signed `custom` says it."""

    target: str
    counter: int
    release: int
    name: str
    state_id: str
    contract_version: str
    compatible_makes: tuple[str, ...]
    manifest_sha256: str
    length: int
    sha256: str


class RoleState(NamedTuple):
    """One role's version, and when it ends."""

    role: str
    version: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class Current:
    """What the timestamp makes current, as the files here say it; it is vehicles that verify."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]


class ModelRepository:
    """The repository in `folder`. `wall` is the clock that expiries are counted from, Unix seconds."""

    def __init__(self, folder: Path, *, wall: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._metadata = folder / "metadata"
        self._wall = wall

    # Made and published -----------------------------------------------------------------------------------------

    def create(self, signers: Mapping[str, list[CryptoSigner]], *, threshold: int) -> Path:
        """Make an empty repository; `signers` by role, `threshold` for the root. Returns the root to give to vehicles.

        Raises `ConfigError` when there is one already, or for a threshold that the root keys cannot reach.
        """
        if (self._metadata / "1.root.json").exists():
            raise ConfigError(f"repository {self.folder}: exists already; nothing was changed")
        if not 1 <= threshold <= len(signers[Root.type]):
            raise ConfigError(f"root threshold {threshold}: there are {len(signers[Root.type])} root keys")
        with self._writing(make=True):
            self._metadata.mkdir(mode=0o755, exist_ok=True)
            (self.folder / "targets" / "bundles").mkdir(mode=0o755, parents=True, exist_ok=True)
            root = Root(consistent_snapshot=True)
            for role, of_role in signers.items():
                for signer in of_role:
                    root.add_key(signer.public_key, role)
            root.roles[Root.type].threshold = threshold
            every = {s.public_key.keyid: s for of_role in signers.values() for s in of_role}
            targets, snapshot, timestamp = Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp())
            # root last: without it there is no repository, and `create` may be run again
            self._store(targets, root, every, version=1)
            self._store(snapshot, root, every, version=1)
            self._store(timestamp, root, every, version=1)
            self._store(Metadata(root), root, every, version=1)
        return self._metadata / "1.root.json"

    def publish(self, archive: bytes, custom: Mapping[str, Any], target: str, signers: Signers) -> Release:
        """Publish one release, signed with the targets, snapshot and timestamp keys among `signers`.

        Raises `ConfigError` for a counter that is not above every one before, or for keys that are missing.
        """
        with self._writing():
            current = self.current()
            highest = max((r.counter for r in self._releases(current)), default=0)
            if custom["counter"] <= highest:
                raise ConfigError(
                    f"counter {custom['counter']}: the repository has {highest} already; the next is {highest + 1}"
                )
            for role in (Targets.type, *ONLINE):
                self._check_keys(current.root.signed, role, signers)
            entry = TargetFile.from_data(target, archive, ["sha256"])
            entry.unrecognized_fields["custom"] = dict(custom)
            path = self.folder / "targets" / entry.get_prefixed_paths()[0]
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            durable.replace(path, Content(archive, PUBLIC))
            current.targets.signed.targets[target] = entry
            self._sign_chain(current, signers)
        return _release(entry)

    def withdraw(self, counter: int, signers: Signers) -> Release:
        """Take a release out of the signed list; its counter is not used again. Raises `ConfigError` if it is unknown.

        The newest cannot be withdrawn: the repository would forget its counter. Publish its successor first.
        """
        with self._writing():
            current = self.current()
            releases = self._releases(current)
            found = next((r for r in releases if r.counter == counter), None)
            if found is None or counter == max(r.counter for r in releases):
                what = "is not published" if found is None else "is the newest; publish its successor first"
                raise ConfigError(f"counter {counter}: {what}")
            for role in (Targets.type, *ONLINE):
                self._check_keys(current.root.signed, role, signers)
            del current.targets.signed.targets[found.target]
            self._sign_chain(current, signers)
        return found

    def rotate(self, role: str, fresh: CryptoSigner, signers: Signers) -> int:
        """Replace the keys of a role by one fresh key (for root: add it, and drop the first). Returns the root version.

        The new root is signed by the old root keys and the new ones (TUF 6.1); what the role itself signs is signed
        again; a vehicle forgets the versions that revoked keys have signed, however far they were pushed (5.3.11).
        Raises `ConfigError` for missing keys.
        """
        with self._writing():
            current = self.current()
            old = current.root.signed
            every = {**signers, fresh.public_key.keyid: fresh}
            for needed in {Root.type, Targets.type, *ONLINE} - {role}:
                self._check_keys(old, needed, every)
            root = Metadata.from_bytes(current.root.to_bytes()).signed
            if not isinstance(root, Root):
                raise TypeError("the root is no root")
            gone = root.roles[role].keyids[:1] if role == Root.type else list(root.roles[role].keyids)
            for keyid in gone:
                root.revoke_key(keyid, role)
            root.add_key(fresh.public_key, role)
            self._store(Metadata(root), root, every, version=old.version + 1, also=old.roles[Root.type])
            rotated = Current(Metadata(root), current.timestamp, current.snapshot, current.targets)
            self._sign_chain(rotated, every)
        return root.version

    def renew(self, signers: Signers, *, force: bool = False) -> tuple[str, ...]:
        """Sign snapshot and timestamp again where half of their life is over; returns the roles that were.

        Raises `ConfigError` for missing keys, and where root or targets have expired: they need the offline keys.
        """
        with self._writing():
            current = self.current()
            now = self.now()
            due = [r for r in ONLINE if force or self._expires(current, r) - now < LIFE[r] / 2]
            for role in ONLINE if due else ():
                self._check_keys(current.root.signed, role, signers)
            if not due:
                return ()
            root = current.root.signed
            if Snapshot.type in due:
                self._store(current.snapshot, root, signers, version=current.snapshot.signed.version + 1)
                current.timestamp.signed.snapshot_meta.version = current.snapshot.signed.version
            self._store(current.timestamp, root, signers, version=current.timestamp.signed.version + 1)
            return (Snapshot.type, Timestamp.type) if Snapshot.type in due else (Timestamp.type,)

    # Read -------------------------------------------------------------------------------------------------------

    def current(self) -> Current:
        """Read what is current. Raises `ConfigError` when there is no repository, or a file of it is no use."""
        version = 1
        if not (self._metadata / "1.root.json").is_file():
            raise self._none()
        while (self._metadata / f"{version + 1}.root.json").is_file():
            version += 1
        root = self._load(f"{version}.root.json", Root)
        timestamp = self._load("timestamp.json", Timestamp)
        snapshot = self._load(f"{timestamp.signed.snapshot_meta.version}.snapshot.json", Snapshot)
        targets = self._load(f"{snapshot.signed.meta['targets.json'].version}.targets.json", Targets)
        return Current(root, timestamp, snapshot, targets)

    def releases(self) -> list[Release]:
        """Return what is published, the newest counter first. Raises `ConfigError` like `current`."""
        return self._releases(self.current())

    def roles(self) -> list[RoleState]:
        """Return each role's version and expiry. Raises `ConfigError` like `current`."""
        current = self.current()
        parts = (current.root, current.targets, current.snapshot, current.timestamp)
        return [RoleState(m.signed.type, m.signed.version, m.signed.expires) for m in parts]

    def _releases(self, current: Current) -> list[Release]:
        found = [_release(entry) for entry in current.targets.signed.targets.values()]
        return sorted(found, key=lambda release: -release.counter)

    # The files --------------------------------------------------------------------------------------------------

    def _sign_chain(self, current: Current, signers: Signers) -> None:
        """Sign targets, snapshot and timestamp anew, in that order: the last write is the publication."""
        root = current.root.signed
        targets, snapshot, timestamp = current.targets, current.snapshot, current.timestamp
        self._store(targets, root, signers, version=targets.signed.version + 1)
        snapshot.signed.meta["targets.json"] = MetaFile(targets.signed.version)
        self._store(snapshot, root, signers, version=snapshot.signed.version + 1)
        timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        self._store(timestamp, root, signers, version=timestamp.signed.version + 1)

    def _store(
        self, metadata: Metadata[T], root: Root, signers: Signers, *, version: int, also: Role | None = None
    ) -> None:
        signed: Signed = metadata.signed
        signed.version = version
        signed.expires = (self.now() + LIFE[signed.type]).replace(microsecond=0)
        signed.unrecognized_fields["signed_at"] = int(self._wall())
        wanted = list(root.roles[signed.type].keyids) + (also.keyids if also else [])
        metadata.signatures.clear()
        for keyid in dict.fromkeys(wanted):
            if keyid in signers:
                metadata.sign(signers[keyid], append=True)
        root.verify_delegate(signed.type, metadata.signed_bytes, metadata.signatures)
        name = f"{signed.type}.json" if signed.type == Timestamp.type else f"{version}.{signed.type}.json"
        durable.replace(self._metadata / name, Content(metadata.to_bytes(JSONSerializer(compact=True)), PUBLIC))

    def _load(self, name: str, kind: type[T]) -> Metadata[T]:
        path = self._metadata / name
        try:
            metadata: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
        except (OSError, RepositoryError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"repository {path}: cannot be read: {str(reason).splitlines()[0][:160]}") from error
        if not isinstance(metadata.signed, kind):
            raise ConfigError(f"repository {path}: is not of the role {kind.type}")
        return metadata

    def _check_keys(self, root: Root, role: str, signers: Signers) -> None:
        wanted = root.roles[role]
        here = [k for k in wanted.keyids if k in signers]
        if len(here) < wanted.threshold:
            raise ConfigError(
                f"keys: {len(here)} of the {wanted.threshold} needed for {role} are here "
                f"(the repository's root knows {', '.join(k[:12] + '…' for k in wanted.keyids)})"
            )

    def _expires(self, current: Current, role: str) -> datetime:
        return (current.timestamp if role == Timestamp.type else current.snapshot).signed.expires

    def now(self) -> datetime:
        """Return the time by its clock."""
        return datetime.fromtimestamp(self._wall(), UTC)

    @contextlib.contextmanager
    def _writing(self, *, make: bool = False) -> Iterator[None]:
        """Hold the repository against another writer: the server's renewal and a publication take turns.

        Raises `UnavailableError` where the disk refuses; what is current is then what it was.
        """
        if not make and not (self._metadata / "1.root.json").is_file():
            raise self._none()
        with durable.locked(self.folder):
            durable.sweep(self.folder, self.folder / "targets")
            yield

    def _none(self) -> ConfigError:
        return ConfigError(f"repository {self.folder}: there is none; make it with `fleet-cloud models init`")


def _release(entry: TargetFile) -> Release:
    custom = entry.custom or {}
    return Release(
        target=entry.path, counter=int(custom["counter"]), release=int(custom["release"]), name=str(custom["name"]),
        state_id=str(custom["state_id"]), contract_version=str(custom["contract_version"]),
        compatible_makes=tuple(custom["compatible_makes"]), manifest_sha256=str(custom["manifest_sha256"]),
        length=entry.length, sha256=entry.hashes["sha256"],
    )  # fmt: skip

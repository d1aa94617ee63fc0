"""One run of the updater: which release is wanted, fetched, tried, and put into the free slot.

The order is what makes it safe: nothing is downloaded that is not signed, newer and for this vehicle; nothing is
unpacked whose hash is not the signed one; nothing is loaded that is not whole; nothing comes into a slot that was not
loaded by a process that may die of it; and the one step that makes an agent run it is the rename of the pointer. The
deciding slot is never touched, so that the run may be killed anywhere.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge_agent.config import Config
from edge_agent.contract import bundle as contract
from edge_agent.contract import messages
from edge_agent.contract.errors import BundleError, MessageError
from edge_agent.contract.messages import Desired
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.update import archive, files, first_load, floor, slots
from edge_agent.update.client import Repository, SignedRelease
from edge_agent.update.download import Fetcher, fetch_target, plain_words
from edge_agent.update.graph_check import check_graph
from edge_agent.update.outcome import BAD, UpdateError, UpdateResult
from edge_agent.update.slots import Installed, Last

FOLDER = "model"  # below data_dir
LOCK = ".updating"
STAGING, METADATA = "staging", "metadata"
SPARE_BYTES = 8 * 2**20  # left on the disk beside an installation, for the agent's queue and state
POLL_MAX_BYTES = messages.MAX_MESSAGE_BYTES


class Installation:
    """One run for one vehicle. `wall_s` is the system's clock, believed only as far as `client` says."""

    def __init__(self, config: Config, catalogue: Catalogue, *, wall_s: float) -> None:
        self._config = config
        self._update = config.update
        self._catalogue = catalogue
        self._wall_s = wall_s
        self._folder = Path(config.data_dir) / FOLDER
        self._staging = self._folder / STAGING
        self._fetcher = Fetcher(config.update)
        self._fresh_s: float | None = None
        self.committing: Callable[[], None] = lambda: None  # called before the switch: from here on no alarm may ring

    def run(self, desired: Desired | None) -> UpdateResult:
        """Install `desired`, or what the cloud answers when it is asked. Never raises for what lies outside.

        What a release is refused for is remembered; a release that is to blame for it is not fetched again.
        """
        wanted = desired
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if wanted is None:
                    wanted = self._poll()
                    if wanted is None:
                        return UpdateResult(ending="nothing", fresh_s=self._fresh_s)
                return self._install(wanted)
        except UpdateError as error:
            return self._refused(error, wanted)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return self._refused(UpdateError("disk", f"{where}{error.strerror or error}"), wanted)

    def _install(self, wanted: Desired) -> UpdateResult:
        known = slots.read(self._folder)
        done = self._judge(known, wanted.counter)
        if done is not None:
            return msgspec.structs.replace(done, target=wanted.target, rollout_id=wanted.rollout_id)
        self._sweep()
        repository = self._repository()
        learnt = repository.refresh()
        floor.write(self._folder, learnt)
        self._fresh_s = learnt.floor_s
        release = repository.look(wanted.target)
        self._check_signed(release, wanted)
        bundle = self._fetch(repository, release)
        try:
            content = self._try(bundle, release, wanted)
        except UpdateError:
            shutil.rmtree(bundle, ignore_errors=True)
            raise
        return self._switch(bundle, content)

    # Which ------------------------------------------------------------------------------------------------------

    def _judge(self, known: slots.Slots, counter: int) -> UpdateResult | None:
        """Return the answer where the slots alone give it; None where there is something to install."""
        for slot in (known.active, known.candidate):
            content = known.installed(slot)
            if content is not None and content.counter == counter:
                return UpdateResult(ending="current", counter=counter, slot=slot, release=content.release,
                                    name=content.name, sha256=content.sha256)  # fmt: skip
        if counter in known.bad:
            raise UpdateError("bad_before", f"counter {counter} was tried here and failed: {known.bad[counter]}")
        least = max(known.highest, self._update.min_counter)
        if counter < least:
            raise UpdateError("rollback", f"counter {counter} is older than {least}, which this vehicle has had")
        if not slots.may_install(known):
            raise UpdateError("busy", f"another release is on trial ({known.phase})")
        return None

    def _poll(self) -> Desired | None:
        """Ask the cloud over HTTP which release is wanted; None when it wants none."""
        url = self._update.desired
        if not url:
            base, found, _ = self._update.repository.partition("/v1/models/repository")
            if not found:
                return None
            url = f"{base}/v1/vehicles/{self._config.vehicle_id}/model/desired"
        try:
            body = self._fetcher.download_bytes(url, POLL_MAX_BYTES)
        except Exception as error:
            if getattr(error, "status_code", None) == 404:
                return None
            raise UpdateError("network", f"{url}: {plain_words(error)}") from error
        try:
            return messages.decode_desired(body) if body else None
        except MessageError as error:
            raise UpdateError("mismatch", f"{url}: {error}") from error

    def _check_signed(self, release: SignedRelease, wanted: Desired) -> None:
        custom, update = release.custom, self._update
        if custom.counter != wanted.counter:
            raise UpdateError(
                "mismatch", f"{release.target}: counter {wanted.counter} is asked for, {custom.counter} is signed"
            )
        make = self._config.make
        if custom.compatible_makes and make and make not in custom.compatible_makes:
            raise UpdateError(
                "foreign", f"{release.target}: is for {', '.join(custom.compatible_makes)}; this vehicle is {make!r}"
            )
        if custom.contract_version.split(".")[0] != contract.CONTRACT_VERSION.split(".", maxsplit=1)[0]:
            raise UpdateError(
                "foreign",
                f"{release.target}: contract {custom.contract_version!r}; this agent has {contract.CONTRACT_VERSION}",
            )
        if release.length > update.max_bytes:
            raise UpdateError(
                "oversize", f"{release.target}: has {release.length} bytes, update.max_bytes is {update.max_bytes}"
            )
        disk = os.statvfs(self._folder)
        needed = 2 * release.length + SPARE_BYTES  # the archive and what it holds
        if disk.f_bavail * disk.f_frsize < needed:
            raise UpdateError("disk", f"{self._folder}: {needed} bytes are needed, fewer are free")

    # From the network to the staging area ------------------------------------------------------------------------

    def _repository(self) -> Repository:
        update = self._update
        root = Path(update.root).read_bytes()
        return Repository(
            update.repository, root, self._folder / METADATA, self._fetcher, wall_s=self._wall_s,
            floor=floor.read(self._folder),
        )  # fmt: skip

    def _fetch(self, repository: Repository, release: SignedRelease) -> Path:
        """Fetch and unpack; returns the folder in the staging area."""
        partial = self._staging / f"{release.sha256}.part"
        for other in self._staging.iterdir():
            if other != partial:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        url = f"{repository.url}targets/{release.path}"
        fetch_target(self._fetcher, url, partial, length=release.length, sha256=release.sha256)
        bundle = self._staging / "bundle"
        archive.unpack(partial, bundle)
        partial.unlink()
        return bundle

    def _sweep(self) -> None:
        """Make the staging area; half an installation of before is not gone on with, but a download is."""
        self._staging.mkdir(exist_ok=True)
        for left in self._staging.iterdir():
            if left.is_dir():
                shutil.rmtree(left)

    # From the staging area to a slot ----------------------------------------------------------------------------

    def _try(self, bundle: Path, release: SignedRelease, wanted: Desired) -> Installed:
        manifest_bytes = (bundle / contract.MANIFEST).read_bytes()
        try:
            manifest = contract.parse_manifest(manifest_bytes, release.target)
            known = {signal.name: signal.unit for signal in self._catalogue}
            try:
                contract.check_compatible(manifest, known, self._config.make, release.target)
            except BundleError as error:
                raise UpdateError("foreign", str(error)) from error
            loaded = load_bundle(bundle, self._catalogue, self._config.make)
        except BundleError as error:
            raise UpdateError("malformed", str(error).replace(str(bundle), release.target)) from error
        custom = release.custom
        said = (custom.manifest_sha256, custom.release, custom.name, custom.state_id)
        if said != (loaded.sha256, manifest.release, manifest.name, manifest.state_id):
            raise UpdateError("malformed", f"{release.target}: its manifest is not the one that is signed with it")
        check_graph(loaded.model_bytes)
        update = self._update
        first_load.try_load(
            first_load.Trial(
                bundle=str(bundle), schema=self._config.schema, make=self._config.make,
                memory_bytes=update.memory_bytes, load_s=update.load_s, window_s=update.window_s,
            )
        )  # fmt: skip
        return Installed(
            target=release.target, counter=custom.counter, release=manifest.release, name=manifest.name,
            state_id=manifest.state_id, sha256=loaded.sha256, rollout_id=wanted.rollout_id,
        )  # fmt: skip

    def _switch(self, bundle: Path, content: Installed) -> UpdateResult:
        self.committing()
        files.sync_tree(bundle)
        with slots.held(self._folder):
            known = slots.read(self._folder)  # the agent may have moved on while this ran
            if not slots.may_install(known):
                raise UpdateError("busy", f"another release is on trial ({known.phase})")
            slot = known.free
            place = self._folder / slot
            if place.exists():
                place.rename(self._staging / "old")
            bundle.rename(place)
            files.sync_folder(self._folder)
            slots.write(self._folder, slots.install(known, slot, content))  # from here on it is installed
        for left in self._staging.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        return UpdateResult(
            ending="installed", target=content.target, counter=content.counter, rollout_id=content.rollout_id,
            slot=slot, release=content.release, name=content.name, sha256=content.sha256, fresh_s=self._fresh_s,
        )  # fmt: skip

    # How it ended -----------------------------------------------------------------------------------------------

    def _refused(self, error: UpdateError, wanted: Desired | None) -> UpdateResult:
        result = UpdateResult(
            ending=error.ending, reason=error.reason, detail=str(error)[:500], fresh_s=self._fresh_s,
            target=wanted.target if wanted else "", counter=wanted.counter if wanted else None,
            rollout_id=wanted.rollout_id if wanted else "",
        )  # fmt: skip
        if error.reason in BAD and wanted is not None:
            last = Last(
                state="refused", target=wanted.target, counter=wanted.counter, reason=error.reason,
                detail=result.detail, rollout_id=wanted.rollout_id,
            )  # fmt: skip
            with contextlib.suppress(OSError), slots.held(self._folder):  # else it is fetched once more
                slots.write(self._folder, slots.refuse(slots.read(self._folder), last, bad=True))
        return result

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the model's folder against another updater. Raises `UpdateError` (busy)."""
        with (self._folder / LOCK).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UpdateError("busy", f"{self._folder}: another update is running") from error
            yield

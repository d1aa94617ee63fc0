"""Attacks on releases over the air, by the names of Uptane and TUF: a real repository, real HTTP, a vehicle's updater.

Each attacker has what the attack's name says, and no more. What must hold: the vehicle refuses with a reason, what
decides on it goes on, and where a recovery is foreseen it recovers.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from cloud.rollouts import keys
from cloud.rollouts.archive import NAMES, pack
from edge_agent.contract import bundle as contract
from edge_agent.update import archive, download
from edge_agent.update.outcome import UpdateError
from tests.releases import DAY_S, NOW_S, Publisher, Server, Vehicle, refusal, shop, tar_of

MAX_VERSION = 2**31 - 1


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[tuple[Publisher, Server]]:
    with shop(tmp_path) as made:
        yield made


@pytest.fixture
def publisher(cloud: tuple[Publisher, Server]) -> Publisher:
    return cloud[0]


@pytest.fixture
def server(cloud: tuple[Publisher, Server]) -> Server:
    return cloud[1]


@pytest.fixture
def vehicle(cloud: tuple[Publisher, Server], tmp_path: Path) -> Vehicle:
    return Vehicle(tmp_path / "vehicle", cloud[1].url, cloud[0].root)


def nothing(_: Metadata[Any]) -> None:
    pass


def installed(vehicle: Vehicle) -> int | None:
    known = vehicle.known
    content = known.installed(known.candidate or known.active)
    return content.counter if content else None


def test_a_signed_release_is_installed_and_said_with_its_hash(publisher: Publisher, vehicle: Vehicle) -> None:
    release = publisher.publish()
    result = vehicle.update(release)
    assert (result.ending, result.counter, result.slot) == ("installed", 1, "a")
    assert result.sha256 == release.manifest_sha256
    assert vehicle.update(release).ending == "current"
    assert vehicle.known.phase == "staged"
    assert not list((vehicle.model / "staging").iterdir())


# 35. Arbitrary software ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_unsigned_metadata_is_refused(publisher: Publisher, vehicle: Vehicle, name: str) -> None:
    release = publisher.publish()
    publisher.rewrite(name, lambda m: m.signatures.clear())
    refusal(vehicle.update(release), "unsigned")
    assert installed(vehicle) is None


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_metadata_signed_by_a_foreign_key_is_refused(publisher: Publisher, vehicle: Vehicle, name: str) -> None:
    release = publisher.publish()
    publisher.rewrite(name, nothing, [CryptoSigner.generate_ed25519()])
    refusal(vehicle.update(release), "unsigned")


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_metadata_changed_after_its_signing_is_refused(publisher: Publisher, vehicle: Vehicle, name: str) -> None:
    release = publisher.publish()
    publisher.rewrite(name, lambda m: setattr(m.signed, "version", m.signed.version + 1))
    refusal(vehicle.update(release), "unsigned", "tampered", "rollback")


def test_a_stolen_timestamp_key_ships_no_release(publisher: Publisher, vehicle: Vehicle) -> None:
    release = publisher.publish()
    thief = publisher.of_role["timestamp"][0]
    for name in ("2.targets.json", "2.snapshot.json"):
        publisher.rewrite(name, nothing, [thief])
    publisher.rewrite("timestamp.json", nothing, [thief])
    refusal(vehicle.update(release), "unsigned")


def test_both_online_keys_ship_no_release(publisher: Publisher, vehicle: Vehicle) -> None:
    release = publisher.publish()
    online = keys.read_all(publisher.online, "online")

    def evil(metadata: Metadata[Any]) -> None:
        metadata.signed.targets[release.target].hashes["sha256"] = "e" * 64

    publisher.rewrite("2.targets.json", evil, list(online.values()))
    publisher.rewrite("2.snapshot.json", nothing, [publisher.of_role["snapshot"][0]])
    refusal(vehicle.update(release), "unsigned")


def test_a_root_threshold_of_two_is_not_met_by_one_key(tmp_path: Path) -> None:
    with shop(tmp_path, root_keys=2, threshold=2) as (publisher, server):
        vehicle = Vehicle(tmp_path / "vehicle", server.url, publisher.root)
        release = publisher.publish()
        one = publisher.of_role["root"][0]
        fresh = CryptoSigner.generate_ed25519()

        def usurp(metadata: Metadata[Any]) -> None:
            metadata.signed.version = 2
            metadata.signed.add_key(fresh.public_key, "timestamp")
            metadata.signed.roles["root"].threshold = 1

        (publisher.metadata / "2.root.json").write_bytes(publisher.root.read_bytes())
        publisher.rewrite("2.root.json", usurp, [one])
        refusal(vehicle.update(release), "unsigned")


def test_one_key_named_twice_does_not_count_twice(tmp_path: Path) -> None:
    with shop(tmp_path, root_keys=2, threshold=2) as (publisher, server):
        vehicle = Vehicle(tmp_path / "vehicle", server.url, publisher.root)
        release = publisher.publish()
        one = publisher.of_role["root"][0]
        (publisher.metadata / "2.root.json").write_bytes(publisher.root.read_bytes())
        publisher.rewrite("2.root.json", lambda m: setattr(m.signed, "version", 2), [one])
        document = msgspec.json.decode((publisher.metadata / "2.root.json").read_bytes())
        document["signatures"] *= 2
        (publisher.metadata / "2.root.json").write_bytes(msgspec.json.encode(document))
        refusal(vehicle.update(release), "unsigned", "tampered")
        # and in the role's own list of keys
        document = msgspec.json.decode(publisher.root.read_bytes())
        document["signed"]["version"] = 2
        document["signed"]["roles"]["root"]["keyids"] = [one.public_key.keyid] * 2
        (publisher.metadata / "2.root.json").write_bytes(msgspec.json.encode(document))
        refusal(vehicle.update(release), "unsigned", "tampered")


def test_a_release_whose_bytes_were_changed_is_refused(publisher: Publisher, server: Server, vehicle: Vehicle) -> None:
    release = publisher.publish()
    path = next((server.folder / "targets" / "bundles").iterdir())
    good = path.read_bytes()
    path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    assert "sha256" in refusal(vehicle.update(release), "tampered")
    assert installed(vehicle) is None
    path.write_bytes(good)
    assert vehicle.update(release).ending == "installed"  # nothing of the false bytes was kept


# 36, 37, 38. Old metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_role_rolled_back_is_refused(publisher: Publisher, vehicle: Vehicle, role: str) -> None:
    publisher.publish()
    old = publisher.saved()
    release = publisher.publish(release=2)
    assert vehicle.update(release).ending == "installed"
    new = publisher.saved()
    if role == "timestamp":
        publisher.replay({**new, "timestamp.json": old["timestamp.json"]})
    elif role == "snapshot":  # the attacker has the timestamp key
        publisher.rewrite(
            "timestamp.json",
            lambda m: (setattr(m.signed, "version", 9), setattr(m.signed, "snapshot_meta", MetaFile(2))),  # type: ignore[arg-type,return-value]
            [publisher.of_role["timestamp"][0]],
        )
    else:  # and the snapshot key

        def back(metadata: Metadata[Any]) -> None:
            metadata.signed.version = 9
            metadata.signed.meta["targets.json"] = MetaFile(2)

        (publisher.metadata / "9.snapshot.json").write_bytes(new["3.snapshot.json"])
        publisher.rewrite("9.snapshot.json", back, [publisher.of_role["snapshot"][0]])
        publisher.rewrite(
            "timestamp.json",
            lambda m: (setattr(m.signed, "version", 9), setattr(m.signed, "snapshot_meta", MetaFile(9))),  # type: ignore[arg-type,return-value]
            [publisher.of_role["timestamp"][0]],
        )
    refusal(vehicle.update("bundles/tiny-1-1.tar", 3), "rollback")
    assert installed(vehicle) == 2


def test_an_older_release_counter_is_refused_however_well_it_is_signed(publisher: Publisher, vehicle: Vehicle) -> None:
    old = publisher.publish(release=1)
    new = publisher.publish(release=2)
    assert vehicle.update(new).ending == "installed"
    assert "older than 2" in refusal(vehicle.update(old), "rollback")
    assert installed(vehicle) == 2


def test_a_pointer_with_another_counter_than_is_signed_is_refused(publisher: Publisher, vehicle: Vehicle) -> None:
    old = publisher.publish(release=1)
    new = publisher.publish(release=2)
    assert vehicle.update(new).ending == "installed"
    refusal(vehicle.update(old.target, 3), "mismatch")


def test_a_counter_older_than_the_factorys_is_refused_on_a_fresh_vehicle(
    publisher: Publisher, server: Server, tmp_path: Path
) -> None:
    release = publisher.publish()
    vehicle = Vehicle(tmp_path / "late", server.url, publisher.root, min_counter=5)
    refusal(vehicle.update(release), "rollback")


def test_old_signed_metadata_is_refused_after_a_vehicle_was_flashed_anew(
    publisher: Publisher, vehicle: Vehicle
) -> None:
    release = publisher.publish()
    old = publisher.saved()
    assert vehicle.update(release).ending == "installed"
    publisher.now_s = vehicle.wall_s = NOW_S + 30 * DAY_S
    publisher.publish(release=2)
    publisher.replay(old)
    vehicle.forget()
    refusal(vehicle.update(release), "expired")


def test_a_forged_root_does_not_become_trusted_by_a_flash(publisher: Publisher, vehicle: Vehicle) -> None:
    """What lies in the metadata folder is a cache: trust comes from the root the vehicle was built with."""
    release = publisher.publish()
    assert vehicle.update(release).ending == "installed"
    forged = Publisher(publisher.folder.parent / "forger")
    (vehicle.model / "metadata" / "root_history" / "1.root.json").write_bytes(forged.root.read_bytes())
    (vehicle.model / "metadata" / "root_history" / "2.root.json").write_bytes(forged.root.read_bytes())
    second = publisher.publish(release=2)
    assert vehicle.update(second).ending == "installed"


@pytest.mark.parametrize(("name", "days"), [("timestamp", 2), ("snapshot", 8), ("targets", 366), ("root", 366)])
def test_a_freeze_is_known_by_expiry(publisher: Publisher, vehicle: Vehicle, name: str, days: int) -> None:
    """The attacker who only withholds: all else is renewed, this role is not."""
    release = publisher.publish()
    before = publisher.saved()
    publisher.now_s = vehicle.wall_s = NOW_S + days * DAY_S
    if name in ("targets", "root"):
        publisher.repository.renew(publisher.signers, force=True)
    elif name == "snapshot":
        publisher.rewrite(
            "timestamp.json",
            lambda m: setattr(m.signed, "expires", publisher.repository.now()),
            [publisher.of_role["timestamp"][0]],
        )
        publisher.now_s += DAY_S
        publisher.rewrite(
            "timestamp.json",
            lambda m: setattr(m.signed, "expires", publisher.repository.now()),
            [publisher.of_role["timestamp"][0]],
        )
    else:
        publisher.replay(before)
    line = refusal(vehicle.update(release), "expired")
    assert "by the clock" in line
    assert installed(vehicle) is None


def test_unchanged_metadata_ends_as_expired_even_where_no_clock_goes_on(publisher: Publisher, vehicle: Vehicle) -> None:
    """What was once seen raises the floor: a clock set back by a month does not make old metadata fresh."""
    release = publisher.publish()
    old = publisher.saved()
    publisher.now_s = NOW_S + 30 * DAY_S
    vehicle.wall_s = publisher.now_s
    newer = publisher.publish(release=2)
    assert vehicle.update(newer).ending == "installed"
    vehicle.wall_s = NOW_S
    (vehicle.model / "metadata" / "timestamp.json").unlink()
    (vehicle.model / "metadata" / "snapshot.json").unlink()
    publisher.replay(old)
    refusal(vehicle.update(release.target, 3), "expired")


# 20 to 23. Clocks ------------------------------------------------------------------------------------------------


def test_a_vehicle_that_boots_in_1970_installs_by_signed_time(publisher: Publisher, vehicle: Vehicle) -> None:
    vehicle.wall_s = 60.0
    assert vehicle.update(publisher.publish()).ending == "installed"
    assert vehicle.floor_s == NOW_S


def test_a_wall_clock_behind_the_floor_does_not_revive_an_old_timestamp(publisher: Publisher, vehicle: Vehicle) -> None:
    first = publisher.publish()
    old = publisher.saved()
    publisher.now_s = vehicle.wall_s = NOW_S + 10 * DAY_S
    assert vehicle.update(publisher.publish(release=2)).ending == "installed"
    vehicle.wall_s = NOW_S - 20 * DAY_S
    for name in ("timestamp.json", "snapshot.json", "targets.json"):
        (vehicle.model / "metadata" / name).unlink()
    publisher.replay(old)
    refusal(vehicle.update(first.target, 3), "expired")


def test_a_clock_ten_years_ahead_refuses_and_recovers_and_raises_nothing(
    publisher: Publisher, vehicle: Vehicle
) -> None:
    release = publisher.publish()
    vehicle.wall_s = NOW_S + 3650 * DAY_S
    assert "2037" in refusal(vehicle.update(release), "expired")
    assert vehicle.floor_s < NOW_S
    vehicle.wall_s = NOW_S + 60.0
    assert vehicle.update(release).ending == "installed"
    assert vehicle.floor_s == NOW_S


def test_a_floor_pushed_ahead_by_a_stolen_key_is_forgotten_with_that_key(
    publisher: Publisher, vehicle: Vehicle
) -> None:
    release = publisher.publish()
    far = NOW_S + 3650 * DAY_S

    def ahead(metadata: Metadata[Any]) -> None:
        metadata.signed.version = 5
        metadata.signed.unrecognized_fields["signed_at"] = int(far)
        metadata.signed.expires = metadata.signed.expires.replace(year=2040)

    publisher.rewrite("timestamp.json", ahead, [publisher.of_role["timestamp"][0]])
    assert vehicle.update(release).ending == "installed"
    assert vehicle.floor_s == far
    second = publisher.publish(release=2)
    refusal(vehicle.update(second), "expired", "rollback")
    publisher.repository.rotate("timestamp", keys.create(publisher.online, "timestamp", 2), publisher.signers)
    assert vehicle.update(second).ending == "installed"
    assert vehicle.floor_s == NOW_S


# 39. Fast-forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_a_fast_forward_is_recovered_from_by_rotating_the_key(
    publisher: Publisher, vehicle: Vehicle, role: str
) -> None:
    first = publisher.publish()
    honest = publisher.saved()

    def forward(metadata: Metadata[Any]) -> None:
        metadata.signed.version = MAX_VERSION

    if role == "snapshot":
        (publisher.metadata / f"{MAX_VERSION}.snapshot.json").write_bytes(honest["2.snapshot.json"])
        publisher.rewrite(f"{MAX_VERSION}.snapshot.json", forward, [publisher.of_role["snapshot"][0]])

        def point(metadata: Metadata[Any]) -> None:
            metadata.signed.version += 1
            metadata.signed.snapshot_meta = MetaFile(MAX_VERSION)

        publisher.rewrite("timestamp.json", point, [publisher.of_role["timestamp"][0]])
    else:
        publisher.rewrite("timestamp.json", forward, [publisher.of_role["timestamp"][0]])
    assert vehicle.update(first).ending == "installed"
    publisher.replay(honest)
    second = publisher.publish(release=2)
    refusal(vehicle.update(second), "rollback", "not_found")  # it still believes the forward
    publisher.repository.rotate("timestamp", keys.create(publisher.online, "timestamp", 2), publisher.signers)
    if role == "snapshot":
        publisher.repository.rotate("snapshot", keys.create(publisher.online, "snapshot", 2), publisher.signers)
    assert vehicle.update(second).ending == "installed"


# 40. Mix and match -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [n for n in NAMES if n != contract.MODEL_CARD])
def test_members_of_two_releases_are_refused(publisher: Publisher, vehicle: Vehicle, member: str) -> None:
    """Signed, but put together from two: only one manifest hashes all members."""
    one, two = publisher.bundle(1), publisher.bundle(2, state_id="tiny-2", trick="late_nan")
    (two / contract.THRESHOLDS).write_bytes((two / contract.THRESHOLDS).read_bytes() + b" ")
    files = {name: (one / name).read_bytes() for name in NAMES}
    files[member] = (two / member).read_bytes() + (b"" if member == contract.MANIFEST else b"\n")
    release = publisher.publish_unverified(tar_of(list(files.items())), _custom(one), name="tiny-1")
    refusal(vehicle.update(release), "malformed")
    assert installed(vehicle) is None
    refusal(vehicle.update(release), "bad_before")


def _custom(bundle: Path) -> dict[str, Any]:
    manifest = contract.parse_manifest((bundle / contract.MANIFEST).read_bytes(), "")
    return {
        "manifest_sha256": hashlib.sha256((bundle / contract.MANIFEST).read_bytes()).hexdigest(),
        "name": manifest.name, "release": manifest.release, "state_id": manifest.state_id,
    }  # fmt: skip


# 34. For another vehicle -----------------------------------------------------------------------------------------


def test_a_release_for_another_make_is_refused_before_it_is_downloaded(
    publisher: Publisher, server: Server, vehicle: Vehicle
) -> None:
    release = publisher.publish(publisher.bundle(1, makes=("other",)))
    assert "for other" in refusal(vehicle.update(release), "foreign")
    assert not any(path.startswith("targets/") for path, _ in server.faults.asked)


def test_a_release_of_another_contract_is_refused_before_it_is_downloaded(
    publisher: Publisher, server: Server, vehicle: Vehicle
) -> None:
    release = publisher.publish_unverified(pack(publisher.bundle(1)), {"contract_version": "2.0"})
    refusal(vehicle.update(release), "foreign")
    assert not any(path.startswith("targets/") for path, _ in server.faults.asked)


def test_a_target_that_is_not_signed_is_not_found(publisher: Publisher, vehicle: Vehicle) -> None:
    publisher.publish()
    refusal(vehicle.update("bundles/other-7.tar", 7), "not_found")


def test_a_withdrawn_release_is_not_installed(publisher: Publisher, vehicle: Vehicle) -> None:
    first = publisher.publish()
    publisher.publish(release=2)
    publisher.repository.withdraw(1, publisher.signers)
    refusal(vehicle.update(first), "not_found")


# 41. Endless, wrong and slow -------------------------------------------------------------------------------------


def test_an_endless_answer_is_cut_off_at_the_signed_length(
    publisher: Publisher, server: Server, vehicle: Vehicle
) -> None:
    release = publisher.publish()
    server.faults.endless = True
    refusal(vehicle.update(release), "oversize")
    assert not list((vehicle.model / "staging").glob("*.part"))


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json", "2.root.json"])
def test_endless_metadata_is_cut_off(publisher: Publisher, server: Server, vehicle: Vehicle, name: str) -> None:
    release = publisher.publish()
    server.faults.replaced[f"metadata/{name}"] = b" " * 8_000_000
    refusal(vehicle.update(release), "oversize")


def test_a_longer_answer_than_signed_is_refused_by_its_header(
    publisher: Publisher, server: Server, vehicle: Vehicle
) -> None:
    release = publisher.publish()
    path = next((server.folder / "targets" / "bundles").iterdir())
    path.write_bytes(path.read_bytes() + b"more")
    assert "announced" in refusal(vehicle.update(release), "oversize")


def test_a_release_beyond_the_vehicles_limit_is_refused_before_it_is_downloaded(
    publisher: Publisher, server: Server, tmp_path: Path
) -> None:
    vehicle = Vehicle(tmp_path / "small", server.url, publisher.root, max_bytes=65_536)
    release = publisher.publish_unverified(b"x" * 70_000)
    assert "70000" in refusal(vehicle.update(release), "oversize")
    assert not any(path.startswith("targets/") for path, _ in server.faults.asked)


def test_a_server_that_drips_is_given_up(
    publisher: Publisher, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RATE_SPAN_S", 1.0)
    vehicle = Vehicle(tmp_path / "slow", server.url, publisher.root)
    release = publisher.publish()
    server.faults.drip_s = 0.02  # fifty bytes a second, each within any timeout of a socket
    assert "bytes a second" in refusal(vehicle.update(release), "slow")
    kept = list((vehicle.model / "staging").glob("*.part"))
    assert kept
    assert kept[0].stat().st_size > 10  # for the next try
    server.faults.drip_s = 0.0
    assert vehicle.update(release).ending == "installed"


# 42. Roots -------------------------------------------------------------------------------------------------------


def test_a_root_is_followed_over_many_rotations(publisher: Publisher, vehicle: Vehicle) -> None:
    assert vehicle.update(publisher.publish()).ending == "installed"
    for number in range(3, 9):
        publisher.repository.rotate("root", keys.create(publisher.offline, "root", number), publisher.signers)
        for old in list(publisher.offline.glob("root-*.pem"))[:-2]:
            if old.stem not in (f"root-{number}", f"root-{number - 1}"):
                old.unlink()
    publisher.repository.rotate("targets", keys.create(publisher.offline, "targets", 2), publisher.signers)
    assert vehicle.update(publisher.publish(release=2)).ending == "installed"
    assert (vehicle.model / "metadata" / "root.json").resolve().name == "8.root.json"


def test_a_root_version_left_out_is_refused(publisher: Publisher, vehicle: Vehicle) -> None:
    publisher.publish()
    publisher.repository.rotate("timestamp", keys.create(publisher.online, "timestamp", 2), publisher.signers)
    publisher.repository.rotate("timestamp", keys.create(publisher.online, "timestamp", 3), publisher.signers)
    (publisher.metadata / "2.root.json").unlink()
    release = publisher.repository.releases()[0]
    refusal(vehicle.update(release), "unsigned")
    (publisher.metadata / "2.root.json").write_bytes((publisher.metadata / "3.root.json").read_bytes())
    refusal(vehicle.update(release), "rollback")


def test_a_key_that_was_revoked_signs_nothing_any_more(publisher: Publisher, vehicle: Vehicle) -> None:
    stolen = publisher.of_role["targets"][0]
    release = publisher.publish()
    publisher.repository.rotate("targets", keys.create(publisher.offline, "targets", 2), publisher.signers)
    for path in publisher.metadata.glob("*.targets.json"):
        publisher.rewrite(path.name, nothing, [stolen])
    refusal(vehicle.update(release), "unsigned")


def test_a_root_that_is_none_is_one_clear_line(server: Server, publisher: Publisher, tmp_path: Path) -> None:
    release = publisher.publish()
    vehicle = Vehicle(tmp_path / "odd", server.url, publisher.root)
    vehicle.root.write_bytes(b"no root at all")
    assert "update.root" in refusal(vehicle.update(release), "tampered")


# The transport ---------------------------------------------------------------------------------------------------


def test_tls_is_checked_by_the_authority_of_the_configuration(
    publisher: Publisher, server: Server, tmp_path: Path
) -> None:
    """Signatures do not need it; it hides which release a vehicle fetches, and from whom."""
    ca = server.turn_on_tls(tmp_path)
    release = publisher.publish()
    stranger = Vehicle(tmp_path / "stranger", server.url, publisher.root)
    assert "certificate" in refusal(stranger.update(release), "network").lower()
    vehicle = Vehicle(tmp_path / "friend", server.url, publisher.root, ca=str(ca))
    assert vehicle.update(release).ending == "installed"


# The archive -----------------------------------------------------------------------------------------------------


def _members() -> list[tuple[str, bytes]]:
    return [(name, b"{}") for name in NAMES]


def _link(info: Any) -> None:
    if info.name == contract.MODEL:
        info.type, info.linkname, info.size = b"2", "/etc/passwd", 0


def _device(info: Any) -> None:
    if info.name == contract.MODEL:
        info.type, info.size = b"3", 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tar_of([*_members(), ("../evil", b"x")]), "no place"),
        (tar_of([*_members(), ("/etc/cron.d/evil", b"x")]), "no place"),
        (tar_of([*_members(), ("./model.onnx", b"x")]), "no place"),
        (tar_of([*_members(), ("model.onnx", b"x")]), "twice"),
        (tar_of(_members()[:-1]), "holds no"),
        (tar_of(_members(), _link), "no plain file"),
        (tar_of(_members(), _device), "no plain file"),
        (tar_of(_members())[:700], "unexpected end"),
        (b"\x1f\x8b" + b"z" * 2000, "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_archive_that_is_no_bundle_is_refused_and_nothing_leaves_its_folder(
    tmp_path: Path, data: bytes, words: str
) -> None:
    source = tmp_path / "archive.tar"
    source.write_bytes(data)
    with pytest.raises(UpdateError, match=words) as caught:
        archive.unpack(source, tmp_path / "into")
    assert caught.value.reason == "malformed"
    outside = {p.name for p in tmp_path.iterdir()} - {"archive.tar", "into"}
    assert not outside


def test_a_member_beyond_its_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = tmp_path / "archive.tar"
    source.write_bytes(tar_of([(contract.MODEL, b"\0" * (contract.MAX_MODEL_BYTES + 1))]))
    with pytest.raises(UpdateError, match="at most") as caught:
        archive.unpack(source, tmp_path / "into")
    assert caught.value.reason == "oversize"

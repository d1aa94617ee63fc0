"""The folder of identities: what is in it, what is refused, and what a kill, a repeat or a rival leaves of it."""

import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path, PurePosixPath

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud.identity import authority as ca
from cloud.identity.durable import STAGING
from cloud.identity.names import Role, check_hosts, common_name
from cloud.identity.provisioning import DAYS, Provisioning, Wanted
from cloud.identity.vehicle_folder import vehicle_files
from edge_agent.config import load_config
from edge_agent.contract.errors import ConfigError, MessageError, SourceError, UnavailableError
from tests.conftest import ROOT
from tests.faults.test_outbox_faults import strace
from tests.identities import Identities

NOT_NAMES = (
    "#", "+", "a/b", "", "$SYS", "EV_1/#", "../EV_1", ".", "..", ".EV", "-rf", "_collector-default", "EV 1", "EV\n1",
    "EV\x001", "EV\x7f", "\u202eEV", "EV\u200b1", "ÉV", "EV_\u0661", "E" * 65, "%u", "EV_1\t", "<b>", "'; --",
)  # fmt: skip


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "identity")


def tree(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file's bytes, mode and inode."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_ino)
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def identity(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    pem = (folder / "identity.pem").read_bytes()
    key = load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(pem), key


def fleet_cloud(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cloud", "provision", *words], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = Identities(tmp_path / "identity")
        made.vehicle("EV_1")
    finally:
        os.umask(before)
    for path in (made.folder, *made.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix != ".crt" and b"PRIVATE KEY" in path.read_bytes():
            assert mode == 0o600, path
        else:
            assert not mode & 0o022, path
    assert len(made.private_keys()) == len(set(made.private_keys())) == 4, "authority, broker, collector, vehicle"


def test_a_certificate_names_its_owner_and_is_for_one_side_only(identities: Identities) -> None:
    authority = identities.authority()
    for folder, name, purpose, days in (
        (identities.vehicle("EV_1"), "EV_1", ExtendedKeyUsageOID.CLIENT_AUTH, DAYS[Role.VEHICLE]),
        (identities.collector(), "_collector-default", ExtendedKeyUsageOID.CLIENT_AUTH, DAYS[Role.COLLECTOR]),
        (identities.subscriber("screen"), "_subscriber-screen", ExtendedKeyUsageOID.CLIENT_AUTH, 365),
        (identities.folder / "broker", "_broker-broker", ExtendedKeyUsageOID.SERVER_AUTH, DAYS[Role.BROKER]),
    ):
        certificate, key = identity(folder)
        certificate.verify_directly_issued_by(authority.certificate)
        assert certificate.public_key() == key.public_key()
        assert isinstance(key.curve, ec.SECP256R1)
        assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [name]
        extensions = certificate.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days - 1) < left <= timedelta(days=days)


def test_a_vehicle_without_a_clock_takes_the_brokers_certificate(identities: Identities) -> None:
    authority = identities.authority()
    certificate, _ = identity(identities.folder / "broker")
    store = verification.Store([authority.certificate])
    subjects = (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")))

    def verify(at: datetime, subject: verification.Subject) -> None:
        verification.PolicyBuilder().store(store).time(at).build_server_verifier(subject).verify(certificate, [])

    for subject in subjects:
        verify(datetime(1970, 1, 1, 0, 0, 20, tzinfo=UTC), subject)
        verify(datetime.now(UTC), subject)
        with pytest.raises(verification.VerificationError):
            verify(datetime.now(UTC) + timedelta(days=DAYS[Role.BROKER] + 1), subject)
    with pytest.raises(verification.VerificationError):
        verify(datetime.now(UTC), x509.DNSName("broker.example"))


def test_provisioning_twice_changes_nothing(identities: Identities) -> None:
    identities.vehicle("EV_1")
    before = tree(identities.folder)
    again = identities.provisioning.init(("localhost", "127.0.0.1"), identities.port)
    identities.vehicle("EV_1")
    assert tree(identities.folder) == before
    assert not any(delivered.made for delivered in again)


@pytest.mark.parametrize("name", NOT_NAMES)
def test_a_name_that_could_reach_further_is_refused(identities: Identities, name: str) -> None:
    before = tree(identities.folder)
    with pytest.raises((MessageError, ConfigError)):
        identities.provisioning.add([Wanted(Role.VEHICLE, "EV_ok", 1), Wanted(Role.VEHICLE, name, 1)])
    assert tree(identities.folder) == before, "none is made where one of them is refused"


@pytest.mark.parametrize("name", ["#", "a/b", "", "EV\n1", "\u202eEV", "-rf"])
def test_a_refused_name_is_one_printable_line(identities: Identities, name: str) -> None:
    told = fleet_cloud("vehicle", "--output", str(identities.folder), "--", name)
    assert told.returncode in {65, 78}
    assert told.stderr.count("\n") == 1
    assert told.stderr.strip().isprintable()
    assert not (identities.folder / "vehicle").exists()


@pytest.mark.parametrize("name", ["A", "collector", "broker", "subscriber-x", "EV.1-b_c", "9", "x" * 64])
def test_no_vehicle_can_have_a_services_name(name: str) -> None:
    for role in (Role.COLLECTOR, Role.SUBSCRIBER, Role.BROKER):
        assert common_name(Role.VEHICLE, name) == name
        service = common_name(role, "default")
        with pytest.raises(MessageError):
            common_name(Role.VEHICLE, service)


@pytest.mark.parametrize(
    "host", ["", "mqtt://x", "x:8883", "*.example", "a b", "-x", "x..y", "1.2.3.400", "bröker", "x\n", "a" * 64]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError):
        check_hosts(("ok.example", host))


def test_hosts_are_names_and_addresses_of_both_kinds() -> None:
    hosts = ("broker.example", "xn--brker-kua.example", "10.0.0.7", "fd00::7", "localhost")
    assert check_hosts((*hosts, "10.0.0.7")) == hosts


def test_the_brokers_configuration_names_where_it_will_lie_and_is_the_operators_to_change(tmp_path: Path) -> None:
    place = Provisioning(tmp_path / "identity")
    place.init(("broker.example",), 18883, install=PurePosixPath("/etc/mosquitto/voltwatch"))
    conf = tmp_path / "identity" / "broker" / "mosquitto.conf"
    text = conf.read_text()
    assert "\nlistener 18883\n" in text
    for line in ("cafile /etc/mosquitto/voltwatch/ca.crt", "acl_file /etc/mosquitto/voltwatch/acl"):
        assert f"\n{line}\n" in text
    assert str(tmp_path) not in text
    conf.write_text(text + "# mine\n")
    place.add([Wanted(Role.VEHICLE, "EV_1", 1)])
    place.revoke(Role.VEHICLE, "EV_1", "")
    place.init(("broker.example",), 18883)
    assert conf.read_text() == text + "# mine\n"
    with pytest.raises(ConfigError, match="absolute path"):
        Provisioning(tmp_path / "other").init(("broker.example",), install=PurePosixPath("relative"))


def test_the_authoritys_key_is_never_overwritten(identities: Identities) -> None:
    key = identities.folder / "ca" / "ca.key"
    kept = key.read_bytes()
    key.rename(key.with_name("elsewhere"))
    before = tree(identities.folder)
    for attempt in (
        lambda: identities.provisioning.init(("localhost", "127.0.0.1"), identities.port),
        lambda: identities.vehicle("EV_1"),
    ):
        with pytest.raises(ConfigError, match=r"ca\.key is missing; restore it"):
            attempt()
    shutil.rmtree(identities.folder / "ca")
    with pytest.raises(ConfigError, match="authority's files are gone"):
        identities.provisioning.init(("localhost", "127.0.0.1"), identities.port)
    assert not (identities.folder / "ca").exists()
    assert kept in {data for data, *_ in before.values()}


def test_a_damaged_file_is_one_clear_line(identities: Identities) -> None:
    for name, text in (("ca/ca.key", b"-----BEGIN"), ("ca/ca.crt", b""), ("register.json", b'{"version":2}')):
        path = identities.folder / name
        good = path.read_bytes()
        path.write_bytes(text)
        with pytest.raises(ConfigError, match="backup"):
            identities.vehicle("EV_1")
        path.write_bytes(good)
    other = ca.new_authority(datetime.now(UTC))
    (identities.folder / "ca" / "ca.crt").write_bytes(other.certificate_pem())
    with pytest.raises(ConfigError, match="do not belong together"):
        identities.vehicle("EV_1")


def test_a_folder_without_identities_and_one_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="provision init"):
        Provisioning(tmp_path / "nothing").broker()
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be written"):
        Provisioning(tmp_path / "file").init(("localhost",))


def test_a_machine_whose_clock_is_wrong_signs_nothing(tmp_path: Path) -> None:
    at = datetime(1970, 1, 2, tzinfo=UTC)
    with pytest.raises(ConfigError, match="clock says 1970"):
        Provisioning(tmp_path / "identity", now=lambda: at).init(("localhost",))
    assert not (tmp_path / "identity").exists()


def test_other_broker_names_are_refused_and_taken_by_renewing(identities: Identities) -> None:
    with pytest.raises(ConfigError, match=r"was made for localhost, 127\.0\.0\.1"):
        identities.provisioning.init(("broker.example",), identities.port)
    before = tree(identities.folder / "broker")
    identities.provisioning.renew(Role.BROKER, ["broker"], hosts=("broker.example",))
    certificate, key = identity(identities.folder / "broker")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert certificate.public_key() == key.public_key()
    changed = {name for name, content in tree(identities.folder / "broker").items() if before.get(name) != content}
    assert changed == {"identity.pem"}
    assert identities.provisioning.broker() == ("broker.example", identities.port)


# Revoking and renewing ------------------------------------------------------------------------------------------


def crl(identities: Identities) -> set[int]:
    text = (identities.folder / "broker" / "crl.pem").read_bytes()
    assert x509.load_pem_x509_crl(text).is_signature_valid(identities.authority().key.public_key())
    return ca.revoked_serials(text) or set()


def acl(identities: Identities) -> str:
    return (identities.folder / "broker" / "acl").read_text()


def test_revoking_reaches_the_list_and_the_acl_and_is_not_undone_by_provisioning(identities: Identities) -> None:
    certificate, _ = identity(identities.vehicle("EV_1"))
    identities.vehicle("EV_2")
    assert crl(identities) == set()
    assert len(identities.provisioning.revoke(Role.VEHICLE, "EV_1", "stolen")) == 1
    assert crl(identities) == {certificate.serial_number}
    assert "user EV_1\ntopic deny #\n" in acl(identities)
    assert "EV_2" not in acl(identities)
    assert identities.provisioning.revoke(Role.VEHICLE, "EV_1", "again") == ()
    with pytest.raises(ConfigError, match=r"was revoked at .*provision renew EV_1"):
        identities.vehicle("EV_1")
    listed = {one.entry.name: one for one in identities.provisioning.listing(Role.VEHICLE)}
    assert (listed["EV_1"].state, listed["EV_1"].entry.reason) == ("revoked", "stolen")
    assert listed["EV_2"].state == "valid"


def test_renewing_makes_a_new_key_and_the_old_certificate_ends_when_that_is_said(identities: Identities) -> None:
    folder = identities.vehicle("EV_1")
    old, old_key = identity(folder)
    agent_toml = (folder / "agent.toml").read_bytes()
    identities.provisioning.renew(Role.VEHICLE, ["EV_1"])
    new, new_key = identity(folder)
    assert new.public_key() == new_key.public_key() != old_key.public_key()
    assert (folder / "agent.toml").read_bytes() == agent_toml
    assert crl(identities) == set(), "the vehicle goes on until it has the new one"
    identities.provisioning.revoke(Role.VEHICLE, "EV_1", "", older=True)
    assert crl(identities) == {old.serial_number}
    assert "EV_1" not in acl(identities)
    identities.provisioning.revoke(Role.VEHICLE, "EV_1", "stolen")
    assert crl(identities) == {old.serial_number, new.serial_number}
    identities.provisioning.renew(Role.VEHICLE, ["EV_1"])
    assert "EV_1" not in acl(identities), "a name with a good certificate is not banned"
    assert identity(folder)[0].serial_number not in crl(identities)


def test_a_folder_taken_to_its_vehicle_is_not_made_twice_in_silence(identities: Identities) -> None:
    folder = identities.vehicle("EV_1")
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"was issued, but is not in .*provision renew EV_1"):
        identities.vehicle("EV_1")
    identities.provisioning.renew(Role.VEHICLE, ["EV_1"])
    assert {path.name for path in folder.iterdir()} == {"identity.pem", "ca.crt"}


def test_an_expired_certificate_is_said_and_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    began = datetime(2026, 1, 1, tzinfo=UTC)
    Provisioning(folder, now=lambda: began).init(("localhost",))
    Provisioning(folder, now=lambda: began).add([Wanted(Role.VEHICLE, "EV_1", 30)])
    later = Provisioning(folder, now=lambda: began + timedelta(days=31))
    with pytest.raises(ConfigError, match="expired at 2026-01-31"):
        later.add([Wanted(Role.VEHICLE, "EV_1", 30)])
    assert [one.state for one in later.listing(Role.VEHICLE)] == ["expired"]
    later.renew(Role.VEHICLE, ["EV_1"], days=30)
    assert [one.state for one in later.listing(Role.VEHICLE)] == ["expired", "valid"]
    authority_ends = datetime(2027, 1, 1, tzinfo=UTC)
    assert later.add([Wanted(Role.VEHICLE, "EV_2", 10**5)])[0].entry.until > authority_ends.isoformat()
    ends = ca.certificate_in((folder / "ca" / "ca.crt").read_bytes())
    assert ends is not None
    assert identity(folder / "vehicle" / "EV_2")[0].not_valid_after_utc == ends.not_valid_after_utc


def test_the_revocation_list_does_not_run_out_before_the_authority(identities: Identities) -> None:
    found = x509.load_pem_x509_crl((identities.folder / "broker" / "crl.pem").read_bytes())
    assert found.next_update_utc == identities.authority().certificate.not_valid_after_utc


def test_an_unknown_name_is_said_with_the_nearest(identities: Identities) -> None:
    identities.vehicle("EV_001")
    with pytest.raises(ConfigError, match="did you mean EV_001"):
        identities.provisioning.revoke(Role.VEHICLE, "EV_01", "")


# The vehicle's configuration ------------------------------------------------------------------------------------

BASE = """# for all Voltas
data_dir = "/var/lib/voltwatch"
[source]
mapping = "volta.toml"
dbc = "volta.dbc"
interface = "socketcan"
channel = "can0"   # the powertrain bus
"""


def base(folder: Path, text: str = BASE) -> Path:
    (folder / "volta.toml").write_text("mapping")
    (folder / "volta.dbc").write_text("dbc")
    path = folder / "base.toml"
    path.write_text(text)
    return path


def test_a_vehicles_folder_is_read_by_the_agent_wherever_it_is_copied(identities: Identities, tmp_path: Path) -> None:
    told = fleet_cloud(
        "vehicle",
        "EV_1",
        "EV_2",
        "--make",
        "volta",
        "--config",
        str(base(tmp_path)),
        "--output",
        str(identities.folder),
    )
    assert told.returncode == 0, told.stderr
    copied = tmp_path / "vehicle"
    shutil.copytree(identities.folder / "vehicle" / "EV_1", copied)
    config = load_config(copied / "agent.toml")
    assert (config.vehicle_id, config.make, config.source.channel) == ("EV_1", "volta", "can0")
    assert (config.mqtt.host, config.mqtt.port) == ("localhost", identities.port)
    assert {config.mqtt.certificate, config.mqtt.key} == {str(copied / "identity.pem")}
    assert config.mqtt.ca == str(copied / "ca.crt")
    assert Path(config.source.mapping).read_text() == "mapping"
    assert "# the powertrain bus" in (copied / "agent.toml").read_text()


def test_without_a_base_the_configuration_is_one_the_agent_reads(identities: Identities) -> None:
    config = load_config(identities.vehicle("EV_1") / "agent.toml")
    assert (config.vehicle_id, config.source.interface) == ("EV_1", "socketcan")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vehicle_id = 'x'\n" + BASE, "leave out 'vehicle_id'"),
        (BASE + "[mqtt]\nport = 1\n", "leave out 'mqtt'"),
        ("= 3", "not valid TOML"),
        (BASE.replace("volta.dbc", "ca.crt"), "must not be named ca.crt"),
        (BASE.replace("volta.dbc", "gone.dbc"), "source.dbc gone.dbc: no such file"),
    ],
)
def test_a_base_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vehicle_files("EV_1", "", base(tmp_path, text), "localhost", 8883)


@pytest.mark.parametrize("make", ['"', "a\nb", "\\", "\u202e", "x" * 65])
def test_a_make_cannot_write_into_the_configuration(make: str) -> None:
    with pytest.raises(ConfigError, match="make"):
        vehicle_files("EV_1", make, None, "localhost", 8883)


def test_a_configuration_edited_by_hand_is_not_overwritten(identities: Identities) -> None:
    path = identities.vehicle("EV_1") / "agent.toml"
    path.write_text(path.read_text() + "# mine\n")
    with pytest.raises(ConfigError, match="differs from what would be written"):
        identities.vehicle("EV_1")
    path.unlink()
    identities.vehicle("EV_1")
    assert "# mine" not in path.read_text()


# Killed, and two at once ----------------------------------------------------------------------------------------

DO_ALL = """
import sys
from pathlib import Path
from cloud.identity.names import Role
from cloud.identity.provisioning import Provisioning, Wanted
place = Provisioning(Path(sys.argv[1]))
place.init(("localhost",), 8883)
for name in sys.argv[2:]:
    place.add([Wanted(Role.VEHICLE, name, 30)])
print("done")
"""


def whole(folder: Path, vehicles: Sequence[str]) -> None:
    """Assert that a folder holds these identities and nothing half."""
    assert not list(folder.rglob(f"{STAGING}*"))
    entries = json.loads((folder / "register.json").read_bytes())["entries"]
    assert {entry["state"] for entry in entries} <= {"issued", "revoked"}
    valid = {(e["role"], e["name"]): e["serial"] for e in entries if e["state"] == "issued"}
    assert valid.keys() == {("broker", "broker"), ("collector", "default"), *(("vehicle", name) for name in vehicles)}
    authority = x509.load_pem_x509_certificate((folder / "ca" / "ca.crt").read_bytes())
    found = {path.parent for path in folder.rglob("identity.pem")}
    assert len(found) == len(valid)
    for path in found:
        certificate, key = identity(path)
        certificate.verify_directly_issued_by(authority)
        assert certificate.public_key() == key.public_key()
        assert f"{certificate.serial_number:x}" in valid.values()
        assert (path / "ca.crt").read_bytes() == (folder / "ca" / "ca.crt").read_bytes()
    revoked = {int(entry["serial"], 16) for entry in entries if entry["state"] == "revoked"}
    assert ca.revoked_serials((folder / "broker" / "crl.pem").read_bytes()) == revoked


@pytest.mark.slow
@pytest.mark.parametrize("syscall", ["rename", "fsync", "mkdir"])
def test_provisioning_killed_at_any_step_leaves_no_half_identity(tmp_path: Path, syscall: str) -> None:
    kills = 0
    for number in range(1, 100):
        folder = tmp_path / str(number)
        script = [sys.executable, "-c", DO_ALL, str(folder), "EV_1"]
        inject = f"inject={syscall}:signal=SIGKILL:when={number}"
        first = subprocess.run(
            [*strace("-e", f"trace={syscall}", "-e", inject), *script],
            cwd=ROOT, capture_output=True, check=False,
        )  # fmt: skip
        if first.returncode == 0:
            break
        assert first.returncode == -signal.SIGKILL, first.stderr
        kills += 1
        kept = folder / "ca" / "ca.key"
        key = kept.read_bytes() if kept.exists() else None
        again = subprocess.run(script, cwd=ROOT, capture_output=True, check=False)
        assert again.stdout == b"done\n", again.stderr
        assert key in {None, kept.read_bytes()}
        whole(folder, ["EV_1"])
    assert kills > 3


def test_a_full_disk_is_one_clear_line_and_the_next_run_completes(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    init = [sys.executable, "-m", "cloud", "provision", "init", "--output", str(folder), "--broker-host", "localhost"]
    for number in (1, 4, 9):
        full = ["-e", "trace=fsync", "-e", f"inject=fsync:error=ENOSPC:when={number}+"]
        told = subprocess.run([*strace(*full), *init], cwd=ROOT, capture_output=True, text=True, check=False)
        assert told.returncode == 69, told.stderr
        assert "no space left on device" in told.stderr
        assert told.stderr.count("\n") == 1
    assert subprocess.run(init, cwd=ROOT, capture_output=True, check=False).returncode == 0
    whole(folder, [])


def test_two_at_once_are_serialised(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    names = ["EV_1", "EV_2", "EV_3"]
    running = [
        subprocess.Popen([sys.executable, "-c", DO_ALL, str(folder), *order], cwd=ROOT)
        for order in (names, names[::-1], names)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    whole(folder, names)
    assert len(json.loads((folder / "register.json").read_bytes())["entries"]) == 5, "each was made once"


# Secrets --------------------------------------------------------------------------------------------------------


def test_no_command_shows_a_key(identities: Identities) -> None:
    words = str(identities.folder)
    said = ""
    for command in (
        ["vehicle", "EV_1", "EV_2"], ["vehicle", "EV_1"], ["collector", "second"], ["subscriber", "screen"],
        ["renew", "EV_1"], ["renew", "--due", "9999"], ["revoke", "EV_1", "--older"], ["revoke", "EV_2"], ["list"],
        ["list", "--json"], ["vehicle", "EV_2"], ["revoke", "nobody"],
    ):  # fmt: skip
        told = fleet_cloud(*command, VOLTWATCH_IDENTITY=words)
        assert "Traceback" not in told.stderr
        said += told.stdout + told.stderr
    assert "EV_2: its certificate was revoked" in said
    said = "".join(said.split())
    keys = identities.private_keys()
    assert len(keys) >= 6
    for key in keys:
        assert len(key) == 80
        assert key.decode() not in said
        holders = [path for path in identities.folder.rglob("*") if path.is_file() and key in _joined(path)]
        assert len(holders) == 1, "a key lies in one file"


def _joined(path: Path) -> bytes:
    return b"".join(path.read_bytes().split())


# A key of the vehicle's own, and a passphrase -------------------------------------------------------------------


def request_for(name: str, key: object, folder: Path) -> Path:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    asked = x509.CertificateSigningRequestBuilder().subject_name(subject)
    asked = asked.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)  # greedy
    path = folder / "request.csr"
    path.write_bytes(asked.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", ["", "EV_1"])
def test_a_key_made_on_the_vehicle_never_leaves_it(identities: Identities, tmp_path: Path, name: str) -> None:
    key = ca.new_key()
    csr = str(request_for(name, key, tmp_path))
    told = fleet_cloud("vehicle", "EV_1", "--csr", csr, "--output", str(identities.folder))
    assert told.returncode == 0, told.stderr
    folder = identities.folder / "vehicle" / "EV_1"
    assert b"PRIVATE" not in (folder / "identity.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate((folder / "identity.pem").read_bytes())
    assert certificate.public_key() == key.public_key()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca, "as we say, not it"
    (folder / "vehicle.key").write_bytes(ca.key_pem(key))
    config = load_config(folder / "agent.toml")
    context = ssl.create_default_context(cafile=config.mqtt.ca)
    context.load_cert_chain(config.mqtt.certificate, config.mqtt.key)


def test_a_request_that_is_somebody_elses_weak_or_no_request_is_refused(identities: Identities, tmp_path: Path) -> None:
    before = tree(identities.folder)
    good = request_for("EV_1", ca.new_key(), tmp_path).read_bytes()
    flipped = bytearray(x509.load_pem_x509_csr(good).public_bytes(Encoding.DER))
    flipped[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(flipped)).public_bytes(Encoding.PEM)
    weak = request_for("EV_1", rsa.generate_private_key(65537, 1024), tmp_path).read_bytes()  # noqa: S505
    other_kind = request_for("EV_1", ec.generate_private_key(ec.SECP192R1()), tmp_path).read_bytes()
    for name, request, line in (
        ("EV_2", good, "asks for"), ("EV_1", forged, "not signed by its own key"), ("EV_1", weak, "must be EC"),
        ("EV_1", other_kind, "must be EC"), ("EV_1", b"empty", "no signing request"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=line):
            identities.provisioning.add([Wanted(Role.VEHICLE, name, 1, request=request)])
    assert tree(identities.folder) == before


def test_a_passphrase_keeps_the_authoritys_key_from_who_finds_the_backup(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    locked = Provisioning(folder, passphrase=b"correct horse")
    locked.init(("localhost",))
    assert b"ENCRYPTED PRIVATE KEY" in (folder / "ca" / "ca.key").read_bytes()
    locked.add([Wanted(Role.VEHICLE, "EV_1", 1)])
    before = tree(folder)
    with pytest.raises(ConfigError, match="set VOLTWATCH_CA_PASSPHRASE"):
        Provisioning(folder).add([Wanted(Role.VEHICLE, "EV_2", 1)])
    wrong = {"VOLTWATCH_CA_PASSPHRASE": "wrong staple"}
    told = fleet_cloud("vehicle", "EV_2", "--output", str(folder), **wrong)
    assert told.returncode == 78
    assert "does not open its key" in told.stderr
    assert "staple" not in told.stderr
    assert len(Provisioning(folder).listing()) == 3, "who only looks needs no key"
    assert tree(folder) == before

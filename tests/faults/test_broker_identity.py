"""A real Mosquitto with the files that provisioning wrote: who may connect, and what each may write and read."""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloud.identity import authority as ca
from cloud.identity.names import Role
from edge_agent.contract import messages, topics
from tests.brokers import wait_for
from tests.identities import Identities, Peer, TlsBroker, signed

ME, OTHER = "EV_1", "EV_2"
DENIED = "Not authorized"
WRITES = {
    *(f"alert/{kind}" for kind in topics.ALERT_TYPES), *(f"current/{kind}" for kind in topics.ALERT_TYPES),
    "notice", "drift", "sample", "status", "model/state",
}  # fmt: skip
ORDERS = {"ack", "model/desired"}
UNKNOWN = {"alert", "alert/x", "current/x", "alert/anomaly/x", "model", "model/x", "command", "status/x", "drift/x"}
LEAVES = sorted(WRITES | ORDERS | UNKNOWN)
ELSEWHERE = (
    "voltwatch/v1",
    "voltwatch/v1/status",
    "voltwatch/v2/EV_1/status",
    "EV_1/status",
    "$SYS/broker/x",
    "x",
    "/",
)
# role → vehicle → what it may write; and read
WRITE = {
    "vehicle": {ME: WRITES, OTHER: set()},
    "collector": {ME: ORDERS, OTHER: ORDERS},
    "subscriber": {ME: set(), OTHER: set()},
}
READ = {
    "vehicle": {ME: ORDERS, OTHER: set()},
    "collector": {ME: WRITES | ORDERS, OTHER: WRITES | ORDERS},
    "subscriber": {v: {leaf for leaf in WRITES if leaf.startswith(("alert", "current"))} for v in (ME, OTHER)},
}


class Site:
    """Identities and their broker."""

    def __init__(self, folder: Path) -> None:
        self.identities = Identities(folder)
        self.folders = {
            "vehicle": self.identities.vehicle(ME), OTHER: self.identities.vehicle(OTHER),
            "collector": self.identities.collector(), "subscriber": self.identities.subscriber("screen"),
        }  # fmt: skip
        self.broker = TlsBroker(self.identities)
        self.broker.start()

    def peer(self, who: str | Path, **options: object) -> Peer:
        folder = who if isinstance(who, Path) else self.folders[who]
        return Peer(self.broker.port, folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For tests that change nothing of it."""
    site = Site(tmp_path_factory.mktemp("shared") / "its identities")
    yield site
    site.broker.stop()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    own = Site(tmp_path / "identity")
    yield own
    own.broker.stop()


# What each may do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("role", ["vehicle", "collector", "subscriber"])
def test_each_role_writes_exactly_its_own_topics(shared: Site, role: str, *, retain: bool) -> None:
    peer = shared.peer(role)
    assert not peer.refused
    for vehicle_id in (ME, OTHER):
        for leaf in LEAVES:
            said = peer.publish(topic := f"{topics.ROOT}/{vehicle_id}/{leaf}", b"", retain=retain)
            assert (said != DENIED) == (leaf in WRITE[role][vehicle_id]), (role, topic, said)
            assert said in {DENIED, "Success", "No matching subscribers"}, (topic, said)
    for topic in ELSEWHERE:
        assert peer.publish(topic, b"x", retain=retain) == DENIED, topic
    peer.close()


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("role", ["vehicle", "collector", "subscriber"])
def test_each_role_receives_exactly_what_it_may_read_whatever_it_subscribes_to(
    shared: Site, role: str, *, retain: bool
) -> None:
    writers = {ME: shared.peer("vehicle"), OTHER: shared.peer(OTHER), "collector": shared.peer("collector")}
    reader = shared.folders[role]
    writers.pop({"vehicle": ME}.get(role, role), None)  # one connection a certificate: the reader writes its own
    peer = None if retain else shared.peer(role)
    filters = ("#", "+/+/+/#", f"{topics.ROOT}/#", f"{topics.ROOT}/{OTHER}/ack", "$SYS/#", "$share/g/voltwatch/#")
    if peer is not None:
        for wanted in filters:
            peer.subscribe(wanted)
    else:
        own = shared.peer(role)
        writers[role] = own
    written: list[str] = []
    token = f"{role}{retain}{time.monotonic_ns()}".encode()
    for vehicle_id in (ME, OTHER):
        for leaf in sorted(WRITES | ORDERS):
            name = vehicle_id if leaf in WRITES else "collector"
            writer = writers.get(name) or writers.get({ME: "vehicle"}.get(name, name)) or peer
            assert writer is not None
            topic = f"{topics.ROOT}/{vehicle_id}/{leaf}"
            assert writer.publish(topic, token, retain=retain) != DENIED
            written.append(topic)
    if peer is None:
        own.close()
        peer = Peer(shared.broker.port, reader)
        for wanted in filters:
            peer.subscribe(wanted)
    expected = {f"{topics.ROOT}/{v}/{leaf}" for v, leaves in READ[role].items() for leaf in leaves}
    wait_for(lambda: expected <= {t for t, _, _ in peer.received}, what=f"{role} receives what it may")
    time.sleep(0.3)
    assert {topic for topic, _, _ in peer.received} == expected
    assert {payload for _, payload, _ in peer.received} == {token}
    peer.close()
    for writer in writers.values():
        writer.close()
    if retain:
        for folder, leaves in (("vehicle", WRITES), (OTHER, WRITES), ("collector", ORDERS)):
            cleaner = shared.peer(folder)
            for v in {"vehicle": [ME], OTHER: [OTHER], "collector": [ME, OTHER]}[folder]:
                for leaf in leaves:
                    cleaner.publish(f"{topics.ROOT}/{v}/{leaf}", b"", retain=True)
            cleaner.close()


def test_a_vehicle_can_make_the_broker_retain_only_a_bounded_number_of_messages(shared: Site) -> None:
    peer = shared.peer("vehicle")
    for number in range(50):
        for leaf in (f"alert/x{number}", f"current/x{number}", f"status/{number}", f"sample/{number}"):
            assert peer.publish(f"{topics.ROOT}/{ME}/{leaf}", b"x", retain=True) == DENIED
    peer.close()


def test_a_will_reaches_only_the_vehicles_own_topics(site: Site) -> None:
    collector = site.peer("collector")
    collector.subscribe(f"{topics.ROOT}/+/#")
    for will in (f"{topics.ROOT}/{OTHER}/status", f"{topics.ROOT}/{OTHER}/ack", f"{topics.ROOT}/{ME}/ack"):
        site.peer("vehicle", will=will).vanish()
    site.peer("vehicle", will=topics.status(ME)).vanish()
    wait_for(lambda: collector.received, what="the vehicle's own will")
    time.sleep(0.3)
    assert [topic for topic, _, _ in collector.received] == [topics.status(ME)]
    collector.close()


@pytest.mark.parametrize("name", ["#", "+", "a/b", f"{ME}/alert", f"{ME}/#", "../EV_1", "%u", "\u202eEV_1", "_x", " "])
def test_a_name_that_provisioning_refuses_gains_nothing_even_when_signed(
    shared: Site, tmp_path: Path, name: str
) -> None:
    strange = shared.peer(signed(shared.identities.authority(), tmp_path / "strange", name))
    collector = shared.peer("collector")
    if not strange.refused:
        assert strange.subscribe("#")
        for vehicle_id in (ME, OTHER):
            for leaf in LEAVES:
                assert strange.publish(f"{topics.ROOT}/{vehicle_id}/{leaf}") == DENIED, (name, leaf)
        for leaf in ORDERS:
            collector.publish(f"{topics.ROOT}/{ME}/{leaf}", b"for EV_1 alone")
        time.sleep(0.2)
        assert strange.received == []
    strange.close()
    collector.close()


def test_a_message_of_the_contracts_size_passes_and_a_larger_one_is_announced_as_too_large(site: Site) -> None:
    peer = site.peer("vehicle")
    assert peer.publish(topics.sample(ME), b"x" * messages.MAX_MESSAGE_BYTES) == "No matching subscribers"
    assert messages.MAX_MESSAGE_BYTES < peer.maximum_packet < messages.MAX_MESSAGE_BYTES + 2048
    peer.publish(topics.sample(ME), b"x" * (peer.maximum_packet + 1))
    wait_for(lambda: peer.ended, what="who ignores that is disconnected")


def test_three_thousand_messages_wait_for_a_collector_that_is_away(site: Site) -> None:
    away = site.peer("collector", keep_session=True)
    away.subscribe(topics.subscription("drift"))
    away.close()
    peer = site.peer("vehicle")
    mids = [peer.client.publish(topics.drift(ME), str(n).encode(), qos=1) for n in range(3000)]
    for mid in mids:
        mid.wait_for_publish(30)
    back = site.peer("collector", keep_session=True)
    wait_for(lambda: len(back.received) == 3000, 30, what="all of them")
    assert [int(payload) for _, payload, _ in back.received] == list(range(3000))
    back.close()
    peer.close()


# Who may connect ------------------------------------------------------------------------------------------------


def test_a_client_without_a_good_certificate_is_refused(shared: Site, tmp_path: Path) -> None:
    authority, now = shared.identities.authority(), datetime.now(UTC)
    trusted = shared.folders["vehicle"] / "ca.crt"
    foreign = ca.new_authority(now)
    refused = {
        "none": None,
        "foreign": signed(foreign, tmp_path / "foreign", ME),
        "expired": signed(authority, tmp_path / "expired", ME, at=now - timedelta(days=9), days=8),
        "not yet valid": signed(authority, tmp_path / "early", ME, at=now + timedelta(days=1)),
        "the broker's own": shared.identities.folder / "broker",
    }
    for why, folder in refused.items():
        peer = Peer(shared.broker.port, folder, ca_file=trusted)
        assert peer.refused, why
    assert not shared.peer("vehicle").refused
    assert f"as {ME} " not in shared.broker.log().split("certificate verify failed")[-2]


def test_without_tls_nobody_is_heard(shared: Site) -> None:
    with socket.create_connection(("127.0.0.1", shared.broker.port), 5) as plain:
        plain.sendall(bytes([0x10, 16, 0, 4]) + b"MQTT" + bytes([5, 2, 0, 30, 0, 0, 3]) + b"EV1")
        plain.settimeout(5)
        with contextlib.suppress(OSError):  # closed is as good as silent
            assert not plain.recv(100).startswith(b"\x20"), "no CONNACK"


def test_a_vehicle_refuses_what_is_not_the_broker_of_its_authority(shared: Site, tmp_path: Path) -> None:
    context = ssl.create_default_context(cafile=str(shared.folders["vehicle"] / "ca.crt"))
    context.load_cert_chain(shared.folders["vehicle"] / "identity.pem")
    foreign = Identities(tmp_path / "foreign")
    told = Peer(shared.broker.port, shared.folders["vehicle"], ca_file=foreign.folder / "ca" / "ca.crt").refused
    assert "self-signed" in told or "unable to get" in told
    with (
        socket.create_connection(("127.0.0.1", shared.broker.port), 5) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        context.wrap_socket(plain, server_hostname="broker.example")


def test_the_key_of_a_stolen_vehicle_cannot_play_the_broker(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "identity")
    thief = TlsBroker(identities)
    stolen = signed(identities.authority(), tmp_path / "thief", ME, hosts=("localhost",))
    (thief.folder / "identity.pem").write_bytes((stolen / "identity.pem").read_bytes())
    thief.start()
    try:
        assert "unsuitable certificate purpose" in Peer(thief.port, identities.vehicle(OTHER)).refused
    finally:
        thief.stop()


def test_revoking_ends_new_connections_and_what_an_open_one_may_do(site: Site) -> None:
    peer, other = site.peer("vehicle"), site.peer(OTHER)
    assert peer.publish(topics.drift(ME)) != DENIED
    site.identities.provisioning.revoke(Role.VEHICLE, ME, "stolen")
    assert not other.ended
    site.broker.reload()
    wait_for(lambda: peer.publish(topics.drift(ME)) == DENIED, what="the open connection's rights end")
    assert other.publish(topics.drift(OTHER)) != DENIED
    assert other.ended == []
    assert site.peer("vehicle").refused
    site.identities.provisioning.renew(Role.VEHICLE, [ME])
    site.broker.reload()
    renewed = site.peer("vehicle")
    wait_for(lambda: renewed.publish(topics.drift(ME)) != DENIED, what="the name is good again")
    for one in (peer, other, renewed):
        one.close()


def test_a_renewed_broker_certificate_is_taken_at_a_reload(site: Site) -> None:
    peer = site.peer("vehicle")
    site.identities.provisioning.renew(Role.BROKER, ["broker"], hosts=("127.0.0.1", "broker.example"))
    site.broker.reload()
    wait_for(lambda: "localhost" in site.peer(OTHER).refused, what="the new certificate is shown")
    assert peer.publish(topics.drift(ME)) != DENIED, "open connections go on"
    peer.close()


# Two with one identity ------------------------------------------------------------------------------------------


def test_no_vehicle_takes_over_anothers_connection_or_the_collectors_session(site: Site) -> None:
    collector = site.peer("collector", client_id="voltwatch-collector", keep_session=True)
    collector.subscribe(f"{topics.ROOT}/+/#")
    peer = site.peer("vehicle", client_id="EV_1")
    for stolen in ("voltwatch-collector", "_collector-default", "EV_1"):
        thief = site.peer(OTHER, client_id=stolen)
        assert not thief.refused
        thief.close()
    assert peer.publish(topics.drift(ME), b"still here") == "Success"
    wait_for(lambda: (topics.drift(ME), b"still here", False) in collector.received)
    assert (collector.ended, peer.ended) == ([], [])
    collector.close()
    peer.close()


def test_a_second_client_with_the_same_identity_shows_in_the_brokers_log(site: Site) -> None:
    first = site.peer("vehicle", client_id="agent")
    second = site.peer("vehicle", client_id="clone")
    wait_for(lambda: first.ended, what="the first is let go")
    assert f"Client {ME} already connected, closing old connection" in site.broker.log()
    assert second.publish(topics.drift(ME)) != DENIED
    second.close()


def test_no_private_key_is_in_the_brokers_log(shared: Site) -> None:
    said = "".join(shared.broker.log().split()).encode()
    assert said
    for key in shared.identities.private_keys():
        assert key not in said

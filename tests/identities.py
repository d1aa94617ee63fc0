"""A folder of identities, the Mosquitto that its files configure, and clients that hold one of its identities."""

import os
import signal
import ssl
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud.identity import authority as ca
from cloud.identity.durable import PUBLIC, SECRET, Content, place
from cloud.identity.names import Role
from cloud.identity.provisioning import DAYS, Provisioning, Wanted
from cloud.identity.vehicle_folder import vehicle_files
from tests.brokers import Broker, free_port, wait_for

COLLECTOR = ("collector", "default")


class Identities:
    """A folder of identities for a broker on 127.0.0.1."""

    def __init__(self, folder: Path, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> None:
        self.folder = folder
        self.port = free_port()
        self.provisioning = Provisioning(folder)
        self.provisioning.init(hosts, self.port)

    def vehicle(self, name: str, base: Path | None = None) -> Path:
        host, port = self.provisioning.broker()
        wanted = Wanted(Role.VEHICLE, name, DAYS[Role.VEHICLE], vehicle_files(name, "", base, host, port))
        return self.provisioning.add([wanted])[0].folder

    def subscriber(self, name: str) -> Path:
        return self.provisioning.add([Wanted(Role.SUBSCRIBER, name, 365)])[0].folder

    def authority(self) -> ca.Authority:
        folder = self.folder / "ca"
        return ca.load_authority((folder / "ca.key").read_bytes(), (folder / "ca.crt").read_bytes(), "test")

    def collector(self) -> Path:
        return self.folder.joinpath(*COLLECTOR)

    def private_keys(self) -> list[bytes]:
        """The base64 of every private key: what must appear nowhere else."""
        keys = []
        for path in (*self.folder.rglob("*.pem"), *self.folder.rglob("*.key")):
            text = path.read_bytes()
            if b"PRIVATE KEY" in text:
                keys.append(b"".join(text.split(b"PRIVATE KEY-----")[1].split(b"-----END")[0].split())[20:100])
        return keys


def signed(
    authority: ca.Authority,
    folder: Path,
    name: str,
    role: Role = Role.VEHICLE,
    *,
    at: datetime | None = None,
    days: int = 365,
    hosts: tuple[str, ...] = (),
) -> Path:
    """Sign what provisioning would refuse to, or from another authority; returns the identity's folder."""
    key = ca.new_key()
    made = ca.issue(authority, key.public_key(), name, role, at=at or datetime.now(UTC), days=days, hosts=hosts)
    identity = Content(ca.key_pem(key) + ca.certificate_pem(made), SECRET)
    place(folder, {"identity.pem": identity, "ca.crt": Content(authority.certificate_pem(), PUBLIC)})
    return folder


class TlsBroker(Broker):
    """Mosquitto as the generated files configure it, on loopback only."""

    def __init__(self, identities: Identities) -> None:
        super().__init__(identities.folder / "broker")
        self.port = identities.port

    def start(self) -> None:
        text = (self.folder / "mosquitto.conf").read_text()
        assert f"\nlistener {self.port}\n" in text
        text = text.replace(f"\nlistener {self.port}\n", f"\nlistener {self.port} 127.0.0.1\n")
        config = self.folder / "here.conf"
        config.write_text(text + ("user root\n" if os.getuid() == 0 else ""))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([self.path, "-c", str(config)], stdout=log, stderr=log)
        wait_for(self._listens, what="mosquitto listens")

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def log(self) -> str:
        return (self.folder / "log").read_text()


class Peer:
    """A client with an identity. Waits for every answer; remembers what it received and how it ended."""

    def __init__(
        self, port: int, identity: Path | None, *, client_id: str = "", will: str = "", ca_file: Path | None = None,
        keep_session: bool = False,
    ) -> None:  # fmt: skip
        self.received: list[tuple[str, bytes, bool]] = []
        self.ended: list[str] = []
        self.refused = ""
        self.maximum_packet = 0
        self._answers: dict[int, str] = {}
        self._answered = threading.Condition()
        up = threading.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5,
                             reconnect_on_failure=False)  # fmt: skip
        context = ssl.create_default_context(cafile=str(ca_file or (identity or Path()) / "ca.crt"))
        if identity is not None:
            context.load_cert_chain(identity / "identity.pem")
        client.tls_set_context(context)
        if will:
            client.will_set(will, b"gone", qos=1, retain=True)

        def connected(_c: object, _u: object, _f: object, reason: object, answer: object) -> None:
            self.maximum_packet = int(getattr(answer, "MaximumPacketSize", 0))
            if str(reason) != "Success":
                self.refused = str(reason)
            up.set()

        def ended(_c: object, _u: object, flags: paho.DisconnectFlags, reason: object, _p: object) -> None:
            self.ended.append(str(reason) if flags.is_disconnect_packet_from_server else "closed")
            if not up.is_set():
                self.refused = "closed"
            up.set()
            with self._answered:
                self._answered.notify_all()

        client.on_connect, client.on_disconnect = connected, ended
        client.on_publish = lambda _c, _u, mid, reason, _p: self._answer(mid, str(reason))
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._answer(mid, str(reasons[0]))
        client.on_message = lambda _c, _u, m: self.received.append((m.topic, bytes(m.payload), m.retain))
        self.client = client
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600 if keep_session else 0
        try:
            client.connect("localhost", port, 30, clean_start=not keep_session, properties=properties)
        except OSError as error:
            self.refused = f"{type(error).__name__}: {error}"
            return
        client.loop_start()
        if not up.wait(10):
            self.refused = "no answer"

    def _answer(self, mid: int, reason: str) -> None:
        with self._answered:
            self._answers[mid] = reason
            self._answered.notify_all()

    def _wait(self, mid: int | None) -> str:
        assert mid is not None
        with self._answered:
            self._answered.wait_for(lambda: mid in self._answers or self.ended, 10)
            return self._answers.get(mid, "none")

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """Publish at QoS 1; returns the broker's reason."""
        return self._wait(self.client.publish(topic, payload, qos=1, retain=retain).mid)

    def subscribe(self, topic: str) -> str:
        return self._wait(self.client.subscribe(topic, qos=1)[1])

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self) -> None:
        """End without a word, so that the broker publishes the will."""
        self.client.on_disconnect = None
        sock = self.client.socket()
        self.client.loop_stop()
        if sock is not None:
            sock.close()

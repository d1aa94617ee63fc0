"""The collector's link to the broker: the only paho in the cloud.

A message is acknowledged to the broker, and its vehicle told so, only after the commit that holds it. While the store
is away nothing is acknowledged: the broker's window fills, which is the back-pressure, and everything comes again after
a restart. What decides is `ingest`; here are only the socket, the batch and the waiting.

paho runs on the event loop's own thread (its external-loop interface), so that an acknowledgement can never meet a
connection other than the one its message came on: packet ids mean something else on the next one.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
import sqlalchemy as sa
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from cloud.collector import ingest
from cloud.collector.tls import TlsFiles, certificate_ends, explain, explain_text, tls_context
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.items import EventItem, Item, ParkItem, RefusedItem
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError, MessageError

log = logging.getLogger(__name__)
_RANGES_AN_ACK = 1024  # the contract's limit
_SHORT_LIFE_S = 60.0  # a connection the broker ends sooner, several times in a row, has a rival or a broken broker
_SUSPICIOUS = 3
RENEW_WITHIN_S = 30 * 86_400.0  # time for a person to notice, and to act


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorConfig:
    """How the collector meets its broker."""

    host: str = "127.0.0.1"
    port: int = 1883
    client_id: str = "voltwatch-collector"  # the same at every start, one a store: the broker keeps the session
    username: str = ""
    password: str = field(default="", repr=False)
    tls: TlsFiles | None = None  # None: in the clear, for a broker on the same machine
    keepalive_s: int = 30
    session_expiry_s: int = 7 * 86_400  # a long weekend's outage; the vehicles keep everything anyway
    receive_maximum: int = 500  # unacknowledged messages in memory: at the very most 500 times 64 kB
    batch_messages: int = 500
    batch_wait_s: float = 0.05  # one fsync for what comes within it
    quiet_s: float = 0.005  # a pause this long ends the batch earlier
    connect_timeout_s: float = 10.0
    retry_min_s: float = 0.5
    retry_max_s: float = 30.0
    store_retry_max_s: float = 5.0


@dataclass(slots=True)
class Link:
    """What /health says about the broker."""

    address: str
    connected: bool = False
    protocol: str = ""
    since_s: float | None = None  # Unix seconds
    detail: str = "not connected yet"
    certificate_until_s: float | None = None  # Unix seconds; our own

    def warning(self, now_s: float) -> str:
        """Say that our certificate ends soon; empty while it does not."""
        if self.certificate_until_s is None or self.certificate_until_s - now_s > RENEW_WITHIN_S:
            return ""
        return f"the collector's certificate ends at {iso_time(self.certificate_until_s)}; renew it"


@dataclass(frozen=True, slots=True)
class _Received:
    connection: int  # which connection it came on
    mid: int
    qos: int
    item: Item


def parse_broker(text: str) -> tuple[str, int]:
    """Read HOST:PORT (or HOST). Raises `ConfigError`."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "1883")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"broker {text!r}: write HOST:PORT, as 127.0.0.1:1883")
    return host, int(port)


class Collector:
    """Runs until its task is cancelled. `wall` is the server's clock, Unix seconds."""

    def __init__(self, store: FleetStore, config: CollectorConfig, *, wall: Callable[[], float] = time.time) -> None:
        self.link = Link(f"{config.host}:{config.port}")
        self.counters: Counter[str] = Counter()
        self.store_detail = ""  # why the newest commit did not succeed; empty when it did
        self._store = store
        self._config = config
        self._wall = wall
        self._protocol = MQTTProtocolVersion.MQTTv5
        self._inbox: deque[_Received] = deque()
        self._arrived = asyncio.Event()
        self._connection = 0
        self._client: paho.Client | None = None
        self._closed_silently = 0
        self._refused_by_name = False
        self._tls_detail = ""  # what TLS had to say about this connection
        self._short_lives = 0

    async def run(self) -> None:
        """Connect, collect, and connect again; only cancellation, or a fault of our own, ends it."""
        committing = asyncio.create_task(self._commit_forever(), name="collector-commit")
        try:
            attempt = 0
            while not committing.done():
                began = time.monotonic()
                try:
                    await self._one_connection(committing)
                except ConfigError as error:  # a file of TLS, since the start
                    self._lost(str(error))
                except (OSError, TimeoutError, ValueError) as error:
                    said = explain(error) if self._config.tls else ""
                    said = said or str(error) or "no answer in time"
                    self._lost(f"broker {self.link.address}: {said}")
                if time.monotonic() - began > self._config.retry_max_s:
                    attempt = 0
                # jittered: a fleet of collectors does not return in step
                ceiling = min(self._config.retry_max_s, self._config.retry_min_s * 2**attempt)
                await asyncio.sleep(random.uniform(self._config.retry_min_s / 2, ceiling))  # noqa: S311
                attempt = min(attempt + 1, 16)
            committing.result()
        finally:
            committing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await committing
            self.link.connected = False
            self.link.detail = "stopped"

    # --- the connection ---

    async def _one_connection(self, committing: "asyncio.Task[None]") -> None:
        """One connection from CONNECT to its end. Returns, or raises `OSError` or `TimeoutError`, when it is over."""
        loop = asyncio.get_running_loop()
        up: asyncio.Future[None] = loop.create_future()
        over: asyncio.Future[str] = loop.create_future()
        client = self._make_client(up, over)
        pump = _SocketPump(client, loop, over)
        self._client = client
        try:
            # the address and the TCP handshake block, so they go to a thread; paho's callbacks may come back from it
            connecting = loop.run_in_executor(None, self._connect, client, pump)
            await asyncio.wait_for(connecting, self._config.connect_timeout_s)
            pump.start()
            answers: set[asyncio.Future[Any]] = {up, over}
            ends: set[asyncio.Future[Any]] = {over, committing}
            await asyncio.wait(answers, timeout=self._config.connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not up.done() and not over.done():
                raise TimeoutError("no answer to CONNECT in time")
            if up.done():
                self._closed_silently = 0
                began = loop.time()
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                self._short_lives = self._short_lives + 1 if loop.time() - began < _SHORT_LIFE_S else 0
            elif not self._refused_by_name and not self._tls_detail:
                self._suspect_protocol()
            if over.done():
                self._lost(f"broker {self.link.address}: {self._tls_detail or over.result()}{self._rival()}")
        finally:
            pump.stop()
            self._connection += 1  # what is still in the inbox can no longer be acknowledged to the broker
            self._client = None

    def _connect(self, client: paho.Client, pump: "_SocketPump") -> None:
        """Open the connection; runs in a thread."""
        options: dict[str, Any] = {}
        if self._protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = self._config.session_expiry_s
            properties.ReceiveMaximum = self._config.receive_maximum
            options = {"clean_start": False, "properties": properties}
        client.connect(self._config.host, self._config.port, keepalive=self._config.keepalive_s, **options)
        if pump.stopped:  # given up meanwhile: a late connection would take the session from its successor
            pump.close_socket()

    def _make_client(self, up: "asyncio.Future[None]", over: "asyncio.Future[str]") -> paho.Client:
        self._refused_by_name = False
        clean: dict[str, Any] = {} if self._protocol == MQTTProtocolVersion.MQTTv5 else {"clean_session": False}
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self._config.client_id, protocol=self._protocol, manual_ack=True,
            reconnect_on_failure=False, **clean,
        )  # fmt: skip
        client.connect_timeout = self._config.connect_timeout_s / 2
        self._secure(client)
        if self._config.username:
            client.username_pw_set(self._config.username, self._config.password)
        connection = self._connection

        def on_connect(_c: Any, _u: Any, flags: paho.ConnectFlags, reason: ReasonCode, _p: Any) -> None:
            if reason.is_failure:
                self._refused(reason)
                _finish(over, f"refused the connection: {reason}")
                return
            self.link.connected = True
            self.link.protocol = "MQTT 5" if self._protocol == MQTTProtocolVersion.MQTTv5 else "MQTT 3.1.1"
            self.link.since_s = self._wall()
            self.link.detail = ""
            self.counters["connects"] += 1
            self.counters["sessions_resumed"] += int(flags.session_present)
            log.info("collector: connected to %s with %s", self.link.address, self.link.protocol)
            client.subscribe(self._subscriptions())
            if not up.done():
                up.set_result(None)

        def on_subscribe(_c: Any, _u: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
            if any(reason.is_failure for reason in reasons):
                _finish(over, "refused a subscription; the collector's account needs read access to voltwatch/v1/+/#")

        def on_disconnect(_c: Any, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
            _finish(over, f"connection lost: {reason}")

        def on_message(_c: Any, _u: Any, message: paho.MQTTMessage) -> None:
            try:
                topic = message.topic
            except UnicodeDecodeError:
                topic = repr(message._topic)  # noqa: SLF001 - paho decodes late
            item = ingest.decide(topic, bytes(message.payload), retained=message.retain)
            self.counters["received"] += 1
            self._inbox.append(_Received(connection, message.mid, message.qos, item))
            self._arrived.set()

        client.on_connect, client.on_subscribe = on_connect, on_subscribe
        client.on_disconnect, client.on_message = on_disconnect, on_message
        return client

    def _secure(self, client: paho.Client) -> None:
        """Turn TLS on where it is wanted. Raises `ConfigError` for files that have gone bad since the start."""
        self._tls_detail = ""
        if self._config.tls is None:
            return

        def on_log(_c: Any, _u: Any, level: int, text: str) -> None:
            if level == LogLevel.MQTT_LOG_ERR:
                self._tls_detail = explain_text(text) or self._tls_detail

        client.tls_set_context(tls_context(self._config.tls))
        ends = certificate_ends(self._config.tls)
        self.link.certificate_until_s = None if ends is None else ends.timestamp()
        client.on_log = on_log  # in TLS 1.3 the broker's refusal follows the handshake, and paho only logs it

    def _subscriptions(self) -> list[tuple[str, Any]]:
        if self._protocol != MQTTProtocolVersion.MQTTv5:
            return [(wanted, 1) for wanted in ingest.SUBSCRIPTIONS]
        # a resumed session gets no retained message again: what changed meanwhile is in its queue
        once = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
        return [(wanted, once) for wanted in ingest.SUBSCRIPTIONS]

    def _refused(self, reason: ReasonCode) -> None:
        """Go on with 3.1.1 where the broker says that it does not speak MQTT 5."""
        self._refused_by_name = True
        if self._protocol == MQTTProtocolVersion.MQTTv5 and reason.getName() == "Unsupported protocol version":
            log.warning("collector: %s does not speak MQTT 5; going on with 3.1.1", self.link.address)
            self._protocol = MQTTProtocolVersion.MQTTv311

    def _suspect_protocol(self) -> None:
        """Try the other version where a broker hangs up on CONNECT without a word: some do on one they do not know."""
        self._closed_silently += 1
        if self._closed_silently % 2 == 0:
            was5 = self._protocol == MQTTProtocolVersion.MQTTv5
            self._protocol = MQTTProtocolVersion.MQTTv311 if was5 else MQTTProtocolVersion.MQTTv5
            log.warning(
                "collector: %s hangs up on CONNECT; trying MQTT %s", self.link.address, "3.1.1" if was5 else "5"
            )

    def _rival(self) -> str:
        """Say what a broker like Mosquitto does not: that somebody else connected as us, and we took it back."""
        if self._short_lives < _SUSPICIOUS:
            return ""
        return f"; {self._short_lives} times in a row: does another process collect with this identity?"

    def _lost(self, detail: str) -> None:
        if self.link.connected or detail != self.link.detail:
            log.warning("collector: %s; trying again", detail)
        self.link.connected = False
        self.link.since_s = None
        self.link.detail = detail

    # --- the batch ---

    async def _commit_forever(self) -> None:
        while True:
            batch = await self._batch()
            committed = await self._commit([received.item for received in batch])
            self._acknowledge(batch, committed)

    async def _batch(self) -> list[_Received]:
        """Wait for messages, then for the moment when no more come, or the batch is full, or its time is over."""
        while not self._inbox:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = time.monotonic() + self._config.batch_wait_s
        known = 0
        while known != len(self._inbox) < self._config.batch_messages and time.monotonic() < deadline:
            known = len(self._inbox)
            await asyncio.sleep(self._config.quiet_s)
        return [self._inbox.popleft() for _ in range(min(len(self._inbox), self._config.batch_messages))]

    async def _commit(self, items: Sequence[Item]) -> list[Item]:
        """Commit, however long the store is away, and return what was.

        A message that the store can never hold does not stop the others: it is refused, and its vehicle keeps it.
        """
        attempt = 0
        while True:
            try:
                written = await self._store.commit(items, received_at_s=self._wall())
            except StoreAwayError as error:
                self.counters["store_away"] += 1
                if not self.store_detail:
                    log.warning("collector: %s; nothing is acknowledged until it is back", error)
                self.store_detail = str(error)
                ceiling = min(self._config.store_retry_max_s, 0.1 * 2**attempt)
                await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311
                attempt = min(attempt + 1, 10)
            except (sa.exc.SQLAlchemyError, MessageError, OverflowError, ValueError) as error:
                if len(items) > 1:
                    return [done for item in items for done in await self._commit([item])]
                log.exception("collector: a message that no rule refused cannot be stored")
                if isinstance(items[0], RefusedItem):
                    return []
                topic = getattr(items[0], "topic", "")
                return await self._commit([RefusedItem("store_refused", topic, str(error), b"")])
            else:
                self.store_detail = ""
                self.counters["commits"] += 1
                self.counters["stored"] += written.stored
                self.counters["duplicates"] += written.duplicates
                self.counters["refused"] += sum(isinstance(item, RefusedItem) for item in items) + len(written.refused)
                self.counters["parked"] += sum(isinstance(item, ParkItem) for item in items)
                return [item for item in items if not (isinstance(item, EventItem) and item.key in written.refused)]

    def _acknowledge(self, batch: list[_Received], committed: list[Item]) -> None:
        """Tell the broker that it may forget the batch, and each vehicle what is committed."""
        client = self._client
        for received in batch:
            if client is not None and received.connection == self._connection and received.qos:
                client.ack(received.mid, received.qos)
        if client is None or not self.link.connected:
            return  # the vehicle sends again, and is told then
        now = iso_time(self._wall())
        for (vehicle_id, stream_id), seqs in ingest.ack_keys(committed).items():
            told = messages.ranges(seqs)
            for first in range(0, len(told), _RANGES_AN_ACK):
                ack = messages.Ack(stream_id=stream_id, ranges=told[first : first + _RANGES_AN_ACK], time=now)
                client.publish(topics.ack(vehicle_id), messages.encode(ack), qos=1)
                self.counters["acks"] += 1


class _SocketPump:
    """Drives paho from the event loop: reads when the socket is readable, writes when paho has something to say."""

    def __init__(self, client: paho.Client, loop: asyncio.AbstractEventLoop, over: "asyncio.Future[str]") -> None:
        self.stopped = False
        self._client = client
        self._loop = loop
        self._over = over
        self._socket: Any = None  # paho's SocketLike, which is a socket.socket here
        self._misc: asyncio.Task[None] | None = None
        self._writing = False
        client.on_socket_register_write = lambda *_: self._on_loop(self._watch_write)
        client.on_socket_unregister_write = lambda *_: self._on_loop(self._unwatch_write)
        client.on_socket_close = lambda *_: self._on_loop(self._unwatch)

    def _on_loop(self, what: Callable[[], None]) -> None:
        """Call at once on the loop's thread; from the connecting thread, when the loop comes to it."""
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside:
            what()
        else:
            self._loop.call_soon_threadsafe(what)

    def start(self) -> None:
        """Begin with the socket of a connect that has returned."""
        self._socket = self._client.socket()
        if self._socket is None:
            raise OSError("hung up at once")
        self._loop.add_reader(self._socket, self._read)
        if self._client.want_write():
            self._watch_write()
        self._misc = self._loop.create_task(self._misc_forever(), name="collector-keepalive")

    def _step(self, what: Callable[[], object]) -> bool:
        try:
            what()
        except Exception as error:  # noqa: BLE001 - outermost: whatever a broker can make paho raise ends this connection
            log.warning("collector: cannot go on with this connection: %r", error)
            _finish(self._over, f"cannot be understood: {error!r}")
            return False
        return True

    def _read(self) -> None:
        self._step(self._client.loop_read)
        # what TLS has decrypted already no longer makes the socket readable
        while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            if not self._step(self._client.loop_read):
                return

    def _watch_write(self) -> None:
        if self._socket is not None and not self._writing:
            self._loop.add_writer(self._socket, self._step, self._client.loop_write)
            self._writing = True

    def _unwatch_write(self) -> None:
        if self._socket is not None and self._writing:
            self._loop.remove_writer(self._socket)
        self._writing = False

    def _unwatch(self) -> None:
        if self._socket is not None:
            self._unwatch_write()
            self._loop.remove_reader(self._socket)
            self._socket = None

    async def _misc_forever(self) -> None:
        """Keep-alive: paho sends its pings, and notices a broker that no longer answers them, when asked."""
        while not self._over.done():
            self._step(self._client.loop_misc)
            await asyncio.sleep(1)

    def stop(self) -> None:
        """Say goodbye, so that the broker does not wait for the keep-alive, and close. The session stays."""
        self.stopped = True
        if self._misc is not None:
            self._misc.cancel()
        self._unwatch()
        self._client.on_disconnect = None
        self._client.disconnect()
        self._step(self._client.loop_write)
        self.close_socket()

    def close_socket(self) -> None:
        """Close whatever socket paho still holds."""
        sock: Any = self._client.socket()
        if sock is not None:
            sock.close()


def iso_time(at_s: float) -> str:
    """Return a Unix time as the contract writes times."""
    whole, milli = divmod(round(at_s * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milli:03d}Z"


def _finish(over: "asyncio.Future[str]", reason: str) -> None:
    """End a connection's future; paho's connect runs in a thread, so its callbacks may too."""
    over.get_loop().call_soon_threadsafe(lambda: None if over.done() else over.set_result(reason))

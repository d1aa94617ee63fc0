"""The link to the broker: one thread, one paho client a connection, and the uplink's decisions carried out.

The only file on the vehicle that imports paho. Nothing is decided here: what to send, when to connect and what an ack
releases is `uplink.py`; what survives is `outbox.py`. A client is thrown away with its connection, so that paho's own
memory of unacknowledged messages never adds to the uplink's, and holds at most the uplink's window.
"""

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.config import BrokerConfig
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import MessageError
from edge_agent.delivery.outbox import Outbox, OutboxError
from edge_agent.delivery.uplink import Connect, Quarantine, Send, Uplink, Wait
from edge_agent.logs import event

CONNECT_TIMEOUT_S = 5.0  # per step: TCP, CONNACK, SUBACK
RETAINED_WINDOW = 16  # status and current/*, beside the uplink's messages
LOSS_INTERVAL_S = 5.0  # a range of shed messages grows so long before it is reported
STOP_S = 2.0  # to send what waits, then the farewell

log = logging.getLogger("voltwatch.link")


class Link:
    """Carries out an uplink over MQTT in a thread of its own. Its methods may be called from any thread.

    `on_ack` and `on_desired` are called in the link's thread with every well-formed ack and desired release; without
    `on_desired` the latter is not subscribed to. `will` is published by the broker, retained, on
    the status topic when the vehicle vanishes; None for who is not the vehicle itself.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        vehicle_id: str,
        outbox: Outbox,
        uplink: Uplink,
        *,
        client_id: str,
        will: bytes | None,
        on_ack: Callable[[messages.Ack], None] = lambda _: None,
        on_desired: Callable[[messages.Desired], None] | None = None,
    ) -> None:
        self._broker = broker
        self._vehicle_id = vehicle_id
        self._outbox = outbox
        self._uplink = uplink
        self._client_id = client_id
        self._will = will
        self._on_ack = on_ack
        self._on_desired = on_desired
        self._protocol = 5 if broker.protocol == 5 else 4
        self._early_ends = 0  # connections in a row that ended before the CONNACK
        self._client: paho.Client | None = None
        self._ready = False
        self._deadline_s = 0.0
        self._in_flight: dict[int, tuple[str, int]] = {}
        self._retained: dict[str, bytes] = {}
        self._retained_dirty: set[str] = set()
        self._retained_flying: dict[int, tuple[str, bytes]] = {}
        self._maximum_packet = 0
        self._silent = False  # the connection ended for want of any answer
        self._losses_due_s = 0.0
        self._generation = -1
        self._inbox: deque[tuple[str, int] | tuple[str, bytes]] = deque()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._stop_s: float | None = None
        self._farewell: bytes | None = None
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self.counters: Counter[str] = Counter()
        self.state = "down"  # down | connecting | up
        self.problem = "no broker yet"  # in plain words; empty when all is well

    def start(self) -> None:
        """Begin to connect; never raises for a broker that is away."""
        self._follow_outbox()
        for topic, payload in self._outbox.retained().items():
            self._keep(topic, payload)
        self._thread.start()

    def appended(self, stream: str, seq: int) -> None:
        """Say that the outbox holds a new message."""
        self._tell((stream, seq))

    def publish_retained(self, topic: str, payload: bytes) -> None:
        """Keep `topic` saying `payload` (empty clears it), now and after every reconnect; the newest wins."""
        self._tell((topic, payload))

    @property
    def idle(self) -> bool:
        """True when the collector has acknowledged everything the link knows of."""
        return self._uplink.idle and not self._inbox and not self._outbox.losses_waiting

    @property
    def settled(self) -> bool:
        """True when, beside `idle`, every retained topic says at the broker what it should."""
        return self.idle and self.state == "up" and not self._retained_dirty and not self._retained_flying

    def stop(self, farewell: bytes | None = None) -> bool:
        """Send what waits if there is a link, say farewell on the status topic, end. False where the thread hangs.

        Takes at most about three seconds, link or no link; what is not acknowledged by then stays in the outbox.
        """
        self._farewell = farewell
        self._stop_s = time.monotonic() + STOP_S
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(STOP_S + 1.0)
        return not self._thread.is_alive()

    def all_counters(self) -> dict[str, int]:
        """Return the counts of the link and of its uplink, as far as they are not zero."""
        return {
            name: n for counter in (self.counters, self._uplink.counters) for name, n in counter.copy().items() if n
        }

    def _tell(self, news: tuple[str, int] | tuple[str, bytes]) -> None:
        self._inbox.append(news)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is there to wake
            self._wake_w.send(b"\0")

    # The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over():
            try:
                self._step()
            except OutboxError as error:
                self._trouble(str(error))
            except Exception as error:
                log.exception("link failed")
                self.counters["link_failures"] += 1
                self._trouble(f"link failed: {type(error).__name__}")
        self._say_farewell()
        self._drop()
        self._wake_r.close()
        self._wake_w.close()

    def _trouble(self, problem: str) -> None:
        """Give up this connection and let the back-off slow the next try."""
        self._drop()
        self._uplink.disconnected(time.monotonic())
        self._set_state("down", problem)
        time.sleep(0.2)

    def _over(self) -> bool:
        if self._stop_s is None:
            return False
        nothing_to_do = not self._ready or (not self._in_flight and not self._inbox)
        return nothing_to_do or time.monotonic() > self._stop_s - STOP_S / 2

    def _step(self) -> None:
        self._follow_outbox()
        self._take_news()
        now_s = time.monotonic()
        if self._ready:
            self._report_losses(now_s)
            self._send_retained()
        wait_s = 1.0
        for _ in range(64):
            match self._uplink.next(now_s):
                case Connect():
                    self._connect()
                    break
                case Send(stream, seq, replayed):
                    self._send(stream, seq, replayed=replayed)
                case Quarantine(stream, seq, reason):
                    self._outbox.quarantine(stream, seq, reason)
                    event(log, "quarantine", level=logging.WARNING, stream=stream, seq=seq, reason=reason)
                case Wait(until_s):
                    wait_s = min(max(until_s - now_s, 0.0), wait_s)
                    break
        else:
            wait_s = 0.0
        self._serve(wait_s)

    def _follow_outbox(self) -> None:
        """Begin anew when the outbox had to: numbers of a file that was moved aside mean nothing in the next."""
        if self._outbox.generation != self._generation:
            self._generation = self._outbox.generation
            self._uplink.renew(self._outbox.stream_ids)
            self._uplink.restore(self._outbox.waiting())

    def _take_news(self) -> None:
        while self._inbox:
            topic_or_stream, what = self._inbox.popleft()
            if isinstance(what, int):
                self._uplink.appended(topic_or_stream, what)
            else:
                self._keep(topic_or_stream, what)

    def _keep(self, topic: str, payload: bytes) -> None:
        self._retained[topic] = payload
        self._retained_dirty.add(topic)

    def _report_losses(self, now_s: float) -> None:
        if self._outbox.losses_waiting and now_s >= self._losses_due_s:
            for seq in self._outbox.flush_losses():
                self._uplink.appended("alert", seq)
            self._losses_due_s = now_s + LOSS_INTERVAL_S

    def _serve(self, wait_s: float) -> None:
        """Let the socket have its turn: read, write, keep alive."""
        client = self._client
        sock = client.socket() if client is not None else None
        if client is None or sock is None:
            select.select([self._wake_r], [], [], wait_s)
            self._clear_wake()
            return
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            wait_s = 0.0  # decrypted bytes wait where select does not see them
        writers = [sock] if client.want_write() else []
        readable, writable, _ = select.select([sock, self._wake_r], writers, [], wait_s)
        if self._wake_r in readable:
            self._clear_wake()
        if sock in readable or wait_s == 0.0:
            client.loop_read()
        if self._client is client and (sock in writable or client.want_write()):
            client.loop_write()
        if self._client is not client:
            return
        if client.loop_misc() == MQTTErrorCode.MQTT_ERR_CONN_LOST:
            self._silent = True
        if not self._ready and self._client is client and time.monotonic() > self._deadline_s:
            self._silent = True
            self._lost(client, "no answer")

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_r.recv(4096):
                pass

    # One connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._set_state("connecting", self.problem)
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=paho.MQTTv5 if self._protocol == 5 else paho.MQTTv311,
            clean_session=None if self._protocol == 5 else True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        bound = self._uplink.limits.window + RETAINED_WINDOW
        client.max_inflight_messages_set(bound)
        client.max_queued_messages_set(bound)
        if self._will is not None:
            client.will_set(topics.status(self._vehicle_id), self._will, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        broker = self._broker
        self._silent, self._ready = False, False
        self._deadline_s = time.monotonic() + 2 * CONNECT_TIMEOUT_S
        try:
            if broker.username:
                client.username_pw_set(broker.username, broker.password)
            if broker.ca:
                client.tls_set(broker.ca, broker.certificate or None, broker.key or None)
            self._client = client
            # paho pings after one keepalive and waits another: three quarters make it one and a half of ours.
            keepalive_s = max(3, round(0.75 * broker.keepalive_s))
            client.connect(broker.host, broker.port, keepalive_s)  # the first connect of a client starts clean
        except (OSError, ValueError) as error:
            self._client = None
            self._uplink.disconnected(time.monotonic())
            reason = getattr(error, "strerror", None) or str(error)
            self._set_state("down", f"broker {broker.host}:{broker.port}: {reason}")

    def _on_connect(
        self, client: paho.Client, _: Any, __: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            if reason.getName() == "Unsupported protocol version":
                self._fall_back()
            self._lost(client, f"refused: {reason.getName()}")
            return
        self._early_ends = 0
        self._maximum_packet = int(getattr(properties, "MaximumPacketSize", 0) or 0)
        self._receive_maximum = int(getattr(properties, "ReceiveMaximum", 65_535) or 65_535)
        wanted = [topics.ack(self._vehicle_id)]
        if self._on_desired is not None:
            wanted.append(topics.model_desired(self._vehicle_id))
        client.subscribe([(topic, 1) for topic in wanted])

    def _on_subscribe(self, client: paho.Client, _: Any, __: int, reasons: list[ReasonCode], ___: Any) -> None:
        if reasons[0].is_failure:
            self._lost(client, f"may not subscribe to its own acks: {reasons[0].getName()}")
            return
        if any(reason.is_failure for reason in reasons[1:]):
            self.counters["desired_not_subscribed"] += 1  # releases are still asked for over HTTP
        self._ready = True
        self._retained_dirty = set(self._retained)
        self._uplink.connected(time.monotonic(), max(1, self._receive_maximum - 2))
        self._set_state("up", "" if self._protocol == self._broker.protocol else "broker speaks MQTT 3.1.1 only")

    def _on_disconnect(self, client: paho.Client, _: Any, flags: Any, reason: ReasonCode, __: Any) -> None:
        self._lost(client, reason.getName() if flags.is_disconnect_packet_from_server else "connection closed")

    def _lost(self, client: paho.Client, why: str) -> None:
        if client is not self._client:
            return
        by_broker = not self._silent
        if not self._ready and not why.startswith(("refused", "may not")):
            self._early_ends += 1
            if self._early_ends % 2 == 0:
                self._fall_back()  # some brokers of 3.1.1 answer a CONNECT of MQTT 5 by closing
        self._drop()
        self._uplink.disconnected(time.monotonic(), by_broker=by_broker)
        broker = self._broker
        self._set_state("down", f"broker {broker.host}:{broker.port}: {'no answer' if self._silent else why}")

    def _fall_back(self) -> None:
        if self._broker.protocol == 5:
            self._protocol = 4 if self._protocol == 5 else 5
            event(log, "protocol", level=logging.WARNING, version="3.1.1" if self._protocol == 4 else "5",
                  reason="broker did not accept the other")  # fmt: skip

    def _drop(self) -> None:
        client, self._client, self._ready = self._client, None, False
        self._in_flight.clear()
        self._retained_flying.clear()
        if client is not None and (sock := client.socket()) is not None:
            client.on_disconnect = None  # no DISCONNECT packet: the broker is to publish the will
            with contextlib.suppress(OSError):
                sock.close()

    def _set_state(self, state: str, problem: str) -> None:
        if (state, problem) != (self.state, self.problem) and state != "connecting":
            level = logging.INFO if state == "up" else logging.WARNING
            where = f"{self._broker.host}:{self._broker.port}"
            event(log, "link", level=level, state=state, broker=where, reason=problem or None)
        self.state, self.problem = state, problem

    # Messages ---------------------------------------------------------------------------------------------------

    def _send(self, stream: str, seq: int, *, replayed: bool) -> None:
        row = self._outbox.get(stream, seq)
        if row is None:
            self._uplink.gone(stream, seq)
            return
        payload = mark_replayed(row.payload) if replayed else row.payload
        if self._maximum_packet and len(payload) + len(row.topic) + 64 > self._maximum_packet:
            self._uplink.condemn(stream, seq, f"larger than the broker's limit of {self._maximum_packet} bytes")
            return
        client = self._client
        if client is None:
            return  # the uplink has been told so
        mid = client.publish(row.topic, payload, qos=1).mid
        if self._client is client:  # else the write found the connection gone, and the uplink knows
            self._in_flight[mid] = (stream, seq)
            self.counters["published"] += 1

    def _send_retained(self) -> None:
        flying = {topic for topic, _ in self._retained_flying.values()}
        for topic in sorted(self._retained_dirty - flying):
            client = self._client
            if client is None or len(self._retained_flying) >= RETAINED_WINDOW:
                return
            payload = self._retained[topic]
            self._retained_dirty.discard(topic)
            mid = client.publish(topic, payload, qos=1, retain=True).mid
            if self._client is client:
                self._retained_flying[mid] = (topic, payload)

    def _on_publish(self, _: paho.Client, __: Any, mid: int, reason: ReasonCode, ___: Any) -> None:
        if mid in self._in_flight:
            stream, seq = self._in_flight.pop(mid)
            if reason.is_failure:
                self._uplink.refused(stream, seq, reason.getName(), time.monotonic())
            else:
                self._uplink.puback(stream, seq, time.monotonic())
        elif mid in self._retained_flying:
            topic, payload = self._retained_flying.pop(mid)
            if reason.is_failure:
                self.counters["retained_refused"] += 1
                return
            self._uplink.proven()
            if not payload:
                self._outbox.forget_retained(topic)
                if not self._retained.get(topic):
                    self._retained.pop(topic, None)
                    self._retained_dirty.discard(topic)

    def _on_message(self, _: paho.Client, __: Any, message: paho.MQTTMessage) -> None:
        if message.topic == topics.model_desired(self._vehicle_id):
            self._take_desired(bytes(message.payload))
            return
        try:
            ack = messages.decode_ack(bytes(message.payload))
        except MessageError as error:
            self.counters["acks_malformed"] += 1
            event(log, "ack refused", level=logging.WARNING, reason=str(error))
            return
        released = self._uplink.acked(ack.stream_id, ack.ranges, time.monotonic())
        if released:
            self._outbox.release(ack.stream_id, released)
            rows = sum(last - first + 1 for first, last in released)
            event(log, "ack", rows=rows, ranges=",".join(f"{first}-{last}" for first, last in released))
            self._on_ack(ack)

    def _take_desired(self, payload: bytes) -> None:
        if not payload or self._on_desired is None:  # cleared: nothing is desired, what runs goes on
            return
        try:
            self._on_desired(messages.decode_desired(payload))
        except MessageError as error:
            self.counters["desired_malformed"] += 1
            event(log, "desired refused", level=logging.WARNING, reason=str(error))

    def _say_farewell(self) -> None:
        """Publish the last status and disconnect in order, so that the broker keeps it instead of the will."""
        client = self._client
        if client is None or not self._ready or self._stop_s is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._farewell is not None:
                mid = client.publish(topics.status(self._vehicle_id), self._farewell, qos=1, retain=True).mid
                self._retained_flying[mid] = (topics.status(self._vehicle_id), self._farewell)
                while mid in self._retained_flying and self._ready and time.monotonic() < self._stop_s:
                    self._serve(0.05)
            client.on_disconnect = None  # that the broker now closes is as it should be
            client.disconnect()
            while client.want_write() and client.socket() is not None and time.monotonic() < self._stop_s:
                client.loop_write()


def mark_replayed(payload: bytes) -> bytes:
    """Return the event with its `replayed` mark set, all else as it was stored."""
    envelope = msgspec.json.decode(payload, type=messages.Event)
    return messages.encode(msgspec.structs.replace(envelope, replayed=True))

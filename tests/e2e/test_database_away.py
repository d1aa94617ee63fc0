"""The cloud on a real PostgreSQL that is away for longer than anybody waits: clear answers meanwhile, nothing lost.

A vehicle with the agent's own outbox and link keeps sending alerts, drift counts and samples through a real Mosquitto.
The outage is longer than every time that is involved (asserted below), so that each of them runs out at least once; a
longer one would only repeat what then happens. VOLTWATCH_TEST_OUTAGE_S makes it longer.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from cloud.api.routes import HEALTH_TIMEOUT_S
from cloud.collector.mqtt import CollectorConfig
from cloud.lake.lake import Lake
from cloud.store import connect
from edge_agent.contract import topics
from edge_agent.delivery.uplink import Limits
from tests.brokers import Broker, broker, free_port, wait_for
from tests.databases import Postgres, postgres
from tests.e2e.test_serve import answers, process
from tests.faults.test_delivery import VEHICLE, Vehicle, envelope
from tests.windows import drift_counts, sample_data

__all__ = ["broker", "postgres"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
ACK_TIMEOUT_S = 6.0
OUTAGE_S = float(os.environ.get("VOLTWATCH_TEST_OUTAGE_S", "16"))
LONGEST_WAIT_S = max(
    connect.COMMAND_TIMEOUT_S, connect.CONNECT_TIMEOUT_S, connect.POOL_TIMEOUT_S, CollectorConfig().store_retry_max_s,
    HEALTH_TIMEOUT_S, ACK_TIMEOUT_S,
)  # fmt: skip


class Sender(Vehicle):
    """A vehicle that goes on and on until it is told to stop: five times a second one of each class."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port, Limits(ack_timeout_s=ACK_TIMEOUT_S, ack_timeout_max_s=12, backlog_per_s=500))
        self.sent: Counter[str] = Counter()
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> "Sender":
        super().start()
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._enough.wait(0.2):
            number = self.sent["alert"] + 1
            self.alert()
            self._append("drift", number, [drift_counts()], topics.drift(VEHICLE))
            self._append("sample", number, sample_data(f"s{number}", parts=2, seed=number), topics.sample(VEHICLE))
            self.sent.update({"alert": 1, "drift": 1, "sample": 2})

    def _append(self, stream: str, number: int, told: list[Any], topic: str) -> None:
        for part, data in enumerate(told):
            seq = self.outbox.append(stream, f"{stream} {number}/{part}", lambda i, s, d=data: envelope(d, i, s), topic)
            self.link.appended(stream, seq)

    def finish(self) -> None:
        """Send nothing new, and wait until everything was acknowledged."""
        self._enough.set()
        self._thread.join()
        wait_for(lambda: not any(self.outbox.waiting().values()), 60, "everything acknowledged")


@pytest.fixture
def sender(broker: Broker, tmp_path: Path) -> Iterator[Sender]:
    vehicle = Sender(tmp_path / "vehicle", broker.port)
    yield vehicle
    vehicle._enough.set()
    vehicle.stop()


def numbers(uri: str, query: str) -> list[Any]:
    async def ask() -> list[Any]:
        connection = await asyncpg.connect(uri)
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(ask())


def telemetry(second: int, *celsius: float, vehicle_id: str) -> dict[str, Any]:
    return {"vehicle_id": vehicle_id, "time": 1000.0 + second, "cell_temperature": list(celsius)}


@contextlib.contextmanager
def cloud(postgres: Postgres, broker: Broker, folder: Path) -> Iterator[httpx.Client]:
    port = free_port()
    words = ("serve", "--port", str(port), "--broker", f"127.0.0.1:{broker.port}", "--database", postgres.uri)
    with process("cloud", *words, "--lake", str(folder / "lake"), cwd=folder) as running:
        output: list[str] = []
        assert running.stdout is not None
        reader = threading.Thread(target=lambda: output.extend(running.stdout or ()))  # a full pipe would stop it
        reader.start()
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(address + "/health"), 30, "serves")
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client
        running.terminate()
        running.wait(15)
        reader.join()
    assert not [line for line in output if line.startswith("Traceback")], "".join(output)


def outage(postgres: Postgres, client: httpx.Client, sender: Sender, how: str) -> None:
    """Take the database away, see what everybody is told, and give it back."""
    over_http = f"EV_{how}"
    for second in (0, 10):
        quiet = telemetry(second, 25.0, 25.5, vehicle_id=over_http)
        assert client.post("/telemetry", json=quiet).status_code == 200
    began = time.monotonic()
    {"crashed": lambda: postgres.stop("immediate"), "held": postgres.hold}[how]()
    told = client.get("/health")
    assert (told.status_code, told.json()["status"]) == (503, "down")
    assert any("store" in problem for problem in told.json()["problems"])
    assert client.get("/").status_code == 200
    metrics = client.get("/metrics")
    assert metrics.status_code == 200
    assert "\nvoltwatch_store_up 0.0\n" in metrics.text
    runaway = telemetry(20, 120.0, 121.0, vehicle_id=over_http)  # a guard's alert
    stranger = telemetry(0, 25.0, 25.5, vehicle_id=f"EV_{how}_new")
    while time.monotonic() - began < OUTAGE_S:
        for answer in (
            client.post("/telemetry", json=runaway), client.post("/telemetry", json=stranger), client.get("/vehicles"),
            client.post("/v1/alerts/a1/confirm", json={"by": "anna", "reason": "seen on the lift"}),
        ):  # fmt: skip
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) > 0
            assert "try again" in answer.json()["detail"]
        time.sleep(1)
    before = dict(sender.sent)
    assert any(sender.outbox.waiting().values())
    {"crashed": postgres.start, "held": postgres.go_on}[how]()
    wait_for(lambda: client.get("/health").status_code == 200, 30, "it is well again, by itself")
    for _ in range(2):  # sent again, as the answer asked for, and once more
        assert client.post("/telemetry", json=runaway).status_code == 200
    wait_for(lambda: all(sender.sent[stream] > before[stream] for stream in before), 10, "it went on sending")


def test_a_database_that_is_away_longer_than_anybody_waits_costs_nothing(
    postgres: Postgres, broker: Broker, sender: Sender, tmp_path: Path
) -> None:
    """Once it crashes and recovers, once it accepts connections and never answers."""
    assert OUTAGE_S > LONGEST_WAIT_S
    with cloud(postgres, broker, tmp_path) as client:
        sender.start()
        wait_for(lambda: client.get("/v1/samples").json()["by_state"]["lake"] > 3, 30, "samples reach the lake")
        assert client.get("/health").json()["store"]["ok"]
        outage(postgres, client, sender, "crashed")
        outage(postgres, client, sender, "held")
        sender.finish()

        over_http = numbers(
            postgres.uri, "SELECT vehicle_id FROM event WHERE stream_id = 'server' AND type LIKE '%alert'"
        )
        assert sorted(over_http) == [("EV_crashed",), ("EV_held",)], "what the frames showed, each once"
        stored = numbers(
            postgres.uri, "SELECT stream_id, seq FROM event WHERE stream_id <> 'server' ORDER BY stream_id, seq"
        )
        total = sender.sent
        wanted = [(sender.outbox.stream_ids[stream], seq) for stream in total for seq in range(1, total[stream] + 1)]
        assert stored == sorted(wanted), "each once, and every one"
        assert numbers(postgres.uri, "SELECT count(*) FROM drift") == [(total["drift"],)]
        windows = total["sample"] // 2

        def in_lake() -> bool:
            state = client.get("/v1/samples").json()["by_state"]
            return bool(state == {"waiting": 0, "whole": 0, "lake": windows, "broken": 0})

        wait_for(in_lake, 60, "every sample in the lake")
        lake = Lake(str(tmp_path / "lake"))
        raw = [sample.sample_id for file in lake.files() for sample in lake.read_file(file.path)]
        assert sorted(raw) == sorted(f"s{n}" for n in range(1, windows + 1))
        assert numbers(postgres.uri, "SELECT count(*) FROM sample_part") == [(0,)]
        assert client.get("/health").json()["lake"]["ok"]

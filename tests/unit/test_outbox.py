"""The queue on the disk: numbering, idempotence, quota, loss records, corruption."""

import contextlib
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.messages import Loss
from edge_agent.delivery.outbox import DATABASE, RESERVE, ROW_OVERHEAD_BYTES, Outbox, OutboxError


def build_loss(loss: Loss, stream_id: str, seq: int) -> bytes:
    return f"loss {loss.stream_id} {loss.first_seq}-{loss.last_seq} {loss.count} {loss.reason}".encode()


def open_outbox(folder: Path, max_bytes: int = 2**20, ids: dict[str, str] | None = None) -> Outbox:
    return Outbox(
        folder, notice_topic="n", build_loss=build_loss, max_bytes=max_bytes, reserve_bytes=4096, stream_ids=ids
    )


def put(outbox: Outbox, stream: str, key: str, size: int = 100) -> int:
    return outbox.append(stream, key, lambda i, s: f"{i}/{s}/".encode().ljust(size, b"."), "t")


def test_numbers_count_from_one_in_each_stream(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    assert [put(outbox, "alert", "a"), put(outbox, "alert", "b"), put(outbox, "drift", "a")] == [1, 2, 1]
    row = outbox.get("alert", 2)
    assert row is not None
    assert row.payload.startswith(f"{outbox.stream_ids['alert']}/2/".encode())
    outbox.close()


def test_appending_the_same_key_again_stores_nothing_even_after_its_release(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    assert put(outbox, "alert", "window 7") == 1
    outbox.release(outbox.stream_ids["alert"], [(1, 1)])
    outbox.close()
    again = open_outbox(tmp_path)
    assert put(again, "alert", "window 7") == 1
    assert again.waiting()["alert"] == []
    assert put(again, "alert", "window 8") == 2
    again.close()


def test_rows_and_numbers_outlive_the_process(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    ids = outbox.stream_ids
    put(outbox, "alert", "a")
    outbox.set_retained("r", b"state")
    outbox.close()
    again = open_outbox(tmp_path)
    assert again.stream_ids == ids
    assert again.waiting() == {"alert": [1], "drift": [], "sample": []}
    assert again.retained() == {"r": b"state"}
    assert put(again, "alert", "b") == 2
    again.close()


def test_an_ack_for_another_stream_releases_nothing(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    put(outbox, "alert", "a")
    assert outbox.release("somebody-else", [(1, 10)]) == 0
    assert outbox.release(outbox.stream_ids["drift"], [(1, 10)]) == 0
    assert outbox.waiting()["alert"] == [1]
    outbox.close()


def test_quota_sheds_the_oldest_of_the_lowest_class_and_the_loss_record_names_exactly_that(tmp_path: Path) -> None:
    size = 200
    outbox = open_outbox(tmp_path, max_bytes=10 * (size + ROW_OVERHEAD_BYTES))
    for i in range(5):
        put(outbox, "sample", f"s{i}", size)
        put(outbox, "alert", f"a{i}", size)
    put(outbox, "alert", "a5", size)
    put(outbox, "alert", "a6", size)
    assert outbox.waiting()["sample"] == [3, 4, 5]
    assert outbox.waiting()["alert"] == list(range(1, 8))
    numbers = outbox.flush_losses()
    assert numbers == [8]
    row = outbox.get("alert", 8)
    assert row is not None
    assert row.payload == f"loss {outbox.stream_ids['sample']} 1-2 2 outbox full".encode()
    outbox.close()


def test_a_sample_never_pushes_out_an_alert(tmp_path: Path) -> None:
    size = 200
    outbox = open_outbox(tmp_path, max_bytes=3 * (size + ROW_OVERHEAD_BYTES))
    for i in range(3):
        put(outbox, "alert", f"a{i}", size)
    assert put(outbox, "sample", "s", size) == 1
    assert outbox.waiting() == {"alert": [1, 2, 3], "drift": [], "sample": []}
    assert outbox.rows_waiting()["loss"] == 1
    outbox.close()


def test_a_second_agent_on_one_data_directory_is_refused(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    with pytest.raises(UnavailableError, match="in use by another agent"):
        open_outbox(tmp_path)
    outbox.close()
    open_outbox(tmp_path).close()


def test_an_unwritable_data_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"data directory .*file"):
        open_outbox(tmp_path / "file")


def test_a_corrupt_file_is_moved_aside_and_its_streams_reported_as_gone(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    old = outbox.stream_ids
    put(outbox, "alert", "a")
    outbox.close()
    (tmp_path / DATABASE).write_bytes(b"\0" * 8192)
    again = open_outbox(tmp_path)
    assert set(again.stream_ids.values()).isdisjoint(old.values())
    assert (tmp_path / (DATABASE + ".corrupt-1")).exists()
    numbers = again.flush_losses()
    texts = [row.payload.decode() for n in numbers if (row := again.get("alert", n))]
    assert sorted(texts) == sorted(f"loss {i} 1-None 0 outbox file was corrupt" for i in old.values())
    again.close()


def test_every_flipped_byte_of_a_small_file_leaves_an_outbox_that_starts(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path / "good")
    old = outbox.stream_ids
    for i in range(3):
        put(outbox, "alert", str(i), 300)
    payloads = {seq: row.payload for seq in (1, 2, 3) if (row := outbox.get("alert", seq))}
    outbox.close()
    whole = (tmp_path / "good" / DATABASE).read_bytes()
    streams = (tmp_path / "good" / "streams.json").read_bytes()
    interesting = [i for i, byte in enumerate(whole) if byte or i < 128]
    for position in interesting[:: max(1, len(interesting) // 150)]:
        folder = tmp_path / str(position)
        folder.mkdir()
        (folder / DATABASE).write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        (folder / "streams.json").write_bytes(streams)
        rotten = open_outbox(folder)
        assert put(rotten, "alert", "new") >= 1
        with contextlib.suppress(OutboxError):  # rot that only a reader meets: said once, moved aside at the next call
            rotten.waiting()
            for seq in (1, 2, 3):
                rotten.get("alert", seq)
        if rotten.stream_ids == old:  # the damage was not in what is read: then every row is whole or recorded
            for seq in rotten.waiting()["alert"]:
                row = rotten.get("alert", seq)
                assert row is None or row.payload == payloads.get(seq, row.payload)
        else:
            assert rotten.losses_waiting
        rotten.close()


def test_a_row_with_a_wrong_checksum_is_never_sent_but_recorded_as_lost(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    put(outbox, "alert", "a")
    outbox.close()
    with sqlite3.connect(tmp_path / DATABASE) as db:
        db.execute("UPDATE message SET payload = x'00'")
    db.close()
    again = open_outbox(tmp_path)
    assert again.get("alert", 1) is None
    assert again.flush_losses() == [2]
    row = again.get("alert", 2)
    assert row is not None
    assert b"1-1 1 row corrupt" in row.payload
    again.close()


def test_quarantine_keeps_the_message_and_records_its_loss(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    put(outbox, "alert", "poison")
    outbox.quarantine("alert", 1, "broker refused it")
    assert outbox.waiting()["alert"] == []
    assert outbox.rows_waiting() == {"alert": 0, "drift": 0, "sample": 0, "loss": 1, "quarantine": 1}
    outbox.close()


def test_space_is_held_in_reserve_for_alerts(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    assert (tmp_path / RESERVE).stat().st_size == 4096
    outbox.close()


def test_a_message_over_the_limit_is_our_own_fault_and_uses_no_number(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    with pytest.raises(ValueError, match="over the limit"):
        outbox.append("alert", "big", lambda _i, _s: b"x" * 70_000, "t")
    assert put(outbox, "alert", "next") == 1
    outbox.close()


class OutboxMachine(RuleBasedStateMachine):
    """Any order of appends, acks and restarts: each number is waiting, released, or in exactly one loss range."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.outbox = open_outbox(self.path, max_bytes=8 * (100 + ROW_OVERHEAD_BYTES))
        self.appended: dict[str, int] = {"alert": 0, "drift": 0, "sample": 0}
        self.released: set[tuple[str, int]] = set()
        self.loss_rows: dict[int, tuple[str, int, int]] = {}

    @rule(stream=st.sampled_from(["alert", "drift", "sample"]))
    def append(self, stream: str) -> None:
        seq = put(self.outbox, stream, f"{stream}{self.appended[stream] + 1}{len(self.loss_rows)}")
        assert seq == self.appended[stream] + 1
        self.appended[stream] = seq

    @rule(stream=st.sampled_from(["alert", "drift", "sample"]), first=st.integers(1, 20), length=st.integers(0, 5))
    def ack(self, stream: str, first: int, length: int) -> None:
        before = self.outbox.waiting()[stream]
        self.outbox.release(self.outbox.stream_ids[stream], [(first, first + length)])
        self.released |= {(stream, s) for s in before if first <= s <= first + length}

    @rule()
    def restart(self) -> None:
        self.outbox.close()
        self.outbox = open_outbox(self.path, max_bytes=8 * (100 + ROW_OVERHEAD_BYTES))

    @rule()
    def report(self) -> None:
        names = {v: k for k, v in self.outbox.stream_ids.items()}
        for seq in self.outbox.flush_losses():
            row = self.outbox.get("alert", seq)
            assert row is not None
            _, stream_id, span, count, *_ = row.payload.decode().split()
            first, last = map(int, span.split("-"))
            assert last - first + 1 == int(count)
            self.loss_rows[seq] = (names[stream_id], first, last)
            self.appended["alert"] = seq

    @invariant()
    def every_number_is_accounted_for(self) -> None:
        if not hasattr(self, "outbox"):
            return
        waiting = {(stream, s) for stream, seqs in self.outbox.waiting().items() for s in seqs}
        with sqlite3.connect(self.path / DATABASE) as db:
            pending = db.execute("SELECT stream, first_seq, last_seq FROM loss").fetchall()
        db.close()
        lost = [(n, s) for n, first, last in [*pending, *self.loss_rows.values()] for s in range(first, last + 1)]
        assert len(lost) == len(set(lost))
        every = {(stream, s) for stream, newest in self.appended.items() for s in range(1, newest + 1)}
        assert waiting | self.released | set(lost) == every
        assert waiting.isdisjoint(lost)

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            self.outbox.close()
            self.folder.cleanup()


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)

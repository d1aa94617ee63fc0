"""Durable queue of messages on their way to the collector.

A message that `append` returned for survives SIGKILL and power loss until `release` covers it, or a loss record that
names its range stands in its place. Each class of message is a stream with its own id and numbering from 1. Nothing
here talks to the network or reads a clock: who calls hands in a function that builds the bytes.

SQLite in WAL mode with synchronous=FULL: a commit is on the disk when it returns. What is refused or destroyed:
- over the quota the oldest of the lowest class goes first (samples, drift, alerts), and its range is recorded;
- a row whose checksum is wrong is recorded as lost and never sent;
- a file SQLite cannot read is moved aside; the new one has new stream ids and says that the old streams are gone;
- on a full disk an alert may use the space that `reserve_bytes` keeps for it.
"""

import fcntl
import os
import sqlite3
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.messages import MAX_MESSAGE_BYTES, Loss

STREAMS = ("alert", "drift", "sample")  # highest class first
ROW_OVERHEAD_BYTES = 160  # key, topic, index entries: measured on rows of 300 to 3,000 bytes
KEYS_KEPT = 65_536  # of released messages: a repeated append of one of them stays idempotent
LOCK, DATABASE, STREAM_FILE, RESERVE = "lock", "outbox.db", "streams.json", "reserve.bin"

BuildMessage = Callable[[str, int], bytes]
BuildLoss = Callable[[Loss, str, int], bytes]

_SCHEMA = """
CREATE TABLE stream (name TEXT PRIMARY KEY, stream_id TEXT NOT NULL, next_seq INTEGER NOT NULL, crc INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE message (
    stream TEXT NOT NULL, seq INTEGER NOT NULL, is_loss INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (stream, seq), CHECK (seq >= 1 AND stream IN ('alert', 'drift', 'sample')));
CREATE TABLE known_key (stream TEXT NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (stream, key))
    WITHOUT ROWID;
CREATE INDEX known_key_by_seq ON known_key (stream, seq);
CREATE TABLE loss (
    stream TEXT NOT NULL, stream_id TEXT NOT NULL, first_seq INTEGER NOT NULL, last_seq INTEGER, count INTEGER NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (stream, stream_id, first_seq)) WITHOUT ROWID;
CREATE TABLE retained (topic TEXT PRIMARY KEY, payload BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (stream TEXT NOT NULL, seq INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (stream, seq));
PRAGMA user_version = 1;
"""
_STATEMENTS = [statement.strip() for statement in _SCHEMA.split(";") if statement.strip()]


class OutboxError(UnavailableError):
    """The disk refused: nothing was stored by the call that raised this."""


@dataclass(frozen=True, slots=True)
class Row:
    """One waiting message."""

    stream: str
    seq: int
    topic: str
    payload: bytes


class Outbox:
    """The queue in one directory, owned by one process.

    `max_bytes` bounds payloads and their overhead together. `build_loss` makes the bytes of a loss record, which
    travels in the alert stream on `notice_topic`. `stream_ids` fixes the ids of a new file (a replay derives them
    from its input, so that publishing it twice is storing it once).

    Raises `UnavailableError` when another process owns the directory, `OutboxError` when the disk refuses.
    """

    def __init__(
        self,
        directory: Path,
        *,
        notice_topic: str,
        build_loss: BuildLoss,
        max_bytes: int = 64 * 2**20,
        reserve_bytes: int = 2**20,  # each alert takes some 25 kB of SQLite's log: room for forty
        stream_ids: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._notice_topic = notice_topic
        self._build_loss = build_loss
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._wanted_ids = dict(stream_ids or {})
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._payload_bytes = 0
        self.generation = 0  # counts the files made: another one has other stream ids
        self._rotten = False  # found while in use: moved aside at the next call
        self.losses_waiting = False  # ranges that `flush_losses` would turn into records
        self.counters: Counter[str] = Counter()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutboxError(f"data directory {directory}: {error.strerror}; give one that can be written") from error
        self._lock = _lock(directory)
        try:
            with self._guarded("open"):
                pass
        except OutboxError:
            self.close()
            raise
        if not self.counters["reserve_used"]:  # not at each connect: an alert that just opened it would find no space
            self._refill_reserve()

    @property
    def stream_ids(self) -> dict[str, str]:
        """The id of each stream."""
        with self._guarded("read") as db:
            return dict(db.execute("SELECT name, stream_id FROM stream"))

    def append(
        self, stream: str, key: str, build: BuildMessage, topic: str, *, retained: Mapping[str, bytes] | None = None
    ) -> int:
        """Store one message and return its sequence number; a second call with the same `key` returns the same one.

        `build(stream_id, seq)` makes the payload. `retained` topics change in the same commit. Raises `OutboxError`
        when it is not on the disk, `ValueError` for an unknown stream or a payload over the message limit.
        """
        if stream not in STREAMS:
            raise ValueError(f"no such stream: {stream!r}")
        if stream != "alert" and not self._reserve_held():
            raise OutboxError(f"append: the disk of {self._directory} is full, what is left is for alerts")
        try:
            return self._append(stream, key, build, topic, retained or {})
        except OutboxError:
            if not self._rotten and (stream != "alert" or not self._open_reserve()):
                raise
            return self._append(stream, key, build, topic, retained or {})

    def _append(self, stream: str, key: str, build: BuildMessage, topic: str, retained: Mapping[str, bytes]) -> int:
        with self._guarded("append") as db, _transaction(db):
            known = db.execute("SELECT seq FROM known_key WHERE stream = ? AND key = ?", (stream, key)).fetchone()
            if known is not None:
                return int(known[0])
            seq = self._insert(db, stream, build, topic, is_loss=False)
            db.execute("INSERT INTO known_key VALUES (?, ?, ?)", (stream, key, seq))
            db.execute("DELETE FROM known_key WHERE stream = ? AND seq <= ?", (stream, seq - KEYS_KEPT))
            for retained_topic, payload in retained.items():
                db.execute("INSERT OR REPLACE INTO retained VALUES (?, ?)", (retained_topic, payload))
            self._shed(db, stream)
            return seq

    def _insert(self, db: sqlite3.Connection, stream: str, build: BuildMessage, topic: str, *, is_loss: bool) -> int:
        stream_id, seq = db.execute("SELECT stream_id, next_seq FROM stream WHERE name = ?", (stream,)).fetchone()
        payload = build(stream_id, seq)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        crc = _crc(stream, seq, topic, payload)
        db.execute("INSERT INTO message VALUES (?, ?, ?, ?, ?, ?)", (stream, seq, is_loss, topic, payload, crc))
        db.execute(
            "UPDATE stream SET next_seq = ?, crc = ? WHERE name = ?", (seq + 1, _crc(stream_id, seq + 1), stream)
        )
        self._payload_bytes += len(payload) + ROW_OVERHEAD_BYTES
        return int(seq)

    def _shed(self, db: sqlite3.Connection, newest: str) -> None:
        """Make room by the quota: the oldest of the lowest class first, never a class above the newest message's."""
        lower = STREAMS[STREAMS.index(newest) :]  # its own class pays last
        for stream in reversed(lower):
            while self._payload_bytes > self._max_bytes:
                oldest = db.execute(
                    "SELECT seq, length(payload) FROM message WHERE stream = ? AND NOT is_loss ORDER BY seq LIMIT 1",
                    (stream,),
                ).fetchone()
                if oldest is None:
                    break
                self._lose(db, stream, oldest[0], oldest[1], "outbox full")
                self.counters["shed_" + stream] += 1

    def _lose(self, db: sqlite3.Connection, stream: str, seq: int, length: int, reason: str) -> None:
        """Delete one row and let the loss record of its stream grow by exactly it."""
        self.losses_waiting = True
        db.execute("DELETE FROM message WHERE stream = ? AND seq = ?", (stream, seq))
        self._payload_bytes -= length + ROW_OVERHEAD_BYTES
        grown = db.execute(
            "UPDATE loss SET last_seq = ?, count = count + 1 WHERE stream = ? AND last_seq = ? AND reason = ?",
            (seq, stream, seq - 1, reason),
        ).rowcount
        if not grown:
            db.execute(
                "INSERT INTO loss SELECT name, stream_id, ?, ?, 1, ? FROM stream WHERE name = ?",
                (seq, seq, reason, stream),
            )

    def flush_losses(self) -> list[int]:
        """Turn what was lost since the last call into loss records of the alert stream; returns their numbers.

        Called when there is a link: until then a range still grows, and a thousand shed messages are one record.
        """
        with self._guarded("flush losses") as db, _transaction(db):
            losses = db.execute("SELECT stream_id, stream, first_seq, last_seq, count, reason FROM loss").fetchall()
            numbers: list[int] = []
            for stream_id, stream, first_seq, last_seq, count, reason in losses:
                record = Loss(
                    stream_id=stream_id, stream=stream, first_seq=first_seq, last_seq=last_seq, count=count,
                    reason=reason,
                )  # fmt: skip
                build = partial(self._build_loss, record)
                numbers.append(self._insert(db, "alert", build, self._notice_topic, is_loss=True))
            db.execute("DELETE FROM loss")
        self.losses_waiting = False
        return numbers

    def get(self, stream: str, seq: int) -> Row | None:
        """Read one waiting message, or None where it was released or shed; a rotten row is recorded as lost."""
        with self._guarded("read") as db:
            found = db.execute(
                "SELECT topic, payload, crc FROM message WHERE stream = ? AND seq = ?", (stream, seq)
            ).fetchone()
            if found is None:
                return None
            topic, payload, crc = found
            if crc == _crc(stream, seq, topic, payload):
                return Row(stream, seq, topic, payload)
            with _transaction(db):
                self._lose(db, stream, seq, len(payload), "row corrupt on the disk")
            self.counters["rows_corrupt"] += 1
            return None

    def knows(self, stream: str, key: str) -> bool:
        """Whether an `append` with this key was done: of what waits, and of the newest that were released."""
        with self._guarded("read") as db:
            found = db.execute("SELECT 1 FROM known_key WHERE stream = ? AND key = ?", (stream, key)).fetchone()
            return found is not None

    def waiting(self) -> dict[str, list[int]]:
        """List the sequence numbers waiting in each stream, ascending."""
        with self._guarded("read") as db:
            found: dict[str, list[int]] = {stream: [] for stream in STREAMS}
            for stream, seq in db.execute("SELECT stream, seq FROM message ORDER BY seq"):
                found[stream].append(seq)
            return found

    def rows_waiting(self) -> dict[str, int]:
        """Count the messages waiting in each stream, and the loss ranges not yet turned into a record."""
        with self._guarded("read") as db:
            counts = dict.fromkeys(STREAMS, 0)
            counts.update(db.execute("SELECT stream, count(*) FROM message GROUP BY stream"))
            counts["loss"] = db.execute("SELECT count(*) FROM loss").fetchone()[0]
            counts["quarantine"] = db.execute("SELECT count(*) FROM quarantine").fetchone()[0]
            return counts

    def release(self, stream_id: str, ranges: Iterable[tuple[int, int]]) -> int:
        """Delete what the collector has committed; returns how many rows went. Unknown ids delete nothing."""
        with self._guarded("release") as db, _transaction(db):
            released = 0
            for first, last in ranges:
                gone = db.execute(
                    "DELETE FROM message WHERE stream = (SELECT name FROM stream WHERE stream_id = ?) "
                    "AND seq BETWEEN ? AND ? RETURNING length(payload)",
                    (stream_id, first, last),
                ).fetchall()
                released += len(gone)
                self._payload_bytes -= sum(length + ROW_OVERHEAD_BYTES for (length,) in gone)
            self.counters["released"] += released
        self._refill_reserve()
        return released

    def quarantine(self, stream: str, seq: int, reason: str) -> None:
        """Set aside a message the broker will not take; it is recorded as lost, and kept for a person to look at."""
        with self._guarded("quarantine") as db, _transaction(db):
            row = db.execute(
                "SELECT topic, payload FROM message WHERE stream = ? AND seq = ?", (stream, seq)
            ).fetchone()
            if row is None:
                return
            self._lose(db, stream, seq, len(row[1]), reason[:128])
            db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)", (stream, seq, *row, reason))
            # the newest hundred are enough to find out what is wrong with them
            db.execute(
                "DELETE FROM quarantine WHERE rowid NOT IN (SELECT rowid FROM quarantine ORDER BY rowid DESC LIMIT 100)"
            )
            self.counters["quarantined"] += 1

    def retained(self) -> dict[str, bytes]:
        """Retained topics and what they should say; empty = to be cleared."""
        with self._guarded("read") as db:
            return dict(db.execute("SELECT topic, payload FROM retained"))

    def set_retained(self, topic: str, payload: bytes) -> None:
        """Set what a retained topic should say."""
        with self._guarded("append") as db, _transaction(db):
            db.execute("INSERT OR REPLACE INTO retained VALUES (?, ?)", (topic, payload))

    def forget_retained(self, topic: str) -> None:
        """Forget a topic that the broker has cleared."""
        with self._guarded("release") as db, _transaction(db):
            db.execute("DELETE FROM retained WHERE topic = ? AND payload = x''", (topic,))

    def close(self) -> None:
        """Close the file and give the directory free."""
        with self._mutex:
            self._disconnect()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # The file ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self, what: str) -> Iterator[sqlite3.Connection]:
        """Hand out the connection; after any I/O error close it, so that the next call reads what is really there.

        Some fsync failures are reported once and then forgotten by the kernel: a connection that saw one must end.
        """
        with self._mutex:
            if self._lock < 0:
                raise RuntimeError("the outbox is closed")
            try:
                if self._connection is None:
                    self._connect()
                if self._connection is None:  # pragma: no cover
                    raise RuntimeError("no connection")
                yield self._connection
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                self._rotten = isinstance(error, sqlite3.Error) and _is_corrupt(error)
                self.counters["disk_errors"] += 1
                raise OutboxError(f"outbox {self._directory / DATABASE}: cannot {what}: {error}") from error

    def _connect(self) -> None:
        path = self._directory / DATABASE
        if self._rotten:
            self._move_aside(path)
            self._rotten = False
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._disconnect()
            if isinstance(error, sqlite3.OperationalError) and not _is_corrupt(error):
                if self._open_reserve():  # "database or disk is full" at open
                    self._open(path)
                    return
                raise
            self._move_aside(path)
            self._open(path)

    def _open(self, path: Path) -> None:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._connection = db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 1048576")
        verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"integrity_check: {verdict}")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            self._create(db)
        db.execute("UPDATE stream SET crc = crc WHERE false")  # a header that says "read-only" shows here
        if _written_schema(db) != _expected_schema() or not self._streams_whole(db):
            raise sqlite3.DatabaseError("its streams are not whole")
        total, rows = db.execute("SELECT coalesce(sum(length(payload)), 0), count(*) FROM message").fetchone()
        self._payload_bytes = total + rows * ROW_OVERHEAD_BYTES
        self.losses_waiting = db.execute("SELECT count(*) FROM loss").fetchone()[0] > 0
        self._write_stream_file(dict(db.execute("SELECT name, stream_id FROM stream")))

    def _streams_whole(self, db: sqlite3.Connection) -> bool:
        """Check what integrity_check cannot: every stream is there and numbers above all that it holds."""
        rows = db.execute(
            "SELECT name, stream_id, next_seq, crc, (SELECT max(seq) FROM message WHERE stream = name) FROM stream"
        ).fetchall()
        return sorted(name for name, *_ in rows) == sorted(STREAMS) and all(
            crc == _crc(stream_id, next_seq) and next_seq > (newest or 0)
            for _, stream_id, next_seq, crc, newest in rows
        )

    def _create(self, db: sqlite3.Connection) -> None:
        """Make an empty file; streams that an earlier file had, and that are not in it, are recorded as gone."""
        earlier = self._read_stream_file()
        self.generation += 1
        with _transaction(db):
            for statement in _STATEMENTS:
                db.execute(statement)
            for name in STREAMS:
                stream_id = self._wanted_ids.get(name) or str(uuid.uuid4())
                db.execute("INSERT INTO stream VALUES (?, ?, 1, ?)", (name, stream_id, _crc(stream_id, 1)))
                if earlier and earlier.get(name) != stream_id:
                    gone = earlier.get(name, "unknown")
                    db.execute(
                        "INSERT OR IGNORE INTO loss VALUES (?, ?, 1, NULL, 0, 'outbox file was corrupt')", (name, gone)
                    )

    def _move_aside(self, path: Path) -> None:
        self.counters["files_moved_aside"] += 1
        if not (self._directory / STREAM_FILE).exists():  # then nobody knows its ids, but that it was there
            self._write_stream_file(dict.fromkeys(STREAMS, "unknown"))
        number = 1
        while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        _sync_directory(self._directory)

    def _read_stream_file(self) -> dict[str, str]:
        try:
            return msgspec.json.decode((self._directory / STREAM_FILE).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return dict.fromkeys(STREAMS, "unknown")

    def _write_stream_file(self, ids: dict[str, str]) -> None:
        """Keep the ids beside the database: they name what is gone when it cannot be read."""
        if self._read_stream_file() == ids:
            return
        temporary = self._directory / (STREAM_FILE + ".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(ids))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._directory / STREAM_FILE)
        _sync_directory(self._directory)

    def _disconnect(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error:
                self.counters["close_errors"] += 1
            self._connection = None

    def _open_reserve(self) -> bool:
        """Give the reserved space to the file system; False where it was given already."""
        try:
            (self._directory / RESERVE).unlink()
        except FileNotFoundError:
            return False
        self.counters["reserve_used"] += 1
        return True

    def _reserve_held(self) -> bool:
        """Whether the reserve is there, or can be again: else the space it gave would go to counts and samples."""
        self._refill_reserve()
        return not self._reserve_bytes or (self._directory / RESERVE).exists()

    def _refill_reserve(self) -> None:
        path = self._directory / RESERVE
        if self._reserve_bytes and not path.exists():
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._reserve_bytes)
            except OSError:
                path.unlink(missing_ok=True)  # still full: the next release tries again


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _crc(*parts: str | int | bytes) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part if isinstance(part, bytes) else f"{part}\0".encode(), crc)
    return crc


def _written_schema(db: sqlite3.Connection) -> list[str]:
    return sorted(sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _expected_schema() -> list[str]:
    return sorted(statement for statement in _STATEMENTS if statement.startswith("CREATE"))


def _is_corrupt(error: sqlite3.Error) -> bool:
    """Tell rot from a full or failing disk: read-only is rot too, in a directory we just locked a file in."""
    rot = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_ERROR)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in rot


def _lock(directory: Path) -> int:
    """Own the directory, or raise: two agents on one queue would number two messages alike."""
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutboxError(f"data directory {directory}: {error.strerror}; give one that can be written") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = path.read_text().strip() or "unknown"
        os.close(descriptor)
        raise UnavailableError(
            f"data directory {directory} is in use by another agent (process {owner}); stop it or give another data_dir"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

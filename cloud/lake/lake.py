"""The lake: samples as Parquet files, in a directory or in any store that fsspec has a driver for.

    LAKE/sample/day=YYYY-MM-DD/NAME.parquet     the day of arrival here: a vehicle's clock may be anything

A file is there whole or not at all: it is written under a name that no reader looks at, and renamed. On a local disk it
is also synced, with its directory, before `write` returns. Writing the same name again puts the same file there once.
`read` gives each sample once by (vehicle_id, sample_id), whatever files it lies in, and goes on when files are merged
meanwhile. Which samples belong into which file is decided by the mover; what is in a sample, by the contract.
"""

import contextlib
import io
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from edge_agent.contract.errors import ConfigError, UnavailableError

FOLDER = "sample"
_ROWS = 256  # read at once: windows of some 10 kB each
_PREFIX, _SUFFIX, _UNFINISHED = "day=", ".parquet", ".unfinished"

SCHEMA = pa.schema(
    [
        pa.field("vehicle_id", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # alert or random
        pa.field("alert_id", pa.string(), nullable=False),
        pa.field("failure_type", pa.string(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),  # Unix seconds, on the vehicle's clock
        pa.field("received_at_s", pa.float64(), nullable=False),  # Unix seconds, on the server's clock
        pa.field("model_release", pa.int64()),
        pa.field("state_id", pa.string(), nullable=False),
        pa.field("coverage", pa.float64(), nullable=False),
        pa.field("elapsed_s", pa.float64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of `packed`
        pa.field("packed", pa.binary(), nullable=False),  # contract.samples.unpack reads it
        pa.field("clock_trusted", pa.bool_()),  # what `end_s` is worth; a file of before this has no such column
    ],
    metadata={"voltwatch": "sample 1"},
)
_NEEDED = tuple(f for f in SCHEMA if f.name != "clock_trusted")
_COMPRESSION = dict.fromkeys(SCHEMA.names, "zstd") | {"packed": "none"}  # a packed window is compressed already


class LakeAwayError(UnavailableError):
    """The lake cannot be read or written now: full, read-only, unreachable, or a file in it is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeSample:
    """One raw window as it lies in the lake; `edge_agent.contract.samples.unpack(packed)` gives its arrays."""

    vehicle_id: str
    sample_id: str
    reason: str
    alert_id: str
    failure_type: str
    stratum: str
    end_s: float
    received_at_s: float
    model_release: int | None
    state_id: str
    coverage: float
    elapsed_s: float
    sha256: str
    packed: bytes
    clock_trusted: bool = False  # not known is not trusted

    @property
    def key(self) -> tuple[str, str]:
        """What it is read once by."""
        return self.vehicle_id, self.sample_id


@dataclass(frozen=True, slots=True)
class LakeFile:
    """One file of the lake: its path below the lake's root, its day, its size."""

    path: str
    day: str
    bytes: int


def day_of(unix_s: float) -> str:
    """Return the UTC day, YYYY-MM-DD."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


class Lake:
    """One lake. Raises `ConfigError` for a URL whose driver is not known or not installed, and changes nothing.

    One whose server is away (some drivers connect at once) is tried again at each use.
    """

    def __init__(self, url: str) -> None:
        self.name = url_name(url)
        self._url = url
        self._opened: AbstractFileSystem | None = None
        self._root = ""
        self._local = False
        with contextlib.suppress(OSError):
            self._open()

    def _open(self) -> AbstractFileSystem:
        if self._opened is not None:
            return self._opened
        url = self._url
        try:
            opened, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ConfigError(f"lake {url_name(url)}: {error}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"lake {url_name(url)}: {error}; name a directory, or a URL of a driver that fsspec knows"
            ) from error
        if not root.strip("/"):
            raise ConfigError(f"lake {url_name(url)}: name a directory in it, not its root")
        self._root = root.rstrip("/")
        self._local = isinstance(opened, LocalFileSystem)
        self._opened = opened
        return opened

    # --- writing ---

    def write(self, samples: Sequence[LakeSample], path: str) -> int:
        """Put `samples` into the one file `path` (of `new_path`), whole and for good; returns its size in bytes.

        Raises `LakeAwayError` where the disk or the driver says so; the file is then not there, or there as before.
        """
        rows = [{field.name: getattr(sample, field.name) for field in fields(LakeSample)} for sample in samples]
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(rows, SCHEMA), buffer, compression=_COMPRESSION, write_page_checksum=True,
            store_schema=True,
        )  # fmt: skip
        with self._away():
            self._open()
            if self._local:
                self._put_local(Path(self._root, path), buffer.getvalue())
            else:
                self._put(f"{self._root}/{path}", buffer.getvalue())
        return buffer.getbuffer().nbytes

    def _put(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        files = self._open()
        files.makedirs(folder, exist_ok=True)
        unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}{_UNFINISHED}"
        files.pipe_file(unfinished, data)
        files.mv(unfinished, path)
        if files.size(path) != len(data):
            raise OSError(f"{path} does not have the {len(data)} bytes that were written")

    def _put_local(self, path: Path, data: bytes) -> None:
        for made in self._make(path.parent):
            _sync(made.parent)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        _sync(path.parent)

    @staticmethod
    def _make(folder: Path) -> list[Path]:
        """Make a directory; returns it and those above it that were missing, the uppermost first."""
        missing = [f for f in (folder, *folder.parents) if not f.is_dir()]
        folder.mkdir(parents=True, exist_ok=True)
        return missing[::-1]

    # --- reading ---

    def files(self) -> list[LakeFile]:
        """Return the files, the oldest day first. Raises `LakeAwayError`."""
        with self._away():
            opened = self._open()
            opened.invalidate_cache()  # a driver may remember an older listing
            walk = opened.walk(f"{self._root}/{FOLDER}", detail=True, on_error=_unless_missing)
            found = [about for _, _, there in walk for about in there.values()]
        files = []
        for about in found:
            path = str(about["name"])
            _, ours, below = path.rpartition(f"/{FOLDER}/{_PREFIX}")
            day, _, name = below.partition("/")
            if ours and name.endswith(_SUFFIX) and not name.startswith("."):
                files.append(LakeFile(f"{FOLDER}/{_PREFIX}{below}", day, int(about["size"])))
        return sorted(files, key=lambda file: (file.day, file.path))

    def read(
        self, since_s: float | None = None, *, on_damaged: Callable[[LakeAwayError], None] | None = None
    ) -> Iterator[LakeSample]:
        """Give each sample once, the oldest day of arrival first.

        `since_s`: only what arrived here at or after this time, Unix seconds. Raises `LakeAwayError` where the lake, or
        a file in it, cannot be read; the message names it. With `on_damaged` such a file is told there and left,
        with what was read of it before the damage given; only a lake that cannot be listed raises then.
        """
        seen: set[tuple[str, str]] = set()
        done: set[str] = set()  # or gone: no file comes back under its name
        while True:
            left = [file for file in self.files() if file.path not in done]
            if since_s is not None:
                left = [file for file in left if file.day >= day_of(since_s)]
            if not left:
                return
            for file in left:
                done.add(file.path)
                try:
                    for sample in self.read_file(file.path):
                        if sample.key not in seen and (since_s is None or sample.received_at_s >= since_s):
                            seen.add(sample.key)
                            yield sample
                except FileNotFoundError:  # merged into another one since they were listed
                    break
                except LakeAwayError as error:
                    if on_damaged is None:
                        raise
                    on_damaged(error)

    def read_file(self, path: str) -> Iterator[LakeSample]:
        """Give the rows of one file. Raises `FileNotFoundError` when it is gone, else `LakeAwayError`."""
        try:
            with self._open().open(f"{self._root}/{path}", "rb") as file:
                table = pq.ParquetFile(file, page_checksum_verification=True)
                there = table.schema_arrow
                if any(there.get_field_index(f.name) < 0 or there.field(f.name).type != f.type for f in _NEEDED):
                    raise LakeAwayError(f"lake {self.name}: {path} is no file of samples; move it elsewhere")
                for batch in table.iter_batches(_ROWS, columns=[name for name in SCHEMA.names if name in there.names]):
                    for row in batch.to_pylist():
                        yield LakeSample(**row)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise LakeAwayError(f"lake {self.name}: {path} cannot be read: {_short(error)}") from error

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TimeoutError) as error:
            raise LakeAwayError(f"lake {self.name}: {_short(error)}") from error


def new_path(received_at_s: float) -> str:
    """Return the path of a file that nobody has written yet, for samples that arrived on this day."""
    return f"{FOLDER}/{_PREFIX}{day_of(received_at_s)}/{uuid.uuid4().hex}{_SUFFIX}"


def url_name(url: str) -> str:
    """Name a lake for a log line or a health page: without the password a URL may carry."""
    scheme, separator, rest = url.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if not separator or not at:
        return url
    return f"{scheme}://{user.partition(':')[0]}:***@{host}{rest[len(user) + 1 + len(host) :]}"


def _unless_missing(error: Exception) -> None:
    """Let a listing go on where there is nothing (yet, or any more); a fault is not the same as an empty lake."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

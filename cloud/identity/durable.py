"""Files and folders that are there whole or not at all, whenever the process is killed.

A folder appears by one rename of a finished, synced one; a file is replaced by one rename. What a killed process left
unfinished lies under a name that begins with `STAGING`, and `sweep` removes it. Nothing here looks into the bytes.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_agent.contract.errors import UnavailableError

STAGING = ".unfinished-"
SECRET, PUBLIC = 0o600, 0o644
_FOLDER = 0o700


class Content(NamedTuple):
    """A file's bytes and its mode."""

    data: bytes
    mode: int


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` alone: whoever comes second waits. Raises `UnavailableError` where the folder cannot be written."""
    try:
        folder.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET)
    except OSError as error:
        raise UnavailableError(f"{folder} cannot be written: {(error.strerror or str(error)).lower()}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        where = error.filename or folder
        raise UnavailableError(f"{where}: {(error.strerror or str(error)).lower()}") from error
    finally:
        os.close(descriptor)


def place(folder: Path, files: Mapping[str, Content], folders: tuple[str, ...] = ()) -> None:
    """Make `folder` with these files (and empty folders), whole. Raises `OSError` where it has content already."""
    folder.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
    staging = folder.parent / f"{STAGING}{secrets.token_hex(6)}"
    staging.mkdir(mode=_FOLDER)
    for name in folders:
        (staging / name).mkdir(mode=_FOLDER)
    for name, content in files.items():
        _write(staging / name, content)
    _sync_folder(staging)
    staging.rename(folder)  # refused by the system where `folder` is not empty: nothing is ever overwritten
    _sync_folder(folder.parent)


def replace(path: Path, content: Content) -> None:
    """Write or replace one file, whole."""
    staging = path.with_name(f"{STAGING}{secrets.token_hex(6)}")
    _write(staging, content)
    staging.replace(path)
    _sync_folder(path.parent)


def sweep(*folders: Path) -> None:
    """Remove what killed processes left in these folders and in the folders in them; to be called under the lock."""
    for folder in folders:
        for left in (*folder.glob(f"{STAGING}*"), *folder.glob(f"*/{STAGING}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)  # seen through two of the folders


def _write(path: Path, content: Content) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SECRET)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.data)
        file.flush()
        os.fchmod(descriptor, content.mode)  # whatever the umask says
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

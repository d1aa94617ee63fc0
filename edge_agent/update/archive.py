"""A release's archive, taken apart into an empty folder: exactly the files of a bundle, or nothing.

What can stand in a tar and has no place in a bundle is refused: paths, links, devices, sparse files, a file twice, one
too many or one too few, one beyond its limit. Names are compared, never cleaned.
"""

import os
import tarfile
from pathlib import Path

from edge_agent.contract import bundle as contract
from edge_agent.pipeline.bundle_dir import size_limit
from edge_agent.update import files
from edge_agent.update.outcome import UpdateError

NAMES = frozenset((contract.MANIFEST, *contract.MEMBERS))


def unpack(archive: Path, folder: Path) -> None:
    """Write the members of `archive` into `folder`, which is made, everything on the disk before this returns.

    Raises `UpdateError` (malformed, oversize) and leaves then what was written to whoever clears the staging area;
    raises `OSError` when the disk refuses.
    """
    folder.mkdir()
    seen: set[str] = set()
    try:
        with tarfile.open(archive, "r:") as opened:  # "r:": uncompressed, so that no member can grow
            while (member := opened.next()) is not None:
                _check(member, seen)
                stream = opened.extractfile(member)
                data = stream.read() if stream is not None else b""
                if len(data) != member.size:
                    raise UpdateError("malformed", f"archive: {member.name} is cut")
                with (folder / member.name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                seen.add(member.name)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise UpdateError("malformed", f"archive: cannot be read: {str(error)[:120]}") from error
    absent = sorted(NAMES - seen)
    if absent:
        raise UpdateError("malformed", f"archive: holds no {', '.join(absent)}")
    files.sync_folder(folder)


def _check(member: tarfile.TarInfo, seen: set[str]) -> None:
    shown = ascii(member.name[:80])
    if member.name not in NAMES:
        raise UpdateError("malformed", f"archive: {shown} has no place in a bundle")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.pax_headers:
        raise UpdateError("malformed", f"archive: {shown} is no plain file")
    if member.name in seen:
        raise UpdateError("malformed", f"archive: holds {shown} twice")
    limit = size_limit(member.name)
    if member.size > limit:
        raise UpdateError("oversize", f"archive: {shown} has {member.size} bytes, at most {limit} are taken")

"""A bundle as one file: an uncompressed tar whose bytes depend on nothing but the bundle's.

Its members are exactly the bundle's files, by name and in order, without owner, time or path: the same bundle always
gives the same bytes, so its hash says what it is.
"""

import io
import tarfile
from pathlib import Path

from edge_agent.contract import bundle as contract

NAMES = (contract.MANIFEST, *contract.MEMBERS)


def pack(bundle: Path) -> bytes:
    """Return the archive of a bundle that was verified. Raises `OSError`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in NAMES:
            data = (bundle / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()

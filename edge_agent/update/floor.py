"""The earliest time it can be, as far as signed metadata says: for a vehicle without a clock, or with one set back.

Every part of the repository's metadata carries when it was signed. Only what was verified raises the floor; the wall
clock, a broker or a server never does. Who steals the timestamp key could push it years ahead; so it is kept with the
ids of the keys that it was learnt from, and forgotten with them when the root replaces those keys.
"""

from collections.abc import Collection
from pathlib import Path

import msgspec

from edge_agent.clock import RELEASE_FLOOR_S
from edge_agent.update import files

FILE = "floor.json"


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """`floor_s` (Unix seconds) was signed by one of `keys`."""

    floor_s: float = RELEASE_FLOOR_S
    keys: tuple[str, ...] = ()

    def known_by(self, keys: Collection[str]) -> float:
        """Return the earliest time, as far as it was learnt from keys that still count."""
        return self.floor_s if set(self.keys) & set(keys) else RELEASE_FLOOR_S

    def raised(self, signed_s: float, keys: Collection[str]) -> "Floor":
        """Take the time of verified metadata, signed by `keys`; it never lowers what these keys have said."""
        return Floor(floor_s=max(self.known_by(keys), signed_s), keys=tuple(sorted(keys)))


def read(folder: Path) -> Floor:
    """Read the floor; a damaged or absent file is the time of the agent's own release."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Floor)
    except (OSError, msgspec.DecodeError):
        return Floor()


def write(folder: Path, floor: Floor) -> None:
    """Keep the floor. Raises `OSError`."""
    files.replace(folder / FILE, msgspec.json.encode(floor))

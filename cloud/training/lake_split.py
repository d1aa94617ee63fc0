"""On which side of the learning a vehicle of the lake stands, for good: by its id, never by its windows. Pure.

A held-out vehicle must be one in every later run too, or a champion would be judged on what it has learned. So the
side is a hash of the id, and what is known already goes before it: the base dataset's split, and whom the champion
has learned from.
"""

import hashlib
from collections.abc import Mapping

from cloud.training.split import TEST, TRAIN, VALIDATION


def side_of(vehicle_id: str, base: Mapping[str, str], champion: Mapping[str, str], held_out_share: float) -> str:
    """Return the split of a vehicle: its own in the base dataset; train if the champion learned from it; else by hash.

    `base` and `champion` are split by vehicle id, of the dataset and of the champion's training record.
    """
    if vehicle_id in base:
        return base[vehicle_id]
    if champion.get(vehicle_id) in {TRAIN, VALIDATION}:
        return TRAIN
    return TEST if hash_share(vehicle_id) < held_out_share else TRAIN


def hash_share(vehicle_id: str) -> float:
    """Return a number in [0, 1) that belongs to the id, the same everywhere and for ever."""
    digest = hashlib.sha256(b"voltwatch held-out vehicle\n" + vehicle_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def learned_test_vehicles(base: Mapping[str, str], champion: Mapping[str, str]) -> list[str]:
    """Vehicles that the dataset keeps for testing and the champion has learned from: a comparison would flatter it."""
    return sorted(v for v, split in base.items() if split == TEST and champion.get(v) in {TRAIN, VALIDATION})

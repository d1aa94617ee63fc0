"""Vehicles into train, validation and test: by vehicle, stratified by failure type, never by window.

Windows overlap and a vehicle resembles itself: the same model scores F1 0.97 on windows split at random and 0.78 with
recordings kept apart. Pure; the same vehicles and seed give the same split.
"""

from collections.abc import Mapping

import numpy as np

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
FILES = {TRAIN: "train_full.parquet", VALIDATION: "val_full.parquet", TEST: "test_full.parquet"}


def split_vehicles(
    failure_types: Mapping[str, tuple[str, ...]], shares: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Assign each vehicle to a split. `failure_types` gives the types that a vehicle ever shows, () for a healthy one.

    A group is the vehicles of one (first) failure type, or the healthy ones. Within a group the shares are met by
    largest remainder; a group of two goes to train and test, of one to train; from three on each split has one.
    """
    groups: dict[str, list[str]] = {}
    for vehicle in sorted(failure_types):
        groups.setdefault(min(failure_types[vehicle], default=""), []).append(vehicle)
    random = np.random.default_rng(seed)
    assigned: dict[str, str] = {}
    for _, vehicles in sorted(groups.items()):
        shuffled = [vehicles[i] for i in random.permutation(len(vehicles))]
        counts = _allot(len(shuffled), shares)
        names = [name for name, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        assigned.update(zip(shuffled, names, strict=True))
    return assigned


def _allot(vehicles: int, shares: tuple[float, float, float]) -> tuple[int, int, int]:
    if vehicles == 1:
        return (1, 0, 0)
    if vehicles == 2:
        return (1, 0, 1)
    exact = np.array(shares) * vehicles
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() > vehicles:
        counts[int(np.argmax(counts))] -= 1
    # what is left goes where most is missing; test before validation before train on a tie, as intervals need vehicles
    for _ in range(vehicles - int(counts.sum())):
        missing = np.round(exact - counts, 9)
        counts[2 - int(np.argmax(missing[::-1]))] += 1
    return int(counts[0]), int(counts[1]), int(counts[2])

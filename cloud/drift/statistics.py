"""Distances of binned counts from a reference: population stability index, Jensen-Shannon distance, Kolmogorov-Smirnov.

Pure. Counts are [..., K], the last bin being what is missing, and the answers [...]; counts may be weighted, so they
need not be whole. How the index smooths empty bins stands with its definition in the contract (`drift_measure`); the
other two need no smoothing, and are NaN where one side holds nothing.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_agent.contract.drift_measure import psi

__all__ = ["Distances", "jensen_shannon", "ks", "psi"]

FloatArray = npt.NDArray[np.float64]


class Distances(NamedTuple):
    """The three of one variable."""

    psi: float  # nats; 0 without an upper bound
    jensen_shannon: float  # 0 to 1
    ks: float  # 0 to 1


def jensen_shannon(reference: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Jensen-Shannon distance, the square root of the divergence in bits (Endres and Schindelin, 2003): 0 to 1."""
    p, q = _shares(reference), _shares(counts)
    middle = (p + q) / 2
    divergence = (_relative_entropy_bits(p, middle) + _relative_entropy_bits(q, middle)) / 2
    return np.asarray(np.sqrt(np.clip(divergence, 0.0, 1.0)), np.float64)  # rounding goes past either end


def ks(reference: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Largest difference of the two cumulative shares at the bins' edges: 0 to 1.

    Never above the statistic of the raw values, and equal to it in the limit of fine bins. What is missing counts as
    above every value, so a difference in how much is missing shows in it too.
    """
    difference = np.cumsum(_shares(reference), axis=-1) - np.cumsum(_shares(counts), axis=-1)
    return np.asarray(np.minimum(np.abs(difference).max(axis=-1), 1.0), np.float64)


def _shares(counts: npt.ArrayLike) -> FloatArray:
    held = np.asarray(counts, np.float64)
    total = held.sum(axis=-1, keepdims=True)
    return np.asarray(held / np.where(total > 0, total, np.nan), np.float64)


def _relative_entropy_bits(p: FloatArray, q: FloatArray) -> FloatArray:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(axis=-1), np.float64)

"""How far counts lie from a reference, and what one vehicle may weigh: the definition that limits in a bundle stand on.

Export calibrates limits with it and the cloud judges with it, so that a limit and the value held against it are the
same quantity. Pure.

The population stability index is Σ (q - p) ln(q / p) over the bins (Siddiqi, Credit Risk Scorecards, 2006; the
symmetrised Kullback-Leibler divergence of Jeffreys, 1946), in nats, from 0 without an upper bound. An empty bin would
make it infinite, so half an observation is added to every bin of both sides: Jeffreys' prior for a multinomial, the
estimator of Krichevsky and Trofimov (1981). The bin of what is missing is a bin like the others.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PRIOR = 0.5  # of an observation, added to each bin

FloatArray = npt.NDArray[np.float64]


def smoothed(counts: npt.ArrayLike) -> FloatArray:
    """Turn counts [..., K] into probabilities [..., K], none of them zero."""
    filled = np.asarray(counts, np.float64) + PRIOR
    return np.asarray(filled / filled.sum(axis=-1, keepdims=True), np.float64)


def psi(reference: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Return the stability index of counts [..., K] against reference counts [..., K], in nats; [...]."""
    p, q = smoothed(reference), smoothed(counts)
    return np.asarray(((q - p) * np.log(q / p)).sum(axis=-1), np.float64)


def shares(windows: Sequence[float] | FloatArray, max_share: float) -> FloatArray:
    """Share of each vehicle [V] in what is merged, from its windows [V] (each above 0); they add up to 1.

    A vehicle's share is that of its windows, but at most `max_share`; what is cut off goes to the others in proportion.
    Where there are fewer than 1 / max_share vehicles no cap of that size can hold: then every vehicle has the same.
    """
    held = np.asarray(windows, np.float64)
    count = len(held)
    if not count:
        return held
    if count * max_share <= 1.0:
        return np.full(count, 1.0 / count)
    capped = np.zeros(count, bool)
    while True:  # each round caps at least one more vehicle; few rounds in practice
        rest = 1.0 - max_share * capped.sum()
        result = np.where(capped, max_share, held * (rest / held[~capped].sum()))
        over = ~capped & (result > max_share * (1 + 1e-12))
        if not over.any():
            return np.asarray(result, np.float64)
        capped |= over


def effective(share: FloatArray, windows: Sequence[float] | FloatArray) -> tuple[float, float]:
    """How many vehicles, and windows of each, an equal merge of the same spread would have: (vehicles, windows).

    Kish (1965): 1 / Σ s² vehicles. The windows of each are the mean that the variance within vehicles goes by,
    Σ s² / Σ (s² / n).
    """
    squared = share * share
    return float(1.0 / squared.sum()), float(squared.sum() / (squared / np.asarray(windows, np.float64)).sum())

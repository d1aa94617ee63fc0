"""Statistics over values of which some are missing, written so that they survive export to ONNX.

Promises: a missing value (NaN, an infinity, or anything beyond `LIMIT`) never reaches an arithmetic operation, so no
NaN leaks; every function returns finite numbers, and the caller turns "nothing was there" into NaN with `or_missing`.
Sums are centred on a value of the window itself: an odometer of 10⁶ km must not drown its own standard deviation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LIMIT = 1e9  # beyond it a number is no measurement; its square times a window's length still fits in float32
BIG = 4e9  # sorts after every value, and after every difference of two values


# One scalar each, broadcast: full_like would put a tensor of the same shape into the graph every time.
ZERO, ONE, MISSING = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(torch.nan)


class Values(NamedTuple):
    """Values with their presence: `value` is 0 where `present` (1.0 or 0.0, same shape) is 0."""

    value: Tensor
    present: Tensor


def split(raw: Tensor) -> Values:
    """Separate an array with NaN into values and presence."""
    there = raw.abs() <= LIMIT  # false for NaN
    return Values(torch.where(there, raw, ZERO), there.to(raw.dtype))


def or_missing(value: Tensor, known: Tensor) -> Tensor:
    """Return `value` where the boolean `known`, NaN elsewhere."""
    return torch.where(known, value, MISSING)


def ratio(numerator: Tensor, denominator: Tensor, least: Tensor | float) -> Tensor:
    """Return numerator / denominator where the denominator exceeds `least` (> 0), NaN elsewhere."""
    known = denominator > least
    return or_missing(numerator / torch.where(known, denominator, ONE), known)


def filled(x: Values, stand_in: float) -> Tensor:
    """Put `stand_in` where nothing is present; exact where something is, since `value` is 0 where it is not."""
    return x.value + (1.0 - x.present) * stand_in


def lowest(x: Values, dim: int) -> Tensor:
    """Smallest present value; `BIG` where none is."""
    return filled(x, BIG).amin(dim)


def highest(x: Values, dim: int) -> Tensor:
    """Largest present value; minus `BIG` where none is."""
    return filled(x, -BIG).amax(dim)


def mean(x: Values, dim: int) -> Values:
    """Mean over one dimension; absent where nothing was present."""
    count = x.present.sum(dim)
    return Values(x.value.sum(dim) / count.clamp(min=1), (count > 0).to(x.value.dtype))


def ascending(x: Values, length: int | None = None) -> Tensor:
    """Sort the last dimension, missing values last (as `BIG`); only the `length` smallest where given."""
    if length is None:
        return torch.sort(filled(x, BIG), dim=-1).values
    return torch.topk(filled(x, BIG), length, dim=-1, largest=False, sorted=True).values


def middle(ordered: Tensor, count: Tensor) -> Tensor:
    """Median from `ascending`'s output and the number present, [...]; `BIG` or meaningless where that is 0."""
    index = torch.stack([(count - 1).clamp(min=0) / 2, count / 2], dim=-1).floor().to(torch.int64)
    # count / 2 for an even full row still lies inside: an even count n has its upper middle at n / 2 ≤ n - 1.
    return torch.gather(ordered, -1, index.clamp(max=ordered.shape[-1] - 1)).mean(-1)


def nth(ordered: Tensor, position: Tensor) -> Tensor:
    """Pick one element of the last dimension by a float index, [...]."""
    return torch.gather(ordered, -1, position.to(torch.int64).unsqueeze(-1)).squeeze(-1)


def previous_index(present: Tensor, reach: int) -> Tensor:
    """For each frame the index of the newest earlier frame that is present, at most `reach` back; -1 where none.

    Shape [1, N] → [1, N] float. A source that reports every 10 s has NaN between arrivals; differences are taken
    between arrivals, whatever their distance.
    """
    seen = _index_where(present)
    padded = torch.cat([torch.full((1, reach), -1.0), seen[:, :-1]], dim=1)
    return F.max_pool1d(padded.unsqueeze(0), kernel_size=reach, stride=1).squeeze(0)


def held(x: Values, reach: int) -> Values:
    """Hold each value until the next arrival, at most `reach` frames; [1, N]."""
    padded = torch.cat([torch.full((1, reach), -1.0), _index_where(x.present)], dim=1)
    newest = F.max_pool1d(padded.unsqueeze(0), kernel_size=reach + 1, stride=1).squeeze(0)
    return Values(at_index(x.value, newest), (newest >= 0).to(x.value.dtype))


def at_index(value: Tensor, index: Tensor) -> Tensor:
    """Pick along time by float indices, [1, N] each; an index below 0 picks the first."""
    return torch.gather(value, 1, index.clamp(min=0).to(torch.int64))


def _index_where(present: Tensor) -> Tensor:
    """[1, N] presence → the frame's own index, -1 where nothing is present."""
    return present * (torch.arange(present.shape[-1], dtype=present.dtype) + 1.0) - 1.0

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


class Values(NamedTuple):
    """Values with their presence: `value` is 0 where `present` (1.0 or 0.0, same shape) is 0."""

    value: Tensor
    present: Tensor


def split(raw: Tensor) -> Values:
    """Separate an array with NaN into values and presence."""
    there = raw.abs() <= LIMIT  # false for NaN
    return Values(torch.where(there, raw, torch.zeros_like(raw)), there.to(raw.dtype))


def or_missing(value: Tensor, known: Tensor) -> Tensor:
    """Return `value` where the boolean `known`, NaN elsewhere."""
    return torch.where(known, value, torch.full_like(value, torch.nan))


def ratio(numerator: Tensor, denominator: Tensor, least: Tensor | float) -> Tensor:
    """Return numerator / denominator where the denominator exceeds `least` (> 0), NaN elsewhere."""
    known = denominator > least
    return or_missing(numerator / torch.where(known, denominator, torch.ones_like(denominator)), known)


def lowest(x: Values, dim: int) -> Tensor:
    """Smallest present value; `BIG` where none is."""
    return torch.where(x.present > 0, x.value, torch.full_like(x.value, BIG)).amin(dim)


def highest(x: Values, dim: int) -> Tensor:
    """Largest present value; minus `BIG` where none is."""
    return torch.where(x.present > 0, x.value, torch.full_like(x.value, -BIG)).amax(dim)


def mean(x: Values, dim: int) -> Values:
    """Mean over one dimension; absent where nothing was present."""
    count = x.present.sum(dim)
    return Values(x.value.sum(dim) / count.clamp(min=1), (count > 0).to(x.value.dtype))


def ascending(x: Values, length: int | None = None) -> Tensor:
    """Sort the last dimension, missing values last (as `BIG`); only the `length` smallest where given."""
    filled = torch.where(x.present > 0, x.value, torch.full_like(x.value, BIG))
    if length is None:
        return torch.sort(filled, dim=-1).values
    return torch.topk(filled, length, dim=-1, largest=False, sorted=True).values


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

    Shape [N] → [N] float. A source that reports every 10 s has NaN between arrivals; differences are taken between
    arrivals, whatever their distance.
    """
    index = torch.arange(present.shape[-1], dtype=present.dtype)
    seen = torch.where(present > 0, index, torch.full_like(index, -1.0))
    padded = torch.cat([torch.full((reach,), -1.0), seen[:-1]])
    return F.max_pool1d(padded.reshape(1, 1, -1), kernel_size=reach, stride=1).reshape(-1)


def held(x: Values, reach: int) -> Values:
    """Hold each value until the next arrival, at most `reach` frames; [N]."""
    index = torch.arange(x.value.shape[-1], dtype=x.value.dtype)
    seen = torch.where(x.present > 0, index, torch.full_like(index, -1.0))
    padded = torch.cat([torch.full((reach,), -1.0), seen])
    newest = F.max_pool1d(padded.reshape(1, 1, -1), kernel_size=reach + 1, stride=1).reshape(-1)
    return Values(torch.gather(x.value, 0, newest.clamp(min=0).to(torch.int64)), (newest >= 0).to(x.value.dtype))

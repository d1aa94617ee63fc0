"""The slow state: what five minutes cannot show, kept as decayed sums that each new stride updates.

Per quantity K = 2·H + 2 numbers: numerators over H horizons, their denominators, and numerator and denominator of the
vehicle's own baseline. A horizon's value is numerator / denominator, so a horizon longer than the vehicle's life so far
simply means "all of it", and nothing has to warm up. Cells have one row each, `cell_trend` [1, C, K]: the deviation
from the pack's median, weighed so that rest and a middle state of charge count and anything else only stands in where
nothing better is known (on real packs the spread grows with load, and comparing within a range of charge cuts a healthy
cell's swing from 16 to 4 mV; correcting for current gained nothing). Quantities of the vehicle: `vehicle_trend`
[1, T, K].

Time here is observed time, the sum of `elapsed_s` as the windower gives it (at most a window's length): a car knows how
long it was awake, but after a reboot without a clock not how long it slept. See docs/adr/0041.
"""

import torch
from torch import Tensor

from edge_agent.contract.bundle import StateSpec
from export.masked import BIG, ZERO, Values, ascending, filled, lowest, middle, nth, or_missing, ratio

HOUR_S = 3600.0
HORIZONS_S = (HOUR_S, 6 * HOUR_S, 24 * HOUR_S, 168 * HOUR_S)  # of observed time
HORIZON_NAMES = ("1h", "6h", "24h", "168h")
WORST_HORIZON = 2  # the cell that is named as worst is worst over this one
BASELINE_S = 3 * HOUR_S  # observed: two to three days of an ordinary car
LOAD_WEIGHT = 0.01  # of a row under load against one at rest
CHARGE_RANGE_PERCENT = (20.0, 90.0)  # state of charge within which cells compare well
CHARGE_WEIGHT = 0.1  # of a row outside it
DEVIATION_LIMIT_V = 0.3  # an undecoded code must not outweigh a week
LEAST_WEIGHT = 1e-4  # below this sum a cell is unknown: a tenth of the lightest single row
MIN_CELLS = 3  # fewer have no median to deviate from
STATE_LIMIT = 1e30  # a state beyond it is corrupt and starts anew

HORIZON_RATES = torch.tensor([1 / h for h in HORIZONS_S])
WIDTH = 2 * len(HORIZONS_S) + 2
Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # numerators [..., H], denominators [..., H], baseline's two [..., 1]


def state_specs(*, cells: bool, quantities: int) -> tuple[StateSpec, ...]:
    """Declare the state tensors of a graph that has cells or not, and so many slow quantities."""
    specs = []
    if cells:
        specs.append(StateSpec(name="cell_trend", shape=(1, "C", WIDTH)))
    if quantities:
        specs.append(StateSpec(name="vehicle_trend", shape=(1, quantities, WIDTH)))
    if specs:
        specs.append(StateSpec(name="observed_s", shape=(1,)))
    return tuple(specs)


def sane(state: Tensor) -> Tensor:
    """Return the state with anything that cannot be one (NaN, huge) started anew."""
    return torch.where(state.abs() <= STATE_LIMIT, state, ZERO)


def update(state: Tensor, numerator: Tensor, denominator: Tensor, elapsed_s: Tensor, observed_s: Tensor) -> Tensor:
    """Decay by `elapsed_s` [1] and add one stride's sums, both [...]; state [..., K] → [..., K].

    The baseline takes part while the vehicle has been observed for less than `BASELINE_S`, then stands.
    """
    decay = torch.exp(-elapsed_s * HORIZON_RATES)  # [H]
    young = (observed_s < BASELINE_S).to(state.dtype)  # [1]
    keep = torch.cat([decay, decay, torch.ones(2, dtype=state.dtype)])
    many = torch.ones(len(HORIZONS_S), dtype=state.dtype)
    none = torch.zeros(len(HORIZONS_S), dtype=state.dtype)
    one, zero = torch.ones(1, dtype=state.dtype), torch.zeros(1, dtype=state.dtype)
    to_numerator = torch.cat([many, none, young, zero])
    to_denominator = torch.cat([none, many, zero, one * young])
    return state * keep + numerator.unsqueeze(-1) * to_numerator + denominator.unsqueeze(-1) * to_denominator


def sums(state: Tensor) -> Sums:
    """Take a state apart, [..., K]."""
    h = len(HORIZONS_S)
    return state[..., :h], state[..., h : 2 * h], state[..., 2 * h : 2 * h + 1], state[..., 2 * h + 1 :]


def cell_values(state: Tensor) -> tuple[Values, Values]:
    """Return each cell's deviation over every horizon, and the same less its baseline; [C, K] → two of [C, H]."""
    numerator, denominator, base_numerator, base_denominator = sums(state)
    known, base_known = denominator > LEAST_WEIGHT, base_denominator > LEAST_WEIGHT
    value = torch.where(known, numerator / denominator.clamp(min=LEAST_WEIGHT), ZERO)
    base = base_numerator / base_denominator.clamp(min=LEAST_WEIGHT)
    both = known & base_known
    change = torch.where(both, value - base, ZERO)
    return Values(value, known.to(value.dtype)), Values(change, both.to(value.dtype))


def cell_features(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce `cell_trend` [C, K] to features, the worst cell [1] int64 and its deviation [1] in volt.

    Features, [2·H + 1]: the lowest cell's deviation over each horizon; the greatest fall of a cell against its own
    baseline over each; and how far the lowest stands below the second lowest. A failing cell leaves alone, on the low
    side; groups that shift together, mostly high, are no fault.
    """
    value, change = cell_values(state)
    enough = value.present.sum(0) >= MIN_CELLS  # [H]
    ordered = ascending(Values(value.value.T, value.present.T))  # [H, C]
    low = ordered[:, 0]
    second = nth(ordered, (value.present.sum(0) - 1).clamp(min=0, max=1))
    fall = lowest(change, 0)
    changed = change.present.sum(0) >= MIN_CELLS
    gap = torch.where(enough, low - second, ZERO)
    features = torch.cat(
        [or_missing(low, enough), or_missing(fall, changed), or_missing(gap, enough)[WORST_HORIZON : WORST_HORIZON + 1]]
    )
    at = slice(WORST_HORIZON, WORST_HORIZON + 1)
    named = enough[at] & (low[at] < 0)
    worst = torch.where(named, torch.argmin(filled(value, BIG)[:, at], dim=0), torch.full((1,), -1, dtype=torch.int64))
    deviation = torch.where(named, low[at], ZERO)
    return features, worst, deviation


def cell_feature_names() -> tuple[str, ...]:
    """Names of `cell_features`' features, in order."""
    return (
        *(f"cells.lowest_deviation_v.{h}" for h in HORIZON_NAMES),
        *(f"cells.lowest_change_v.{h}" for h in HORIZON_NAMES),
        f"cells.lowest_gap_v.{HORIZON_NAMES[WORST_HORIZON]}",
    )


def quantity_features(state: Tensor, least: Tensor) -> Tensor:
    """Reduce `vehicle_trend` [T, K] to [2·T]: the value over 6 h, and its change against the baseline."""
    numerator, denominator, base_numerator, base_denominator = sums(state)
    now = ratio(numerator[:, 1], denominator[:, 1], least)
    base = ratio(base_numerator[:, 0], base_denominator[:, 0], least)
    return torch.cat([now, now - base])


def quantity_feature_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of `quantity_features`, in order."""
    return (*(f"{n}.6h" for n in names), *(f"{n}.6h_change" for n in names))


def median_deviation(cells: Values) -> Values:
    """Each cell's deviation from its row's median; [R, C] → [R, C], absent in rows of fewer than three cells."""
    count = cells.present.sum(1)
    median = middle(ascending(cells), count)
    there = cells.present * (count >= MIN_CELLS).to(count.dtype).unsqueeze(1)
    return Values((cells.value - median.unsqueeze(1)) * there, there)

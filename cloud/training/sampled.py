"""Samples of the lake as labelled rows of a dataset: unpacked, checked, through the same feature graph as on a vehicle.

A sample brings the model's state from before its window, so that its features are the vehicle's very own; where that
state has another meaning here (an older release's `state_id`) or another shape, a fresh one stands in, which is
counted. A sample that does not fit this schema or window, or cannot be unpacked, is left out with a line that says so;
one that nobody's verdict reaches is counted by the reason. Nothing here writes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cloud.lake.lake import LakeSample
from cloud.training.sample_labels import Known, SampleLabel, label_sample
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.errors import MessageError
from edge_agent.contract.samples import SampleWindow, unpack
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.outcomes import Float32Array, Window
from export.features import FeatureRunner, State

# the variants of these windows: no rate a month is counted on either
SAMPLED = "sampled"  # chosen by nothing that the champion said: at random, or by an alert that is not its own
SELECTED = "selected"  # chosen by an alert that the champion raised: the one on trial does not pick the evidence
MOST_LINES = 20  # of samples left out; the rest is a number
_ORDER = ("confirmed", "early", "false_alarm", "healthy")  # of two samples of one window the first says more


@dataclass(frozen=True, slots=True)
class SampledWindow:
    """One labelled window: features [F], pooled [P, S], and what it was."""

    vehicle_id: str
    sample_id: str
    sha256: str
    end_s: float
    elapsed_s: float
    coverage: float
    stratum: str
    label: SampleLabel
    by_champion: bool  # an alert of the champion's models chose it, or may have
    features: Float32Array
    pooled: Float32Array


@dataclass(frozen=True, slots=True)
class Read:
    """What a lake gave: rows by vehicle and time, and where every other sample went.

    `used` counts labels by meaning, `unused` samples by the reason; `lines` name what is damaged or foreign.
    """

    windows: list[SampledWindow]
    samples: int
    used: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    fresh_states: int = 0


def read_samples(
    samples: Iterable[LakeSample],
    alerts: dict[str, list[Known]],
    *,
    runner: FeatureRunner,
    catalogue: Catalogue,
    window: WindowSpec,
    horizon_s: float,
    observed_until_s: Mapping[str, float],
    champion_release: int | None,
    on_sample: Callable[[int], None],
) -> Read:
    """Label every sample and compute the features of those that a label reaches; `on_sample(done)` after each.

    `observed_until_s`: when each vehicle was last heard of; one that is not in it never was.
    `champion_release` None: not known, so every alert of a model may be the champion's.
    """
    found: dict[tuple[str, float], SampledWindow] = {}
    used: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    lines: list[str] = []
    fresh = done = left_out = 0
    for done, sample in enumerate(samples, start=1):
        on_sample(done)
        known = alerts.get(sample.vehicle_id, [])
        label = label_sample(
            sample.reason, sample.alert_id, sample.end_s, known,
            clock_trusted=sample.clock_trusted, received_at_s=sample.received_at_s,
            observed_until_s=observed_until_s.get(sample.vehicle_id, -math.inf), horizon_s=horizon_s,
        )  # fmt: skip
        if not label.used:
            unused[label.why] += 1
            continue
        try:
            raw = _fitting(unpack(sample.packed), catalogue, window)
        except MessageError as error:
            unused["cannot be used here"] += 1
            left_out += 1
            if left_out <= MOST_LINES:
                lines.append(f"sample {sample.sample_id} of vehicle {sample.vehicle_id} left out: {error}")
            continue
        key = (sample.vehicle_id, sample.end_s)
        before = found.get(key)
        by_champion = chosen_by_champion(sample, label, known, champion_release, window.length_s)
        if before is not None:
            unused["another sample has the same window"] += 1
            by_champion = by_champion and before.by_champion
            if _ORDER.index(before.label.meaning) <= _ORDER.index(label.meaning):
                found[key] = replace(before, by_champion=by_champion)
                continue
            used[before.label.meaning] -= 1
        state = carried_state(raw, sample.state_id, runner)
        fresh += state is None
        found[key] = _featured(sample, raw, label, by_champion, state, runner, window.length_s)
        used[label.meaning] += 1
    if left_out > MOST_LINES:
        lines.append(f"{left_out - MOST_LINES} more samples left out, {left_out} in all")
    return Read([found[key] for key in sorted(found)], done, +used, unused, lines, fresh)


def chosen_by_champion(
    sample: LakeSample, label: SampleLabel, alerts: list[Known], champion_release: int | None, length_s: float
) -> bool:
    """Whether the window is here because the champion alerted, and would not be otherwise.

    A vehicle names one alert a sample. Where one of a guard, or of another release, began in this very window, that
    one would have chosen it as well.
    """
    if sample.reason != "alert":
        return False
    if label.alert is not None and not label.alert.may_be_of(champion_release):
        return False
    if not sample.clock_trusted:
        return True
    others = (a for a in alerts if not a.may_be_of(champion_release))
    return not any(sample.end_s - length_s < a.since_s <= sample.end_s for a in others)


def _fitting(raw: SampleWindow, catalogue: Catalogue, window: WindowSpec) -> SampleWindow:
    """Return the sample with its columns in the catalogue's order. Raises `MessageError` where it is another's."""
    wanted = catalogue.scalar_names
    if set(raw.signals) != set(wanted) or len(raw.signals) != len(wanted):
        foreign = sorted(set(raw.signals) ^ set(wanted))
        raise MessageError(f"it is of another schema than {catalogue.name!r}: {foreign[0]} is only in one of them")
    if raw.values.shape[0] != window.frames:
        raise MessageError(f"its window has {raw.values.shape[0]} frames; here it is {window.frames}")
    for name, table in (("cell_voltage", raw.cell_voltage), ("cell_temperature", raw.cell_temperature)):
        if table.shape[0] != window.vector_frames or table.shape[1] < 1:
            raise MessageError(f"its {name} is {table.shape[0]} by {table.shape[1]}; here {window.vector_frames} rows")
    order = [raw.signals.index(name) for name in wanted]
    return SampleWindow(wanted, raw.values[:, order], raw.cell_voltage, raw.cell_temperature, raw.state)


def carried_state(raw: SampleWindow, state_id: str, runner: FeatureRunner) -> State | None:
    """Return the vehicle's state from before the window, None where it does not mean what this graph's means."""
    if state_id != runner.state_id:
        return None
    blank = runner.initial_state(raw.cell_voltage.shape[1], raw.cell_temperature.shape[1])
    if {n: t.shape for n, t in raw.state.items()} != {n: t.shape for n, t in blank.items()}:
        return None
    return {name: np.asarray(raw.state[name], np.float32) for name in blank}


def _featured(
    sample: LakeSample,
    raw: SampleWindow,
    label: SampleLabel,
    by_champion: bool,
    state: State | None,
    runner: FeatureRunner,
    length_s: float,
) -> SampledWindow:
    # without a state it is as a vehicle's first window is
    elapsed_s = sample.elapsed_s if state is not None else length_s
    start = state or runner.initial_state(raw.cell_voltage.shape[1], raw.cell_temperature.shape[1])
    window = Window(sample.end_s, raw.values, raw.cell_voltage, raw.cell_temperature, elapsed_s, sample.coverage)
    features, pooled, _ = runner.run(window, start)
    return SampledWindow(
        sample.vehicle_id, sample.sample_id, sample.sha256, sample.end_s, sample.elapsed_s, sample.coverage,
        sample.stratum, label, by_champion, features, pooled,
    )  # fmt: skip

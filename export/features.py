"""The feature graph: a raw window and the slow state in, features, pooled frames and the next slow state out.

The only definition of every feature: training runs it (`FeatureRunner`), and the bundle's `model.onnx` contains it, so
that training, server and vehicle cannot disagree. What is missing (NaN) never leaks: a feature of a signal that was
absent for the whole window is NaN in `features`, every other output is finite. One window at a time; the number of
cells C ≥ 1 and probes P ≥ 1 is dynamic.

Statistics of masked values are in `masked.py`, quantities by role in `domain.py`, the slow state in `trend.py`.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from edge_agent.contract.bundle import StateSpec, WindowSpec
from edge_agent.contract.signals import VECTOR_ROLES, Catalogue
from edge_agent.pipeline.inference import session_options as session_options  # noqa: PLC0414 - passed on
from edge_agent.pipeline.outcomes import Float32Array, Window
from export import masked, trend
from export.domain import Frames, Quotient, load_memory, low_current, quotients, signal_means
from export.masked import Values

OPSET = 17  # the newest that the legacy exporter writes; its LSTM is what quantize_dynamic knows
POOL_S = 5.0  # the autoencoder sees means of 5 s: trains six times faster than on single seconds
RISE_S = 30.0
STATE_VERSION = 1  # raise when the meaning of a state tensor changes: another state_id, which warms up anew
INPUTS = ("window", "cell_voltage", "cell_temperature", "elapsed_s")
STATISTICS = ("mean", "std", "min", "max", "slope_per_s", "median", "present")
CELL_STATISTICS = (
    "cells.spread_v",
    "cells.spread_max_v",
    "cells.lowest_v",
    "cells.second_lowest_v",
    "cells.spread_at_rest_v",
    "cells.lowest_at_rest_v",
    "cells.second_lowest_at_rest_v",
)
PROBE_STATISTICS = (
    "probes.spread_c",
    "probes.hottest_above_median_c",
    "probes.max_rise_c_per_s",
    "probes.max_rise_30s_c_per_s",
)
EXPORTER_WARNINGS = (  # known, and why they do not matter here: docs/adr/0040
    (DeprecationWarning, ".*legacy TorchScript-based ONNX export", ""),
    (DeprecationWarning, "The feature will be removed", ""),
    (UserWarning, "Exporting a model to ONNX with a batch_size other than 1", ""),
    (Warning, "Converting a tensor to a Python boolean", r"torch\.nn\.modules\.rnn"),  # its check of the input's width
)
State = dict[str, Float32Array]


class FeatureGraph(nn.Module):
    """The feature graph of one schema and window; no weights, only definitions.

    forward(window [1,N,S], cell_voltage [1,R,C], cell_temperature [1,R,P], elapsed_s [1], *states) →
    features [1,F], pooled [1,N/5,S], *next states, worst_cell [1] int64, worst_cell_deviation_v [1].
    """

    def __init__(self, catalogue: Catalogue, spec: WindowSpec) -> None:
        super().__init__()
        self.catalogue, self.spec = catalogue, spec
        self.has_cells = catalogue.role("cell_voltage") is not None
        self.has_probes = catalogue.role("cell_temperature") is not None
        self.quotients: tuple[Quotient, ...] = quotients(catalogue) or signal_means(catalogue)
        self.slow = tuple(i for i, q in enumerate(self.quotients) if q.slow)
        self.state_specs: tuple[StateSpec, ...] = trend.state_specs(cells=self.has_cells, quantities=len(self.slow))
        self.pool = max(1, min(spec.frames, round(POOL_S / spec.period_s)))
        self.pooled_frames = spec.frames // self.pool
        self.feature_names: tuple[str, ...] = tuple(self._names())

        seconds = (torch.arange(spec.frames, dtype=torch.float64) - (spec.frames - 1)) * spec.period_s
        row_end = (torch.arange(spec.vector_frames, dtype=torch.float64) - (spec.vector_frames - 1)) * (
            spec.length_s / spec.vector_frames
        )
        self.register_buffer("age_s", (-seconds).to(torch.float32), persistent=False)  # [N]
        self.register_buffer("row_age_s", (-row_end).to(torch.float32), persistent=False)  # [R]
        # time within the window from 0 to 1: its squares neither vanish nor overflow whatever the period
        self.register_buffer("unit_time", (1 + seconds / spec.length_s).to(torch.float32), persistent=False)
        self.register_buffer("row_frames", _frames_of_rows(spec), persistent=False)  # [R, frames a row]
        self.register_buffer("memory", load_memory(spec), persistent=False)
        self.register_buffer("least", torch.tensor([q.least for q in self.quotients]), persistent=False)
        self.age_s: Tensor
        self.row_age_s: Tensor
        self.unit_time: Tensor
        self.row_frames: Tensor
        self.memory: Tensor
        self.least: Tensor

    @property
    def state_id(self) -> str:
        """Name of the slow state's meaning: releases that share it inherit the vehicle's state."""
        meaning = json.dumps(
            {
                "version": STATE_VERSION,
                "horizons_s": trend.HORIZONS_S,
                "baseline_s": trend.BASELINE_S,
                "states": [(s.name, s.shape) for s in self.state_specs],
                "quantities": [
                    (self.quotients[i].name, [self._signal(r) for r in self.quotients[i].roles]) for i in self.slow
                ],
                "cells": self._signal("cell_voltage") if self.has_cells else None,
                "period_s": self.spec.period_s,
            },
            sort_keys=True,
        )
        return f"trend{STATE_VERSION}-{hashlib.sha256(meaning.encode()).hexdigest()[:16]}"

    def _signal(self, role: str) -> tuple[str, str]:
        signal = self.catalogue.role(role)
        return ("", "") if signal is None else (signal.name, signal.unit)

    def _names(self) -> list[str]:
        names = [f"{s}.{statistic}" for statistic in STATISTICS for s in self.catalogue.scalar_names]
        names += [q.name for q in self.quotients]
        if self.catalogue.column("battery_temperature_max") is not None:
            names.append("battery.max_rise_30s_c_per_s")
        if self.has_cells:
            names += [*CELL_STATISTICS, *trend.cell_feature_names()]
        if self.has_probes:
            names += PROBE_STATISTICS
        return names + list(trend.quantity_feature_names(tuple(self.quotients[i].name for i in self.slow)))

    def forward(
        self, window: Tensor, cell_voltage: Tensor, cell_temperature: Tensor, elapsed_s: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """See the class."""
        elapsed = torch.where(
            elapsed_s.abs() <= masked.LIMIT, elapsed_s, torch.full_like(elapsed_s, self.spec.length_s)
        ).clamp(min=0.0)
        state = {s.name: trend.sane(x) for s, x in zip(self.state_specs, states, strict=True)}
        x = masked.split(window[0].transpose(0, 1))  # [S, N]
        frames = Frames(self.catalogue, self.spec, x.value, x.present, self.memory)
        parts = [self._statistics(x)]

        numerators, denominators = (
            torch.cat(side) for side in zip(*(q.compute(frames) for q in self.quotients), strict=True)
        )  # [Q, N]
        new = (self.age_s < elapsed - 0.5 * self.spec.period_s).to(x.value.dtype)  # [N] the newest stride
        spans = torch.stack([torch.ones_like(new), new], dim=1)  # [N, 2]
        numerator, denominator = numerators @ spans, denominators @ spans  # [Q, 2]
        parts.append(masked.ratio(numerator[:, 0], denominator[:, 0], self.least))
        if frames.has("battery_temperature_max"):
            parts.append(self._max_rise(frames("battery_temperature_max")))

        following: dict[str, Tensor] = {}
        worst = torch.full((1,), -1, dtype=torch.int64)
        deviation = torch.zeros(1)
        if self.has_cells:
            cells, features, worst, deviation = self._cells(frames, cell_voltage[0], elapsed, state)
            following["cell_trend"] = cells
            parts.append(features)
        if self.has_probes:
            parts.append(self._probes(masked.split(cell_temperature[0])))
        if self.slow:
            chosen = list(self.slow)
            vehicle = trend.update(
                state["vehicle_trend"][0], numerator[chosen, 1], denominator[chosen, 1], elapsed, state["observed_s"]
            )
            following["vehicle_trend"] = vehicle.unsqueeze(0)
            parts.append(trend.quantity_features(vehicle, self.least[chosen]))
        if self.state_specs:
            following["observed_s"] = state["observed_s"] + elapsed.clamp(max=self.spec.length_s)
        features = torch.cat(parts).unsqueeze(0)
        return features, self._pooled(window), *(following[s.name] for s in self.state_specs), worst, deviation

    def _statistics(self, x: Values) -> Tensor:
        """[S, N] → [7·S] in the order of `STATISTICS`."""
        count = x.present.sum(1)
        there = count > 0
        safe = count.clamp(min=1)
        low = torch.where(there, masked.lowest(x, 1), masked.ZERO)
        high = torch.where(there, masked.highest(x, 1), masked.ZERO)
        above = (x.value - low.unsqueeze(1)) * x.present  # exact near `low`: nothing of a small spread is lost
        mean = above.sum(1) / safe
        centred = (above - mean.unsqueeze(1)) * x.present
        std = (centred.square().sum(1) / safe).sqrt()
        time = (self.unit_time - ((x.present @ self.unit_time) / safe).unsqueeze(1)) * x.present
        slope = masked.ratio((time * centred).sum(1), time.square().sum(1), 1e-9) / self.spec.length_s
        ordered = masked.ascending(Values(above, x.present), self.spec.frames // 2 + 1)
        median = masked.middle(ordered, count)
        known = torch.stack([low + mean, std, low, high, slope, low + median])
        return torch.cat([masked.or_missing(known, there.expand(6, -1)).reshape(-1), count / self.spec.frames])

    def _max_rise(self, hottest: Values) -> Tensor:
        """Steepest rise of the pack's hottest probe over 30 s, °C/s, [1]."""
        step = max(1, min(self.spec.frames - 1, round(RISE_S / self.spec.period_s)))
        now = masked.held(hottest, min(step, self.spec.frames - 1))
        both = now.present[:, step:] * now.present[:, :-step]
        most = masked.highest(Values((now.value[:, step:] - now.value[:, :-step]) * both, both), 1)  # [1]
        return masked.or_missing(most / (step * self.spec.period_s), most > -masked.BIG / 2)

    def _row_weights(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """Which slow rows were at rest (1 or 0), and how much each counts for the slow state; two of [R]."""
        rest = torch.ones(self.spec.vector_frames)
        fair = torch.ones(self.spec.vector_frames)
        if frames.has("pack_current"):
            current = frames("pack_current")
            loaded = current.present * (1 - low_current(current))
            here, over = current.present[0, self.row_frames], loaded[0, self.row_frames]
            rest = here.amax(1) * (1 - over.amax(1))
        if frames.has("state_of_charge"):
            charge = frames("state_of_charge")
            low, high = trend.CHARGE_RANGE_PERCENT
            within = charge.present * (charge.value >= low).to(rest.dtype) * (charge.value <= high).to(rest.dtype)
            fair = within[0, self.row_frames].amax(1)
        weight = (rest + (1 - rest) * trend.LOAD_WEIGHT) * (fair + (1 - fair) * trend.CHARGE_WEIGHT)
        return rest, weight

    def _cells(
        self, frames: Frames, voltage: Tensor, elapsed: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[R, C] → next cell_trend [1, C, K], features, worst cell, its deviation."""
        cells = masked.split(voltage)
        rest, weight = self._row_weights(frames)
        deviation = trend.median_deviation(cells)
        whole = _spread_and_lowest(deviation, torch.ones_like(rest))
        at_rest = _spread_and_lowest(deviation, rest)
        counted = deviation.present * (weight * (self.row_age_s < elapsed - 0.5 * self.spec.period_s)).unsqueeze(1)
        bounded = deviation.value.clamp(-trend.DEVIATION_LIMIT_V, trend.DEVIATION_LIMIT_V)
        following = trend.update(
            state["cell_trend"][0], (bounded * counted).sum(0), counted.sum(0), elapsed, state["observed_s"]
        )
        slow, worst, deviation_v = trend.cell_features(following)
        features = torch.cat([whole, at_rest[:1], at_rest[2:], slow])
        return following.unsqueeze(0), features, worst, deviation_v

    def _probes(self, probes: Values) -> Tensor:
        """[R, P] → [4] in the order of `PROBE_STATISTICS`."""
        high, low = masked.highest(probes, 1), masked.lowest(probes, 1)
        rows = probes.present.amax(1)
        spread = masked.mean(Values((high - low) * rows, rows), 0)
        deviation = masked.mean(trend.median_deviation(probes), 0)
        hottest = masked.highest(deviation, 0)
        row_s = self.spec.length_s / self.spec.vector_frames
        out = [
            masked.or_missing(spread.value, spread.present > 0),
            masked.or_missing(hottest, hottest > -masked.BIG / 2),
        ]
        for step in (1, max(1, round(RISE_S / row_s))):
            step_rows = min(step, self.spec.vector_frames - 1)
            if step_rows < 1:  # a window of a single slow row has no rise
                out.append(torch.full((), torch.nan))
                continue
            both = probes.present[step_rows:] * probes.present[:-step_rows]
            change = (probes.value[step_rows:] - probes.value[:-step_rows]) * both
            most = masked.highest(Values(change, both), 1).amax(0)
            out.append(masked.or_missing(most / (step_rows * row_s), most > -masked.BIG / 2))
        return torch.stack(out)

    def _pooled(self, window: Tensor) -> Tensor:
        """Means over 5 s, aligned to the newest frame; NaN where none was present."""
        used = window[:, self.spec.frames - self.pooled_frames * self.pool :]
        x = masked.split(used.reshape(1, self.pooled_frames, self.pool, len(self.catalogue.scalars)))
        mean = masked.mean(x, 2)
        return masked.or_missing(mean.value, mean.present > 0)


def _frames_of_rows(spec: WindowSpec) -> Tensor:
    """List the frames that each slow row covers, [R, m]; the last one repeated where a row has fewer."""
    rows = [
        np.arange(j * spec.frames // spec.vector_frames, max(1, (j + 1) * spec.frames // spec.vector_frames))
        for j in range(spec.vector_frames)
    ]
    most = max(1, *(len(r) for r in rows))
    full = [[int(r[min(i, len(r) - 1)]) if len(r) else j * spec.frames // spec.vector_frames for i in range(most)]
            for j, r in enumerate(rows)]  # fmt: skip
    return torch.tensor(full, dtype=torch.int64)


def _spread_and_lowest(deviation: Values, row_weight: Tensor) -> Tensor:
    """Mean and largest max-minus-min over rows, lowest and second lowest cell by its mean over rows; [R, C] → [4]."""
    counts = row_weight.unsqueeze(1)
    x = Values(deviation.value * counts, deviation.present * counts)
    rows = x.present.amax(1)
    spread = (masked.highest(x, 1) - masked.lowest(x, 1)) * rows
    some = rows.sum() > 0
    cells = masked.mean(x, 0)
    ordered = masked.ascending(cells)
    return torch.stack(
        [
            masked.or_missing(spread.sum() / rows.sum().clamp(min=1), some),
            masked.or_missing(spread.amax(), some),
            masked.or_missing(ordered[0], some),
            masked.or_missing(masked.nth(ordered, (cells.present.sum() - 1).clamp(min=0, max=1)), some),
        ]
    )


def initial_state(specs: tuple[StateSpec, ...], cells: int, probes: int) -> State:
    """Fresh state tensors for a vehicle with so many cells and probes (0 counts as 1: one column of NaN)."""
    size = {"C": max(1, cells), "P": max(1, probes)}
    return {
        s.name: np.full([size[d] if isinstance(d, str) else d for d in s.shape], s.initial, dtype=np.float32)
        for s in specs
    }


def export_features(graph: FeatureGraph) -> bytes:
    """Write the feature graph as ONNX, opset 17; C and P are dynamic, everything else is fixed."""
    spec, signals = graph.spec, len(graph.catalogue.scalars)
    state = initial_state(graph.state_specs, 4, 3)
    arguments = (
        torch.zeros(1, spec.frames, signals),
        torch.zeros(1, spec.vector_frames, 4),
        torch.zeros(1, spec.vector_frames, 3),
        torch.full((1,), float(spec.stride_s)),
        *(torch.from_numpy(x) for x in state.values()),
    )
    outs = ["features", "pooled", *(f"{s.name}_out" for s in graph.state_specs), "worst_cell", "worst_cell_deviation_v"]
    dynamic = {"cell_voltage": {2: "C"}, "cell_temperature": {2: "P"}}
    for s in graph.state_specs:
        axes = {i: str(d) for i, d in enumerate(s.shape) if isinstance(d, str)}
        if axes:
            dynamic[s.name] = dynamic[f"{s.name}_out"] = axes
    return export_module(graph, arguments, [*INPUTS, *state], outs, dynamic)


def export_module(
    network: nn.Module,
    arguments: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> bytes:
    """Run torch's legacy exporter. The dynamo one leaves some LSTM sizes unquantized in silence (docs/adr/0040)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        for category, text, module in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=text, category=category, module=module)
        torch.onnx.export(
            network.eval(),
            arguments,
            buffer,  # type: ignore[arg-type]  # a file object is accepted where dynamo=False
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    # an input that nothing reads (a schema without cells) is lost, or loses its type: say again what they are
    del model.graph.input[:]
    for name, x in zip(inputs, arguments, strict=True):
        shape = [dynamic.get(name, {}).get(axis, size) for axis, size in enumerate(x.shape)]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return bytes(model.SerializeToString())


class FeatureRunner:
    """The feature graph in onnxruntime, one thread, for making training data along each vehicle's time.

    `model` is `export_features`'s bytes, so that worker processes need not export it again.
    """

    def __init__(self, catalogue: Catalogue, spec: WindowSpec, model: bytes | None = None) -> None:
        graph = FeatureGraph(catalogue, spec)
        self.feature_names = graph.feature_names
        self.state_specs = graph.state_specs
        self.state_id = graph.state_id
        self.pooled_frames = graph.pooled_frames
        self.model = export_features(graph) if model is None else model
        self._session = ort.InferenceSession(self.model, session_options(), providers=["CPUExecutionProvider"])
        # the exporter drops an input that nothing reads: the vectors, where the schema has none
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._outputs = ["features", "pooled", *(f"{s.name}_out" for s in self.state_specs)]

    def initial_state(self, cells: int, probes: int) -> State:
        """Return the state of a vehicle never seen before."""
        return initial_state(self.state_specs, cells, probes)

    def run(self, window: Window, state: State) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], State]:
        """One window: features [F] (NaN = not known), pooled [N/5, S] (NaN = missing) and the next state."""
        feed = {name: value for name, value in {**graph_inputs(window), **state}.items() if name in self._inputs}
        features, pooled, *following = self._session.run(self._outputs, feed)
        return features[0], pooled[0], dict(zip(state, following, strict=True))


def graph_inputs(window: Window) -> dict[str, Float32Array]:
    """Return the graph's inputs for a window, state tensors excluded."""
    return {
        "window": np.asarray(window.values, dtype=np.float32)[None],
        VECTOR_ROLES[0]: np.asarray(window.cell_voltage, dtype=np.float32)[None],
        VECTOR_ROLES[1]: np.asarray(window.cell_temperature, dtype=np.float32)[None],
        "elapsed_s": np.array([window.elapsed_s], dtype=np.float32),
    }

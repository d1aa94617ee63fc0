"""Deterministic safety rules, on every ordered arrival; they work with no bundle at all.

After GB 38031-2025: temperature rising by ≥ 1 °C/s for more than 3 s, the maker's highest temperature, a cell's voltage
25 % down; a variant for telemetry in which the whole jump lies between two arrivals and stays flat after it; isolation
below 100 Ω/V (UN R100); an inverter or a charging inlet too hot.

Promises: one arrival alone alarms only when two independent signals agree (two probes that differ, a probe and a cell);
else the signal itself must still say so in an arrival at least `confirm_s` later. So one glitch never fires, nor does a
value that is the usual code for "no value", nor a sensor that comes back from such a code to what its neighbours say.
A block cut into pieces anywhere gives the same alarms. Pure: time is that of the arrivals.

A block is first screened as a whole; only stretches in which something moves are looked at row by row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.messages import Severity
from edge_agent.contract.signals import SEVERITIES, Catalogue, FloatArray
from edge_agent.pipeline.outcomes import AlertChange, Reason

THERMAL, INVERTER, CHARGING = "thermal_runaway_risk", "inverter_overheating", "charging_fault"

# Raw 0xFF and 0xFE, "not available" and "error" (SAE J1939-71), and int8's ends, under the encodings of temperatures in
# use: 1 °C a bit with offset 0, -40, -50; 0.5 °C a bit with offset 0, -40. Believed only when another signal agrees.
HOT_CODES_C = np.array([255, 254, 215, 214, 205, 204, 127.5, 127, 126, 87.5, 87])
COLD_CODES_C = np.array([-128, -127, -50, -45, -40, 0])  # raw 0 under the same; never a base to rise from
DEAD_CELL_V = 0.1  # a sense wire that is off reads zero
_SCREEN_ROWS = 256
_BASES = 3  # so many earlier values must all lie below: a single low glitch is no base
_LOOK_BACK_S = 4  # whole seconds: two values so far apart are more than 3 s apart


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """Limits with their reasons. A maker's own numbers replace them."""

    rise_c_per_s: float = 1.0  # GB 38031-2025
    jump_c: float = 6.0  # between two arrivals at most a minute apart; two healthy cars: at most 3 within 20 s
    base_age_s: float = 60.0  # after a longer silence a smaller rise is nothing: a pack warms while nobody looks
    gap_jump_c: float = 12.0  # over a silence: 2.4 °C a minute at least; fast charging in heat gives about 1
    gap_age_s: float = 300.0  # still older values are no base
    battery_c: float = 60.0  # the usual highest cell temperature in makers' data sheets
    battery_critical_c: float = 80.0  # separator shrinks, self-heating sets in
    inverter_c: float = 125.0  # case sensor; junctions are rated 150 to 175 °C
    inverter_critical_c: float = 150.0
    inlet_c: float = 90.0  # IEC 62196-1: highest contact temperature
    hysteresis_c: float = 5.0
    cell_share: float = 0.75  # of the pack's median: GB 38031's drop of 25 %
    isolation_ohm_per_v: float = 100.0  # UN R100 5.1.3: DC
    isolation_s: float = 10.0  # monitors settle for some seconds after wake-up
    confirm_s: float = 0.5  # two arrivals closer than this are one reading
    agree_s: float = 60.0  # two signals agree when both began within this
    forget_s: float = 120.0  # a rise not confirmed within this is forgotten
    neighbours_c: float = (
        4.0  # above the median of the other probes, or above `plausible_c`: else it came back, it rose not
    )
    plausible_c: float = 40.0
    hold_s: float = 600.0  # how long a rise counts as present once confirmed
    clear_s: float = 60.0  # a level must be back for so long
    cooldown_s: float = 1800.0


class Alarm(msgspec.Struct, kw_only=True):
    """What one type's guard alarm remembers."""

    active: bool = False
    since_s: float = 0.0
    severity: Severity = "low"
    rule: str = ""
    key: str = ""
    until_s: float = -np.inf  # the alarm stands at least until here
    alerted_s: float | None = None


class Second(msgspec.Struct, kw_only=True):
    """The newest value of each temperature within one whole second, with its time; NaN = none."""

    number: int
    value: FloatArray
    time_s: FloatArray


class GuardState(msgspec.Struct, kw_only=True):
    """What the rules remember; T temperatures (the probes, then the BMS's maximum), C cells.

    base_* [3, T] the newest values at least three seconds old, newest first; rise_* [T] a rise that waits for its
    confirmation; *_since the first arrival of a level that stands, inf = none.
    """

    seconds: list[Second]
    base_value: FloatArray
    base_time_s: FloatArray
    newest: FloatArray
    rise_since_s: FloatArray
    rise_from: FloatArray
    rise_need: FloatArray
    hot_since_s: FloatArray
    cell: FloatArray
    cell_s: FloatArray
    low_since_s: FloatArray
    level_since_s: dict[str, float]
    pack_voltage: float
    pack_voltage_s: float
    last_s: float
    alarms: dict[str, Alarm]


@dataclass(frozen=True, slots=True)
class _Sign:
    """One rule's finding in one row."""

    failure_type: str
    rule: str
    severity: Severity
    since_s: float
    until_s: float
    evidence: tuple[Reason, ...]


class Guards:
    """The rules over one vehicle's arrivals.

    timeline   tells timelines apart in an alert's key (see `AlertChange.key`)
    """

    def __init__(self, catalogue: Catalogue, limits: GuardLimits | None = None, *, timeline: str = "") -> None:
        self.limits = limits or GuardLimits()
        self.timeline = timeline
        self._catalogue = catalogue
        self._column = {
            role: catalogue.column(role)
            for role in (
                "battery_temperature_max", "inverter_temperature", "inlet_temperature", "insulation_resistance",
                "pack_voltage", "cell_voltage_min", "cell_voltage_max",
            )
        }  # fmt: skip
        self._state: GuardState | None = None

    def check(self, block: ArrivalBlock) -> list[AlertChange]:
        """Look at rows sorted by time; return the alarms raised, escalated and cleared, in time order."""
        rows = len(block)
        if not rows:
            return []
        if self._state is None:
            self._state = _fresh(block.cell_temperature.shape[1] + 1, block.cell_voltage.shape[1])
        changes: list[AlertChange] = []
        if rows == 1:
            self._row(float(block.time_s[0]), self._temperatures(block)[0], block.cell_voltage[0], block.scalars[0],
                      changes)  # fmt: skip
            return changes
        temperatures = self._temperatures(block)
        for begin in range(0, rows, _SCREEN_ROWS):
            part = slice(begin, min(begin + _SCREEN_ROWS, rows))
            if self._quiet(block, temperatures, part):
                self._pass_over(block, temperatures, part)
                continue
            for i in range(part.start, part.stop):
                self._row(float(block.time_s[i]), temperatures[i], block.cell_voltage[i], block.scalars[i], changes)
        return changes

    def _temperatures(self, block: ArrivalBlock) -> FloatArray:
        """[n, P + 1]: the probes, then the BMS's own maximum."""
        column = self._column["battery_temperature_max"]
        last = np.full(len(block), np.nan) if column is None else block.scalars[:, column]
        return np.column_stack((block.cell_temperature, last))

    # --- the screen: is there anything to look at? ---

    def _quiet(self, block: ArrivalBlock, temperatures: FloatArray, part: slice) -> bool:
        """Whether no rule can begin, hold or end within these rows, whatever their order."""
        state, limits = self._now, self.limits
        if (
            block.time_s[part.start] < state.last_s
            or any(a.active for a in state.alarms.values())
            or state.level_since_s
            or any(np.isfinite(a).any() for a in (state.rise_since_s, state.hot_since_s, state.low_since_s))
        ):
            return False
        known = np.vstack((temperatures[part], state.base_value, *(s.value for s in state.seconds)))
        low, high = np.fmin.reduce(known, axis=0), np.fmax.reduce(known, axis=0)
        # 3 °C: the least rise any rule asks for, just above 3 s at 1 °C/s
        if (high - low >= 3.0 * limits.rise_c_per_s).any() or (high >= limits.battery_c).any():
            return False
        cells = block.cell_voltage[part]
        if cells.size:
            known = np.vstack((cells, state.cell[None]))
            if np.fmin.reduce(known, axis=None) < limits.cell_share * np.fmax.reduce(known, axis=None):
                return False
        return self._quiet_scalars(block.scalars[part])

    def _quiet_scalars(self, scalars: FloatArray) -> bool:
        limits = self.limits

        def extreme(role: str, reduce: np.ufunc) -> float:
            column = self._column[role]
            return np.nan if column is None else float(reduce.reduce(scalars[:, column]))

        voltage = np.fmax(extreme("pack_voltage", np.fmax), self._now.pack_voltage)
        return not (
            extreme("inverter_temperature", np.fmax) >= limits.inverter_c
            or extreme("inlet_temperature", np.fmax) >= limits.inlet_c
            or extreme("insulation_resistance", np.fmin) * 1000.0 < limits.isolation_ohm_per_v * voltage
            or extreme("cell_voltage_min", np.fmin) < limits.cell_share * extreme("cell_voltage_max", np.fmax)
        )

    def _pass_over(self, block: ArrivalBlock, temperatures: FloatArray, part: slice) -> None:
        """Remember what `_row` would have remembered of rows in which nothing happens."""
        state = self._now
        time = block.time_s[part]
        _remember_seconds(state, time, temperatures[part])
        row, columns = _last_present(temperatures[part])
        state.newest[columns] = temperatures[part][row, columns]
        row, columns = _last_present(block.cell_voltage[part])
        state.cell[columns] = block.cell_voltage[part][row, columns]
        state.cell_s[columns] = time[row]
        column = self._column["pack_voltage"]
        if column is not None:
            row, columns = _last_present(block.scalars[part, column : column + 1])
            if columns.size:
                state.pack_voltage = float(block.scalars[part.start + row[0], column])
                state.pack_voltage_s = float(time[row[0]])
        state.last_s = float(time[-1])

    # --- one row ---

    @property
    def _now(self) -> GuardState:
        if self._state is None:
            raise RuntimeError("no arrival yet")
        return self._state

    def _row(
        self, time: float, temperatures: FloatArray, cells: FloatArray, scalars: FloatArray, changes: list[AlertChange]
    ) -> None:
        state = self._now
        if time < state.last_s:
            self._set_back(time)
            state = self._now
        state.last_s = time
        signs: list[_Sign] = []
        if cells.size and not np.isnan(cells).all():
            signs += self._cells(time, cells)
        # A wire that has long been dead agrees with nothing.
        low_cell = bool((np.abs(time - state.low_since_s) <= self.limits.agree_s).any())
        if not np.isnan(temperatures).all():
            signs += self._rise(time, temperatures, low_cell=low_cell)
            signs += self._hot(time, temperatures, low_cell=low_cell)
        signs += self._scalars(time, scalars)
        if signs or state.alarms:
            self._alarm(time, signs, changes)

    def _set_back(self, time: float) -> None:
        """Time ran backwards: nothing remembered can be compared. Standing alarms stay, and end by the new time."""
        old = self._now
        fresh = _fresh(old.newest.shape[0], old.cell.shape[0])
        fresh.alarms = old.alarms
        for alarm in fresh.alarms.values():
            alarm.until_s = min(alarm.until_s, time + self.limits.hold_s)
            if alarm.alerted_s is not None:
                alarm.alerted_s = min(alarm.alerted_s, time)
        self._state = fresh

    def _rise(self, time: float, values: FloatArray, *, low_cell: bool) -> Iterator[_Sign]:
        state, limits = self._now, self.limits
        _advance(state, int(np.floor(time)))
        present = ~np.isnan(values)
        pending = np.isfinite(state.rise_since_s)
        if pending.any():
            gone = pending & (
                (present & (values - state.rise_from < state.rise_need - 1e-6))
                | (time - state.rise_since_s > limits.forget_s)
            )
            state.rise_since_s[gone] = np.inf
            pending &= ~gone
        base = np.where(time - state.base_time_s <= limits.gap_age_s, state.base_value, np.nan)
        base = np.fmax.reduce(base, axis=0)
        age = time - state.base_time_s[0]
        jump = np.where(age <= limits.base_age_s, limits.jump_c, limits.gap_jump_c)
        need = np.minimum(limits.rise_c_per_s * age, jump)
        begun = present & ~pending & (values - base >= need - 1e-6)
        if begun.any():
            state.rise_since_s[begun] = time
            state.rise_from[begun] = base[begun]
            state.rise_need[begun] = need[begun]
            pending |= begun
        state.newest[present] = values[present]
        _store(state, time, values, present)
        if not pending.any():
            return
        rising = present & pending & self._is_hot_for_real(values)
        if not rising.any():
            return
        confirmed = rising & (time - state.rise_since_s >= limits.confirm_s) & ~np.isin(values, HOT_CODES_C)
        together = self._two_probes(values, rising)
        if not (confirmed.any() or together or (low_cell and rising.any())):
            return
        strongest = int(np.argmax(np.where(rising, values - state.rise_from, -np.inf)))
        sudden = bool(state.rise_need[strongest] >= limits.jump_c)
        yield _Sign(
            THERMAL,
            "temperature_jump" if sudden else "gb38031_temperature_rise",
            "critical" if together or low_cell else "high",
            float(state.rise_since_s[rising].min()),
            time + limits.hold_s,
            (
                self._temperature_reason(strongest, float(values[strongest])),
                Reason("rise from", float(state.rise_from[strongest]), unit="celsius"),
            ),
        )

    def _is_hot_for_real(self, values: FloatArray) -> npt.NDArray[np.bool_]:
        """Hot as such, or hotter than its neighbours: a probe that came back from an invalid code is neither."""
        limits, newest = self.limits, self._now.newest
        probes = newest[:-1][~np.isnan(newest[:-1])]
        if probes.shape[0] < 3:
            return np.ones(values.shape, bool)
        return values >= np.where(values - float(np.median(probes)) >= limits.neighbours_c, -np.inf, limits.plausible_c)

    def _two_probes(self, values: FloatArray, chosen: npt.NDArray[np.bool_]) -> bool:
        """Two probes of their own agree; equal values are more likely one code than two measurements."""
        of_probes = values[:-1][chosen[:-1]]
        of_probes = of_probes[~np.isin(of_probes, HOT_CODES_C)]
        return bool(of_probes.shape[0] >= 2 and of_probes.max() > of_probes.min())

    def _hot(self, time: float, values: FloatArray, *, low_cell: bool) -> Iterator[_Sign]:
        state, limits = self._now, self.limits
        present = ~np.isnan(values)
        standing = np.isfinite(state.hot_since_s)
        limit = np.where(standing, limits.battery_c - limits.hysteresis_c, limits.battery_c)
        hot = present & (values >= limit)
        if not (hot.any() or standing.any()):
            return
        state.hot_since_s[present & ~hot] = np.inf
        state.hot_since_s[hot] = np.minimum(state.hot_since_s[hot], time)
        believed = hot & ~np.isin(values, HOT_CODES_C)
        if not believed.any():
            return
        confirmed = believed & (time - state.hot_since_s >= limits.confirm_s)
        if not (confirmed.any() or self._two_probes(values, believed) or low_cell):
            return
        hottest = int(np.argmax(np.where(believed, values, -np.inf)))
        severity: Severity = "critical" if values[hottest] >= limits.battery_critical_c else "high"
        yield _Sign(
            THERMAL, "over_temperature", severity, float(state.hot_since_s[believed].min()), time + limits.clear_s,
            (self._temperature_reason(hottest, float(values[hottest])),),
        )  # fmt: skip

    def _cells(self, time: float, cells: FloatArray) -> Iterator[_Sign]:
        state, limits = self._now, self.limits
        present = ~np.isnan(cells)
        state.cell[present] = cells[present]
        state.cell_s[present] = time
        standing = np.isfinite(state.low_since_s)
        highest = np.fmax.reduce(state.cell)
        if not standing.any() and not (cells < limits.cell_share * highest).any():
            return
        fresh = state.cell[time - state.cell_s <= limits.base_age_s]
        if fresh.shape[0] < 3:  # a median of two says nothing
            return
        median = float(np.median(fresh))
        low = present & (cells < limits.cell_share * median)
        state.low_since_s[present & ~low] = np.inf
        state.low_since_s[low] = np.minimum(state.low_since_s[low], time)
        believed = low & (cells > DEAD_CELL_V)
        began = np.maximum(
            np.where(np.isfinite(state.rise_since_s), state.rise_since_s, -np.inf),
            np.where(np.isfinite(state.hot_since_s), state.hot_since_s, -np.inf),
        )
        hot = bool((time - began[~np.isin(state.newest, HOT_CODES_C)] <= limits.agree_s).any())
        confirmed = believed & (time - state.low_since_s >= limits.confirm_s)
        together = low & (time - state.low_since_s <= limits.agree_s) if hot else np.zeros(low.shape, bool)
        chosen = confirmed | together
        if not chosen.any():
            return
        lowest = int(np.argmin(np.where(chosen, cells, np.inf)))
        signal = self._catalogue.role("cell_voltage")
        name = "cell_voltage" if signal is None else signal.name
        yield _Sign(
            THERMAL, "gb38031_voltage_drop", "critical" if together.any() else "high",
            float(state.low_since_s[chosen].min()), time + limits.clear_s,
            (Reason(f"{name}[{lowest}]", float(cells[lowest]), unit="V"), Reason("pack median", median, unit="V")),
        )  # fmt: skip

    def _scalars(self, time: float, scalars: FloatArray) -> Iterator[_Sign]:
        limits, state = self.limits, self._now
        voltage = self._scalar(scalars, "pack_voltage")
        if voltage is not None:
            state.pack_voltage, state.pack_voltage_s = voltage, time
        for role, failure_type, rule, limit, critical in (
            ("inverter_temperature", INVERTER, "inverter_over_temperature", limits.inverter_c,
             limits.inverter_critical_c),
            ("inlet_temperature", CHARGING, "inlet_over_temperature", limits.inlet_c, np.inf),
        ):  # fmt: skip
            value = self._scalar(scalars, role)
            if value is None:
                continue
            bar = limit - limits.hysteresis_c if rule in state.level_since_s else limit
            if self._stands(rule, time, value >= bar and value not in HOT_CODES_C, limits.confirm_s):
                severity: Severity = "critical" if value >= critical else "high"
                yield self._level_sign(failure_type, rule, severity, time, role=role, value=value)
        resistance = self._scalar(scalars, "insulation_resistance")
        if resistance is not None:
            rule = "isolation_loss"
            # 60 V: above it UN R100 speaks of high voltage
            known = time - state.pack_voltage_s <= limits.base_age_s and state.pack_voltage > 60.0
            bar = limits.isolation_ohm_per_v * (1.2 if rule in state.level_since_s else 1.0)
            if self._stands(rule, time, known and resistance * 1000.0 < bar * state.pack_voltage, limits.isolation_s):
                yield self._level_sign(CHARGING, rule, "high", time, role="insulation_resistance", value=resistance)
        if not state.cell.shape[0]:  # the extremes are the same cells: asked only where no cell is known
            low, high = self._scalar(scalars, "cell_voltage_min"), self._scalar(scalars, "cell_voltage_max")
            if low is not None and high is not None:
                below = DEAD_CELL_V < low < limits.cell_share * high
                if self._stands("gb38031_voltage_drop", time, below, limits.confirm_s):
                    yield self._level_sign(
                        THERMAL, "gb38031_voltage_drop", "high", time, role="cell_voltage_min", value=low
                    )

    def _scalar(self, scalars: FloatArray, role: str) -> float | None:
        column = self._column[role]
        if column is None:
            return None
        value = float(scalars[column])
        return None if value != value else value  # noqa: PLR0124  # NaN alone differs from itself; ten times as fast

    def _stands(self, rule: str, time: float, holds: bool, for_s: float) -> bool:
        since = self._now.level_since_s
        if not holds:
            since.pop(rule, None)
            return False
        return time - since.setdefault(rule, time) >= for_s

    def _level_sign(
        self, failure_type: str, rule: str, severity: Severity, time: float, *, role: str, value: float
    ) -> _Sign:
        signal = self._catalogue.role(role)
        reason = Reason(role if signal is None else signal.name, value, unit="" if signal is None else signal.unit)
        since = self._now.level_since_s[rule]
        return _Sign(failure_type, rule, severity, since, time + self.limits.clear_s, (reason,))

    def _temperature_reason(self, column: int, value: float) -> Reason:
        is_probe = column < self._now.newest.shape[0] - 1
        signal = self._catalogue.role("cell_temperature" if is_probe else "battery_temperature_max")
        name = "temperature" if signal is None else signal.name
        return Reason(f"{name}[{column}]" if is_probe else name, value, unit="celsius")

    # --- alarms ---

    def _alarm(self, time: float, signs: list[_Sign], changes: list[AlertChange]) -> None:
        state = self._now
        for sign in signs:
            alarm = state.alarms.setdefault(sign.failure_type, Alarm())
            alarm.until_s = max(alarm.until_s, sign.until_s)
            higher = SEVERITIES.index(sign.severity) > SEVERITIES.index(alarm.severity)
            if alarm.active:
                if higher:
                    alarm.severity, alarm.rule, alarm.alerted_s = sign.severity, sign.rule, time
                    changes.append(_change(time, sign.failure_type, "escalated", alarm, sign.evidence))
            elif alarm.alerted_s is None or higher or time - alarm.alerted_s >= self.limits.cooldown_s:
                alarm.active, alarm.since_s, alarm.alerted_s = True, sign.since_s, time
                alarm.severity, alarm.rule = sign.severity, sign.rule
                alarm.key = f"{self.timeline}/{round(sign.since_s * 1000)}"
                changes.append(_change(time, sign.failure_type, "raised", alarm, sign.evidence))
        for failure_type, alarm in state.alarms.items():
            if alarm.active and time > alarm.until_s and not self._still(failure_type):
                alarm.active = False
                changes.append(_change(time, failure_type, "cleared", alarm, ()))

    def _still(self, failure_type: str) -> bool:
        """Whether a level stands though its signal is silent: a burnt sensor does not end an alarm."""
        state = self._now
        if failure_type == THERMAL:
            hot = np.isfinite(state.hot_since_s) & ~np.isin(state.newest, HOT_CODES_C)
            return bool(hot.any() or (np.isfinite(state.low_since_s) & (state.cell > DEAD_CELL_V)).any())
        rules = {INVERTER: ("inverter_over_temperature",), CHARGING: ("isolation_loss", "inlet_over_temperature")}
        return any(rule in state.level_since_s for rule in rules[failure_type])

    # --- state ---

    def state(self) -> GuardState | None:
        """Return a copy of what the rules remember; None before the first arrival."""
        return None if self._state is None else _copy(self._state)

    def restore(self, state: GuardState | None, shift_s: float = 0.0) -> None:
        """Go on from `state`, with every time moved by `shift_s`."""
        if state is None:
            self._state = None
            return
        state = _copy(state)
        if shift_s:
            for array in (state.base_time_s, state.rise_since_s, state.hot_since_s, state.cell_s,
                          state.low_since_s):  # fmt: skip
                np.add(array, shift_s, out=array)
            state.seconds = []
            state.level_since_s = {rule: since + shift_s for rule, since in state.level_since_s.items()}
            state.pack_voltage_s += shift_s
            state.last_s += shift_s
            for alarm in state.alarms.values():
                alarm.since_s += shift_s
                alarm.until_s += shift_s
                alarm.alerted_s = None if alarm.alerted_s is None else alarm.alerted_s + shift_s
        self._state = state


def _change(time: float, failure_type: str, transition: str, alarm: Alarm, evidence: tuple[Reason, ...]) -> AlertChange:
    return AlertChange(
        time_s=time, since_s=alarm.since_s, failure_type=failure_type, transition=transition,  # type: ignore[arg-type]
        severity=alarm.severity, origin="guard", rule=alarm.rule, key=alarm.key, evidence=evidence,
    )  # fmt: skip


def _fresh(temperatures: int, cells: int) -> GuardState:
    def of(value: float, *shape: int) -> FloatArray:
        return np.full(shape, value)

    return GuardState(
        seconds=[], base_value=of(np.nan, _BASES, temperatures), base_time_s=of(-np.inf, _BASES, temperatures),
        newest=of(np.nan, temperatures),
        rise_since_s=of(np.inf, temperatures), rise_from=of(np.nan, temperatures), rise_need=of(np.nan, temperatures),
        hot_since_s=of(np.inf, temperatures), cell=of(np.nan, cells), cell_s=of(-np.inf, cells),
        low_since_s=of(np.inf, cells), level_since_s={}, pack_voltage=np.nan, pack_voltage_s=-np.inf, last_s=-np.inf,
        alarms={},
    )  # fmt: skip


def _copy(state: GuardState) -> GuardState:
    values = {name: getattr(state, name) for name in GuardState.__struct_fields__}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            values[name] = value.copy()
    values["seconds"] = [Second(number=s.number, value=s.value.copy(), time_s=s.time_s.copy()) for s in state.seconds]
    values["level_since_s"] = dict(state.level_since_s)
    values["alarms"] = {k: msgspec.structs.replace(a) for k, a in state.alarms.items()}
    return GuardState(**values)


def _store(state: GuardState, time: float, values: FloatArray, present: npt.NDArray[np.bool_]) -> None:
    """Keep a row's temperatures under its whole second."""
    number = int(np.floor(time))
    if not state.seconds or state.seconds[-1].number != number:
        empty = np.full(values.shape, np.nan)
        state.seconds.append(Second(number=number, value=empty, time_s=empty.copy()))
    newest = state.seconds[-1]
    usable = present & ~np.isin(values, COLD_CODES_C)
    newest.value[usable] = values[usable]
    newest.time_s[usable] = time


def _advance(state: GuardState, number: int) -> None:
    """Move seconds that now lie more than 3 s back into the bases."""
    while state.seconds and state.seconds[0].number <= number - _LOOK_BACK_S:
        second = state.seconds.pop(0)
        present = ~np.isnan(second.value)
        state.base_value[1:, present] = state.base_value[:-1, present]
        state.base_time_s[1:, present] = state.base_time_s[:-1, present]
        state.base_value[0, present] = second.value[present]
        state.base_time_s[0, present] = second.time_s[present]


def _remember_seconds(state: GuardState, time_s: FloatArray, values: FloatArray) -> None:
    """`_advance` and `_store` for many rows at once: only the newest three seconds a column can matter."""
    arrived = ~np.isnan(values).all(axis=1)
    time_s, values = time_s[arrived], values[arrived]
    numbers, starts = np.unique(np.floor(time_s).astype(np.int64), return_index=True)
    stops = np.append(starts[1:], time_s.shape[0])
    # A column may be silent in the newest seconds; its last three go further back. Walk back until all have three.
    usable = ~np.isnan(values) & ~np.isin(values, COLD_CODES_C)
    needed = np.where(usable.any(axis=0), _BASES + _LOOK_BACK_S, 0)
    first = numbers.shape[0]
    while first > 0 and (needed > 0).any():
        first -= 1
        needed -= usable[starts[first] : stops[first]].any(axis=0)
    for k in range(first, numbers.shape[0]):
        _advance(state, int(numbers[k]))
        for i in range(int(starts[k]), int(stops[k])):
            _store(state, float(time_s[i]), values[i], ~np.isnan(values[i]))


def _last_present(values: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row of the last present value of each column that has one, and those columns."""
    present = ~np.isnan(values)
    columns = np.flatnonzero(present.any(axis=0))
    return values.shape[0] - 1 - np.argmax(present[::-1], axis=0)[columns], columns

"""One look at a span of time: what each scope's counts say against one reference.

Reads vehicle by vehicle; in memory are the sums of one vehicle, and one row for the fleet and each make and stratum,
however many messages there are. What is set aside on the way is returned, not written.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncConnection

from cloud.drift import merge
from cloud.drift.bins import Bins, IntArray
from cloud.drift.decide import Judged, Scope, judge
from cloud.drift.limits import Drift
from cloud.drift.merge import FloatArray, Merge, Size
from cloud.store import drift_rows
from cloud.store.drift_rows import Known, Span, Total


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which scopes to judge: of all vehicles, of one make, or of one vehicle; `complete` also those with too little."""

    scopes: frozenset[Scope]
    vehicle_id: str | None = None
    make: str | None = None
    stratum: str | None = None
    complete: bool = True


@dataclass(slots=True)
class Looked:
    """What came of it beside the verdicts."""

    totals: list[Total] = field(default_factory=list)
    wrong: list[tuple[int, str]] = field(default_factory=list)  # (ingest_id, problem) of counts that do not fit


async def look(
    connection: AsyncConnection, known: Known, span: Span, wanted: Wanted, limits: Drift, looked: Looked
) -> AsyncIterator[tuple[Scope, str, list[Judged]]]:
    """Yield (scope, its id, verdicts on every variable and stratum) for every scope that has counts."""
    up_to = await drift_rows.newest(connection)
    looked.totals = [
        t
        for t in await drift_rows.totals(
            connection, known.reference, span, up_to=up_to, vehicle_id=wanted.vehicle_id, make=wanted.make
        )
        if wanted.stratum in (None, t.stratum)
    ]
    judging = _Judging(known.bins, limits, complete=wanted.complete)
    groups = _groups(looked.totals, wanted, known.bins, limits)
    by_vehicle: dict[str, list[Total]] = {}
    for total in looked.totals:
        by_vehicle.setdefault(total.vehicle_id, []).append(total)
    for vehicle_id, totals in by_vehicle.items():
        mine = [(t, groups[key]) for t in totals for key in _keys(t, wanted) if vehicle_id in groups[key].plan.weights]
        alone = "vehicle" in wanted.scopes and (wanted.complete or any(t.windows >= limits.min_windows for t in totals))
        if not mine and not alone:
            continue
        sums, wrong = await drift_rows.vehicle_sums(
            connection, known, span, vehicle_id, up_to=up_to, stratum=wanted.stratum
        )
        looked.wrong += wrong
        for total, group in mine:
            if total.stratum in sums:
                group.add(vehicle_id, sums[total.stratum])
        if alone:
            found: list[Judged] = []
            for t in totals:
                size = Size(t.windows, 1, 1.0, float(t.windows))
                found += judging.of("vehicle", t.stratum, sums.get(t.stratum), size)
            yield "vehicle", vehicle_id, found
    verdicts: dict[tuple[Scope, str], list[Judged]] = {}
    for (scope, scope_id, stratum), group in groups.items():
        verdicts.setdefault((scope, scope_id), []).extend(judging.of(scope, stratum, group.row, group.plan.size))
    for (scope, scope_id), found in verdicts.items():
        yield scope, scope_id, found


def _keys(total: Total, wanted: Wanted) -> Iterator[tuple[Scope, str, str]]:
    if "fleet" in wanted.scopes:
        yield "fleet", "", total.stratum
    if "make" in wanted.scopes and total.make:
        yield "make", total.make, total.stratum


def _groups(
    totals: Sequence[Total], wanted: Wanted, bins: Bins, limits: Drift
) -> dict[tuple[Scope, str, str], Merge]:  # fmt: skip
    windows: dict[tuple[Scope, str, str], dict[str, int]] = {}
    for total in totals:
        for key in _keys(total, wanted):
            windows.setdefault(key, {})[total.vehicle_id] = total.windows
    return {key: Merge(merge.plan(held, limits), bins.width) for key, held in windows.items()}


class _Judging:
    """Verdicts against one reference, whose rows are laid out once."""

    def __init__(self, bins: Bins, limits: Drift, *, complete: bool) -> None:
        self._bins, self._limits, self._complete = bins, limits, complete
        self._reference: dict[str, IntArray] = {}

    def of(self, scope: Scope, stratum: str, row: FloatArray | IntArray | None, size: Size) -> list[Judged]:
        few = size.windows < self._limits.min_windows or (
            scope != "vehicle" and size.vehicles < self._limits.min_vehicles
        )
        if few and not self._complete:
            return []
        if stratum not in self._reference:
            self._reference[stratum] = self._bins.reference_row(stratum)
        reference = self._reference[stratum]
        found = self._bins.distances(reference, row) if row is not None else (None,) * len(self._bins.names)
        calibration = self._bins.reference.calibration
        return [
            judge(
                variable, stratum, distances, size=size, scope=scope, calibration=calibration, limits=self._limits,
                reference_windows=int(reference[self._bins.slices[variable.name]].sum()),
            )
            for variable, distances in zip(self._bins.variables, found, strict=True)
        ]  # fmt: skip

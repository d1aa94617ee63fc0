"""The whole way from arrivals to outcomes for one vehicle: ingest, guards, window, model, decision, counts, samples.

Promises: the same arrivals give the same outcomes live, in a replay and in the server, however they are cut into
blocks; windows and alerts leave in time order, the counts of a span before the first window after it, samples after the
window that asked for them; `snapshot` and `restore` go on exactly where another instance stopped. Owns no clock, no
queue and no file: sending, storing and reading are left to whoever runs it.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline import decision, drift
from edge_agent.pipeline.alerts import model_evidence
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.guards import GuardLimits, Guards
from edge_agent.pipeline.inference import Scorer, State
from edge_agent.pipeline.ingest import Ingest
from edge_agent.pipeline.outcomes import AlertChange, Counted, NoScore, Outcome, Scored, Scores, Window
from edge_agent.pipeline.sampling import Sampler, SamplingLimits
from edge_agent.pipeline.snapshot import PipelineState, decode, encode
from edge_agent.pipeline.window import Windower


class Pipeline:
    """Runs one vehicle's arrivals through everything up to the decision.

    period_s        how often the source reports (the mapping's `source.period_s`)
    cells, probes   widths of the vectors; rows of another width raise `ValueError`
    bundle          None = guards alone; every window is then a `NoScore` with reason "no_bundle"
    horizon_s       how late a row may come (`Ingest`); 0 for a live bus, where rows are stamped at receipt
    timeline        "" where times are Unix seconds, else what tells this timeline from others: the boot id
    expected        names of the signals the source carries; they count in the coverage before they were ever seen
    publish_s       drift counts leave when so much of the source's time has passed since their first window
    sampling        which raw windows are to be sent, and how many bytes of them

    Raises `BundleError` when the bundle's graph does not load.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        vehicle_id: str,
        period_s: float = 1.0,
        cells: int = 0,
        probes: int = 0,
        bundle: LoadedBundle | None = None,
        guard_limits: GuardLimits | None = None,
        horizon_s: float = 2.0,
        timeline: str = "",
        expected: Collection[str] = (),
        publish_s: float = drift.PUBLISH_S,
        sampling: SamplingLimits | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.vehicle_id = vehicle_id
        self.bundle = bundle
        self.cells, self.probes = cells, probes
        self._timeline = timeline
        self._ingest = Ingest(horizon_s, catalogue)
        self._guards = Guards(catalogue, guard_limits, timeline=timeline)
        spec = WindowSpec() if bundle is None else bundle.manifest.window
        self._windower = Windower(catalogue, spec, period_s, cells, probes, expected=expected)
        self._scorer = None if bundle is None else Scorer(bundle, catalogue)
        self._model_state: State = {} if self._scorer is None else self._scorer.initial_state(cells, probes)
        self._decisions: dict[str, decision.TypeState] = {}
        self._counts: Counter[str] = Counter()
        self._drift = (
            None
            if bundle is None
            else drift.DriftCounter(
                bundle.drift_reference,
                catalogue,
                features=bundle.manifest.features,
                failure_types=bundle.manifest.failure_types,
                spec=spec,
                reference_id=bundle.drift_reference_sha256,
                release=bundle.manifest.release,
                timeline=timeline,
                publish_s=publish_s,
            )
        )
        self._sampler = Sampler(
            sampling or SamplingLimits(), vehicle_id=vehicle_id, signals=catalogue.scalar_names, length_s=spec.length_s,
            timeline=timeline, state_id="" if bundle is None else bundle.manifest.state_id,
            release=None if bundle is None else bundle.manifest.release,
        )  # fmt: skip
        self.last_arrival_s: float | None = None
        self.last_scores: Scores | None = None

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start: frames (rows taken), rows_… and values_… (`Ingest`), windows_scored,
        windows_no_score.REASON, alerts_raised, guard_alerts_raised, window_starts, snapshot_refused, drift_messages,
        drift_windows (in them), samples.REASON, sample_bytes, samples_over_budget.REASON.
        """  # noqa: D205
        counts = dict(self._counts + self._sampler.counters)
        rows = dict(self._ingest.counters)
        counts["frames"] = rows.pop("rows", 0)
        counts.update(rows)
        counts["window_starts"] = self._windower.starts
        counts.setdefault("windows_scored", 0)
        return counts

    @property
    def no_score_reasons(self) -> dict[str, int]:
        """Windows without a score, by reason."""
        prefix = "windows_no_score."
        return {k[len(prefix) :]: v for k, v in self._counts.items() if k.startswith(prefix)}

    @property
    def stale(self) -> tuple[str, ...]:
        """Names of carried signals that had too few values in the newest window."""
        return self._windower.stale

    @property
    def warming_s(self) -> float:
        """Seconds of arrivals until the next window can end."""
        return self._windower.warming_s

    def push(self, block: ArrivalBlock) -> list[Outcome]:
        """Take arrivals in any order within the horizon; return what they led to, in time order.

        Raises `ValueError` for a block of other widths than the pipeline's.
        """
        widths = (block.scalars.shape[1], block.cell_voltage.shape[1], block.cell_temperature.shape[1])
        if widths != (len(self.catalogue.scalars), self.cells, self.probes):
            raise ValueError(f"block of widths {widths}; this pipeline takes {len(self.catalogue.scalars)} scalars, "
                             f"{self.cells} cells and {self.probes} probes")  # fmt: skip
        return self._ordered(self._ingest.push(block))

    def complete(self) -> list[Outcome]:
        """Return what is still to come of the arrivals so far, where no more can come for the newest grid point."""
        outcomes = self._ordered(self._ingest.flush())
        for window in self._windower.flush():
            outcomes += self._window(window)
        return outcomes

    def flush(self) -> list[Outcome]:
        """Return what is still to come of the arrivals so far, counts included: the source has ended."""
        return [*self.complete(), *self.take_counts()]

    def idle(self, now_s: float) -> list[Outcome]:
        """Say that it is `now_s` and nothing came since the newest arrival; counts that are due leave.

        Nothing happens before the silence is a gap: then the next arrival begins a new window whatever it is, so that
        the counts are those which it would have brought.
        """
        if self.last_arrival_s is None or not now_s > self.last_arrival_s + self._windower.gap_s:
            return []
        if self._drift is None or not self._drift.due(now_s):
            return []
        outcomes = self.complete()
        return [*outcomes, *self.take_counts()] if self._drift.due(now_s) else outcomes

    def take_counts(self) -> list[Outcome]:
        """End the open span of drift counts and return it, one outcome a stratum; nothing where none was scored."""
        taken = () if self._drift is None else self._drift.take()
        self._counts["drift_messages"] += len(taken)
        self._counts["drift_windows"] += sum(counted.windows for counted in taken)
        return list(taken)

    @property
    def open_counts(self) -> tuple[Counted, ...]:
        """What `take_counts` would return now."""
        return () if self._drift is None else self._drift.open

    def _ordered(self, block: ArrivalBlock) -> list[Outcome]:
        if not len(block):
            return []
        self.last_arrival_s = float(block.time_s[-1])
        guards = self._guards.check(block)
        windows = self._windower.push(block)
        outcomes: list[Outcome] = []
        at = 0
        for window in windows:
            while at < len(guards) and guards[at].time_s <= window.end_s:
                outcomes.append(self._guard(guards[at]))
                at += 1
            outcomes += self._window(window)
        return outcomes + [self._guard(change) for change in guards[at:]]

    def _guard(self, change: AlertChange) -> AlertChange:
        self._counts[f"guard_alerts_{change.transition}"] += 1
        self._sampler.alert(change)
        return change

    def _window(self, window: Window | NoScore) -> list[Outcome]:
        counts = self.take_counts() if self._drift is not None and self._drift.due(window.end_s) else []
        return counts + self._decide(window)

    def _decide(self, window: Window | NoScore) -> list[Outcome]:
        if isinstance(window, NoScore):
            return [self._no_score(window)]
        group = drift.stratum(window, self.catalogue)
        if self._scorer is None or self.bundle is None or self._drift is None:
            reason = self._no_score(NoScore(window.end_s, "no_bundle", "no bundle is installed: guards only"))
            return [reason, *self._sampler.take(window, {}, group, [], scored=False)]
        before = self._model_state
        scores, self._model_state = self._scorer.score(window, before)
        if isinstance(scores, NoScore):
            return [self._no_score(scores)]
        manifest, thresholds = self.bundle.manifest, self.bundle.thresholds
        self._counts["windows_scored"] += 1
        self.last_scores = scores
        scored = Scored(window, scores, group)
        self._drift.add(scored)
        self._decisions, changes = decision.decide(
            self._decisions, scores, window.end_s, manifest=manifest, policy=thresholds.policy,
            rule=thresholds.decision, timeline=self._timeline,
        )  # fmt: skip
        outcomes: list[Outcome] = [scored]
        for change in changes:
            self._counts[f"alerts_{change.transition}"] += 1
            outcomes.append(_with_evidence(change, scores, self.bundle))
        return [*outcomes, *self._sampler.take(window, before, group, changes)]

    def _no_score(self, window: NoScore) -> NoScore:
        self._counts[f"windows_no_score.{window.reason}"] += 1
        return window

    def snapshot(self) -> bytes:
        """Return everything that has to be kept, as bytes for `restore`: some 100 kB, mostly windows."""
        return encode(
            PipelineState(
                widths=(len(self.catalogue.scalars), self.cells, self.probes),
                schema_name=self.catalogue.name,
                state_id="" if self.bundle is None else self.bundle.manifest.state_id,
                ingest=self._ingest.state(),
                window=self._windower.state(),
                guards=self._guards.state(),
                model=self._model_state,
                decisions=self._decisions,
                counts=dict(sorted((self._counts + self._sampler.counters).items())),
                last_arrival_s=self.last_arrival_s,
                drift=None if self._drift is None else self._drift.state(),
                sampler=self._sampler.state(),
            )
        )

    def restore(self, data: bytes, *, shift_s: float = 0.0) -> bool:
        """Go on from a snapshot; False, counted as `snapshot_refused`, when it is damaged or not this vehicle's shape.

        `shift_s` is added to every time: for a vehicle that booted since, the old timeline's offset to wall time minus
        the new one's. A shift begins a new window (the time between was not seen); trend state, decisions and standing
        alerts, counts and samples go on. A snapshot of a model with another state_id keeps everything but the model's
        own state; one of other drift bins loses the counts of its open span, as `drift_windows_refused`.
        """
        state = decode(data)
        widths = (len(self.catalogue.scalars), self.cells, self.probes)
        if state is None or state.widths != widths or state.schema_name != self.catalogue.name:
            self._counts["snapshot_refused"] += 1
            return False
        try:
            self._windower.restore(state.window, shift_s)
        except ValueError:  # of a bundle with another window: its trend and its decisions are still good
            self._counts["window_state_refused"] += 1
        self._counts = self._counts + Counter(state.counts)
        if shift_s == 0.0:
            self._ingest.restore(state.ingest)
        else:
            self._ingest.counters = Counter(state.ingest.counters)
        self._guards.restore(state.guards, shift_s)
        self._decisions = {name: decision.shifted(s, shift_s) for name, s in state.decisions.items()}
        self.last_arrival_s = None if state.last_arrival_s is None else state.last_arrival_s + shift_s
        if state.drift is not None and self._drift is not None:
            self._counts["drift_windows_refused"] += self._drift.restore(state.drift, shift_s)
        elif state.drift is not None:
            self._counts["drift_windows_refused"] += sum(span.windows for span in state.drift.strata)
        if state.sampler is not None:
            self._sampler.restore(state.sampler, shift_s)
        if self._scorer is not None and self.bundle is not None:
            same = state.state_id == self.bundle.manifest.state_id
            if same and self._scorer.fits(state.model, self.cells, self.probes):
                self._model_state = state.model
            else:
                self._counts["model_state_refused"] += 1
        return True


def _with_evidence(change: AlertChange, scores: Scores, bundle: LoadedBundle) -> AlertChange:
    return replace(change, evidence=model_evidence(scores, bundle.manifest))

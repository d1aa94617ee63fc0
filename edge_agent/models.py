"""The life of the releases on a vehicle: which one decides, which one is on trial, and what is said of it.

Promises: there is always a pipeline, with guards alone where no release can be read; a release that comes over the air
takes over the vehicle's window, decisions and standing alerts; one of another state_id is scored beside the deciding
one until its trend is warm; one that dies, gives no finite number or is too slow in its trial is left, and the release
before it finds its own trend again. What may follow what is the table in `update.slots`; fetching is the updater's
process. That a process which died of a release is known at its next start rests on the order here: first written, then
loaded.
"""

import faulthandler
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_agent.clock import Clock
from edge_agent.config import Config
from edge_agent.contract import messages
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import BundleError
from edge_agent.contract.messages import ModelState
from edge_agent.contract.signals import Catalogue
from edge_agent.logs import event
from edge_agent.pipeline.alerts import iso
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import AlertChange, NoScore, Outcome, Scored
from edge_agent.pipeline.snapshot import state_id_of, with_model
from edge_agent.update import files, floor, slots
from edge_agent.update.outcome import UpdateResult
from edge_agent.update.process import UpdaterProcess
from edge_agent.update.slots import Deciding, Last, Slots

FOLDER = "model"
HANG_S = 30.0  # a release on trial that holds the agent so long ends the process, and with it its trial
MOST_SLOW_WINDOWS = 3
STALE_S = 7 * 86_400.0  # without fresh signed metadata somebody may be keeping releases from us (TUF: freeze)
MOST_TRENDS = 4  # both slots, the factory's bundle, and one to spare: some 100 kB each
MODEL_FAULTS = ("model_failed", "not_finite", "crashed")

log = logging.getLogger("voltwatch.agent")
Build = Callable[[LoadedBundle | None], Pipeline]
Switched = Callable[[list[Outcome], LoadedBundle | None], None]


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A slot's own state: a pipeline's snapshot on its timeline, and how much that release has observed."""

    timeline: str
    saved_s: float
    wall_offset_s: float
    observed_s: float
    pipeline: bytes


@dataclass(slots=True)
class Seen:
    """What one push into a release on trial led to, and how long it took."""

    outcomes: list[Outcome]
    spent_s: float = 0.0


class Models:
    """Owns the pipelines. `build` makes one for a bundle; raises `OSError` where the disk cannot be read at the start.

    `switched` is called, before another release decides, with the last outcomes of the one before it and the new
    bundle; never in `push`, whose outcomes are still the old one's.
    """

    def __init__(
        self, config: Config, catalogue: Catalogue, build: Build, clock: Clock, *, timeline: str, switched: Switched,
        config_path: Path | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._update = config.update
        self._catalogue = catalogue
        self._build = build
        self._clock = clock
        self._timeline = timeline
        self._switched = switched
        self._folder = Path(config.data_dir) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self.counters: Counter[str] = Counter()
        self.bundle: LoadedBundle | None = None
        self.pipeline: Pipeline
        self._problem = ""
        self._disk_problem = ""
        self._refusal: Last | None = None
        self._beside: Pipeline | None = None
        self._beside_bundle: LoadedBundle | None = None
        self._observed_s = 0.0
        self._seen: list[Seen] = []
        self._slow_windows = 0
        self._trial_began_s = 0.0
        self._own_trend = False  # after a rollback: the trend of the release that was left is not believed
        self.fresh_s: float | None = None
        fresh = floor.read(self._folder)
        if fresh.keys:
            self.fresh_s = fresh.floor_s
        self._updater = None
        if config.update.repository and config_path is not None:
            self._updater = UpdaterProcess(
                config_path,
                poll_s=config.update.poll_s,
                timeout_s=config.update.timeout_s,
                now=time.monotonic,
                jitter=random.SystemRandom().random,
            )
        self._slots = slots.read(self._folder)
        self._begin()

    # At a start -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Judge how the last process ended, then load what is to decide."""
        before = self._slots
        self._change(lambda s: slots.start(s, self._clock.boot_id))
        if self._slots.last != before.last and self._slots.last is not None:
            self._own_trend = True
            self._say_left(self._slots.last)
        if self._slots.phase == "probation":
            self._change(lambda s: slots.begin_load(s, self._clock.boot_id))
            self._trial_began_s = time.monotonic()
        problems: list[str] = []
        for slot in slots.order(self._slots):
            try:
                with self._watched():
                    bundle = self._load(slot)
                    self.pipeline = self._build(bundle)
            except BundleError as error:
                problems.append(str(error))
                continue
            self.bundle = bundle
            if slot != self._slots.active:
                self._own_trend = True
                self._change(lambda s, found=slot, why=problems[0]: slots.damaged(s, found, why))  # type: ignore[misc]
                self._say_left(self._slots.last)
            return
        self._problem = f"no usable bundle, guards only: {problems[0]}"
        if not self._config.bundle and self._slots.active == "factory":
            self._problem = "no bundle configured: guards only"
        self.pipeline = self._build(None)

    def _load(self, slot: Deciding) -> LoadedBundle:
        if slot == "factory":
            if not self._config.bundle:
                raise BundleError("no bundle configured")
            return load_bundle(Path(self._config.bundle), self._catalogue, self._config.make)
        content = self._slots.installed(slot)
        if content is None:
            raise BundleError(f"slot {slot}: is empty")
        loaded = load_bundle(self._folder / slot, self._catalogue, self._config.make)
        if loaded.sha256 != content.sha256:
            raise BundleError(f"slot {slot}: holds another bundle than was installed there")
        return loaded

    def restore(self, saved: bytes, shift_s: float) -> bool:
        """Let the deciding pipeline go on from a snapshot; its trend is the slot's own where the snapshot's is not."""
        if self.bundle is not None and (self._own_trend or state_id_of(saved) != self.bundle.manifest.state_id):
            own = self._kept(self.bundle)
            if own is not None and state_id_of(own.pipeline) == self.bundle.manifest.state_id:
                saved = with_model(saved, own.pipeline)
        return self.pipeline.restore(saved, shift_s=shift_s)

    # While it runs ----------------------------------------------------------------------------------------------

    def push(self, block: ArrivalBlock) -> list[Outcome]:
        """Put a block through what decides, and through what is scored beside it."""
        trial = self._slots.phase == "probation"
        outcomes = self._tried(self.pipeline, block) if trial else self.pipeline.push(block)
        if self._beside is not None:
            try:
                self._tried(self._beside, block)
            except Exception:  # whatever it is, what the deciding release found must go on
                log.exception("the release beside the deciding one failed")
        return outcomes

    def _tried(self, pipeline: Pipeline, block: ArrivalBlock) -> list[Outcome]:
        """Push into a release on trial; what it did is judged by `step`."""
        seen = Seen([NoScore(0.0, "crashed", "the pipeline failed with this release")])
        self._seen.append(seen)
        began_s = time.monotonic()
        with self._watched():
            seen.outcomes = pipeline.push(block)
        seen.spent_s = time.monotonic() - began_s
        return seen.outcomes

    def step(self) -> bool:
        """Do what is due: bring in a release, end a trial, start the updater. True where what is said has changed."""
        before = (self._slots, self._refusal)
        seen, self._seen = self._seen, []
        for push in seen:
            if self._beside is not None:
                self._judge_beside(push.outcomes, push.spent_s)
            elif self._slots.phase == "probation":
                self._judge(push.outcomes, push.spent_s)
        if self._slots.phase == "staged":
            self._bring_in()
        elif self._slots.phase == "probation" and time.monotonic() >= self._trial_began_s + self._update.probation_s:
            self._confirm()
        if self._updater is not None and (result := self._updater.step()) is not None:
            self._updated(result)
        return (self._slots, self._refusal) != before

    def want(self, desired: messages.Desired) -> None:
        """Take what the cloud desires; it is only a pointer into what is signed."""
        if self._updater is not None:
            self._updater.want(desired)

    def save(self) -> None:
        """Keep what the release beside the deciding one has observed."""
        if self._beside is not None and self._beside_bundle is not None:
            self._keep(self._beside_bundle, self._beside, self._observed_s)

    def stop(self) -> None:
        """End in order: it says nothing about a release on trial."""
        if self._updater is not None:
            self._updater.stop()
        if self._slots.phase != "running":
            self._change(slots.end)

    # What is said -----------------------------------------------------------------------------------------------

    def state(self) -> ModelState:
        """Return which release decides, and what became of the last one that was to."""
        known, last = self._slots, self._refusal or self._slots.last
        content = known.installed(known.active)
        trial = known.installed(known.on_trial or "")
        state: Literal["running", "probation", "shadow", "rolled_back", "refused", "guards_only"] = "running"
        if self.bundle is None:
            state = "guards_only"
        elif known.phase in ("probation", "shadow"):
            state = "probation" if known.phase == "probation" else "shadow"
        elif last is not None:
            state = last.state
        manifest = None if self.bundle is None else self.bundle.manifest
        about = last if trial is None else None
        of = about or trial
        return ModelState(
            boot_id=self._clock.boot_id, time=iso(self._clock.wall()), state=state,
            counter=content.counter if content else None, release=manifest.release if manifest else None,
            name=manifest.name if manifest else "", sha256=self.bundle.sha256 if self.bundle else "",
            slot=known.active if self.bundle else "",
            target=of.target if of else "", attempted=of.counter if of else None,
            rollout_id=of.rollout_id if of else content.rollout_id if content else "",
            reason=about.reason if about else "", detail=about.detail[:500] if about else "", attempts=known.attempts,
        )  # fmt: skip

    def problems(self, *, clock_trusted: bool) -> list[str]:
        """Everything that is wrong with the releases, in plain words."""
        found = [self._problem, self._disk_problem]
        last = self._refusal or self._slots.last
        if last is not None:
            what = "was left" if last.state == "rolled_back" else "was refused"
            found.append(f"release {last.counter} {what}: {last.reason}: {last.detail}")
        if self._update.repository and clock_trusted and self.fresh_s is not None:
            age_s = self._clock.wall() - self.fresh_s
            if age_s > STALE_S:
                found.append(f"no fresh metadata of releases for {age_s / 86_400:.0f} days")
        return [problem for problem in found if problem]

    # A trial ----------------------------------------------------------------------------------------------------

    def _bring_in(self) -> None:
        """Load the candidate, for the first time in this process."""
        slot = self._slots.candidate
        if slot == "":
            return
        if not self._change(lambda s: slots.begin_load(s, self._clock.boot_id)) or self._disk_problem:
            return  # never loaded before that is written down
        try:
            with self._watched():
                bundle = self._load(slot)
                pipeline = self._build(bundle)
        except BundleError as error:
            self._fail("unfit", str(error))
            return
        state_id = bundle.manifest.state_id
        if self.bundle is None or self.bundle.manifest.state_id == state_id or not self._update.warm_up_s:
            self._take_over(bundle, pipeline, None, slots.loaded)
            return
        self._beside, self._beside_bundle, self._observed_s = pipeline, bundle, 0.0
        kept = self._kept(bundle)
        snapshot = self.pipeline.snapshot()
        if kept is not None and state_id_of(kept.pipeline) == state_id:
            snapshot = with_model(snapshot, kept.pipeline)
            self._observed_s = kept.observed_s
        pipeline.restore(snapshot)
        if not self._change(slots.beside):
            return
        event(log, "model beside", release=bundle.manifest.release, state=state_id, observed_s=self._observed_s)

    def _judge_beside(self, outcomes: list[Outcome], spent_s: float) -> None:
        bundle, pipeline = self._beside_bundle, self._beside
        if bundle is None or pipeline is None:
            return
        self.counters["shadow_alerts"] += sum(isinstance(o, AlertChange) and o.origin == "model" for o in outcomes)
        windows = sum(isinstance(o, Scored) for o in outcomes)
        fault = self._fault(outcomes, spent_s, windows)
        if fault is not None:
            self._beside = self._beside_bundle = None
            self._fail(*fault)
        elif windows:
            self.counters["shadow_windows"] += windows
            self._observed_s += windows * bundle.manifest.window.stride_s
            if self._slots.attempts:
                self._change(slots.scored)
            if self._observed_s >= self._update.warm_up_s:
                self._take_over(bundle, self._build(bundle), pipeline.snapshot(), slots.warm)

    def _judge(self, outcomes: list[Outcome], spent_s: float) -> None:
        windows = sum(isinstance(o, Scored) for o in outcomes)
        fault = self._fault(outcomes, spent_s, windows)
        if fault is not None:
            self._go_back(*fault)
            return
        for _ in range(windows):
            self._change(slots.scored)
        if self._slots.windows >= self._update.probation_windows:
            self._confirm()

    def _fault(self, outcomes: list[Outcome], spent_s: float, windows: int) -> tuple[str, str] | None:
        """Return the reason and the words for which a release on trial is left; None where it did well."""
        for outcome in outcomes:
            if isinstance(outcome, NoScore) and outcome.reason in MODEL_FAULTS:
                return outcome.reason, outcome.detail
        if windows and spent_s / windows > self._update.window_s:
            self._slow_windows += 1
            if self._slow_windows >= MOST_SLOW_WINDOWS:
                return "slow_model", f"a window took {spent_s / windows:.2f} s, at most {self._update.window_s:g} s"
        elif windows:
            self._slow_windows = 0
        return None

    def _confirm(self) -> None:
        self._change(slots.confirm)
        event(log, "model confirmed", **_names(self.bundle))

    def _fail(self, reason: str, detail: str) -> None:
        """Leave a candidate that never decided."""
        if self._change(lambda s: slots.fail(s, reason, detail)):
            self._say_left(self._slots.last)

    def _go_back(self, reason: str, detail: str) -> None:
        """Leave the release in probation: the one before it decides, with its own trend."""
        self._change(lambda s: slots.fail(s, reason, detail))
        self._say_left(self._slots.last)
        bundle, pipeline, kept = None, None, None
        for slot in slots.order(self._slots):
            try:
                bundle = self._load(slot)
                pipeline = self._build(bundle)
            except BundleError as error:
                self._problem = f"no usable bundle, guards only: {error}"
                continue
            if slot != self._slots.active:
                self._change(lambda s, found=slot: slots.damaged(s, found, self._problem))  # type: ignore[misc]
            self._problem = ""
            kept = self._kept(bundle)
            break
        else:
            bundle, pipeline = None, self._build(None)
        self._hand_over(bundle, pipeline or self._build(None), kept.pipeline if kept else None)

    def _take_over(
        self, bundle: LoadedBundle, pipeline: Pipeline, trend: bytes | None, change: Callable[[Slots], Slots]
    ) -> None:
        """Let a release on trial decide, with `trend` of its own or the one that the deciding release has."""
        if self.bundle is not None:
            self._keep(self.bundle, self.pipeline, 0.0)
        if not self._change(change):
            return
        self._slow_windows = 0
        self._trial_began_s = time.monotonic()
        self._problem = ""
        self._hand_over(bundle, pipeline, trend)

    def _hand_over(self, bundle: LoadedBundle | None, pipeline: Pipeline, trend: bytes | None) -> None:
        last = self.pipeline.take_counts()
        snapshot = self.pipeline.snapshot()
        pipeline.restore(snapshot if trend is None else with_model(snapshot, trend))
        self._beside = self._beside_bundle = None
        self._switched(last, bundle)
        self.bundle, self.pipeline = bundle, pipeline
        event(log, "model", slot=self._slots.active, phase=self._slots.phase, **_names(bundle))

    def _updated(self, result: UpdateResult) -> None:
        """Take what the updater said."""
        self.counters[f"updates_{result.ending}"] += 1
        if result.fresh_s is not None:
            self.fresh_s = max(self.fresh_s or 0.0, result.fresh_s)
        event(
            log, "update", level=logging.INFO if not result.reason else logging.WARNING, ending=result.ending,
            reason=result.reason or None, detail=result.detail or None, target=result.target or None,
            counter=result.counter,
        )  # fmt: skip
        candidate = self._slots.candidate
        self._slots = slots.read(self._folder)
        if result.ending == "installed" and candidate:
            self._beside = self._beside_bundle = None  # another release has come into its place
        if result.ending == "current" and self._slots.phase == "running" and self._slots.last is not None:
            self._change(slots.settled)
        if result.ending == "refused" and result.reason != "bad_before":
            self._refusal = Last(
                state="refused", target=result.target, counter=result.counter, reason=result.reason,
                detail=result.detail, rollout_id=result.rollout_id,
            )  # fmt: skip
        elif result.ending != "failed":
            self._refusal = None

    # The disk ---------------------------------------------------------------------------------------------------

    def _change(self, change: Callable[[Slots], Slots]) -> bool:
        """Change the pointer on the disk; where that refuses, in memory, and say so.

        False, and nothing changed, where the updater has put another candidate into the place of the one on trial.
        """
        self._disk_problem = ""
        try:
            with slots.held(self._folder):
                now = slots.read(self._folder)
                if (now.candidate, now.installed(now.candidate)) != (
                    self._slots.candidate, self._slots.installed(self._slots.candidate),
                ):  # fmt: skip
                    self._slots = now
                    self._beside = self._beside_bundle = None
                    return False
                changed = change(now)
                if changed != now:
                    slots.write(self._folder, changed)
                self._slots = changed
        except OSError as error:
            self._disk_problem = f"the releases' state cannot be stored: {error.strerror or error}"
            self.counters["slots_not_saved"] += 1
            self._slots = change(self._slots)
        return True

    def _keep(self, bundle: LoadedBundle, pipeline: Pipeline, observed_s: float) -> None:
        kept = Kept(
            timeline=self._timeline, saved_s=self._clock.monotonic(),
            wall_offset_s=self._clock.wall() - self._clock.monotonic(), observed_s=observed_s,
            pipeline=pipeline.snapshot(),
        )  # fmt: skip
        try:
            files.replace(self._state_file(bundle), msgspec.msgpack.encode(kept))
            trends = sorted(self._folder.glob("*.trend"), key=lambda path: path.stat().st_mtime_ns)
            for left in trends[:-MOST_TRENDS]:
                left.unlink()
        except OSError as error:
            self._disk_problem = f"a release's trend cannot be stored: {error.strerror or error}"
            self.counters["trend_not_saved"] += 1

    def _kept(self, bundle: LoadedBundle) -> Kept | None:
        try:
            return msgspec.msgpack.decode(self._state_file(bundle).read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            return None

    def _state_file(self, bundle: LoadedBundle) -> Path:
        """Name a slot's state by what lies in it: a slot that holds another release never finds it."""
        return self._folder / f"{bundle.sha256[:16]}.trend"

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End the process when a release on trial holds it for too long; the next start knows whose doing it was."""
        if self._slots.phase == "running":
            yield
            return
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _say_left(self, last: Last | None) -> None:
        if last is not None:
            event(log, "model left", level=logging.WARNING, counter=last.counter, reason=last.reason,
                  detail=last.detail)  # fmt: skip


def _names(bundle: LoadedBundle | None) -> dict[str, Any]:
    if bundle is None:
        return {"model": "guards only"}
    return {"release": bundle.manifest.release, "model": bundle.manifest.name, "sha256": bundle.sha256[:12]}

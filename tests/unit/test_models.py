"""The life of releases in an agent: takes over, warms up in shadow, goes back by itself, and says what really runs.

Real bundles, real pipelines, a real pointer on a disk; a process that dies is a process that dies.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.config import Config, SourceConfig, UpdateConfig
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import Decision, WindowSpec
from edge_agent.models import Models
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import AlertChange, Outcome, Scored
from edge_agent.update import floor, slots
from edge_agent.update.outcome import UpdateResult
from edge_agent.update.slots import Installed
from tests.bundles import build_bundle
from tests.vehicles import catalogue

SPEC = WindowSpec(frames=60, stride_s=20, vector_period_s=10)
TYPES = ("battery_degradation", "motor_bearing_wear")


class Clock:
    trusted_rate = True

    def __init__(self, boot_id: str = "boot-1") -> None:
        self.boot_id = boot_id
        self.now_s = 1000.0

    def wall(self) -> float:
        return 1.8e9 + self.now_s

    def monotonic(self) -> float:
        return self.now_s


class Car:
    """An agent's part that has to do with releases: arrivals in, outcomes out, state kept as the agent keeps it."""

    def __init__(self, folder: Path, *, clock: Clock | None = None, saved: bytes | None = None, **update: object):
        self.folder = folder
        self.clock = clock or Clock()
        options = {"warm_up_s": 200.0, "probation_windows": 5, **update}
        self.config = Config(
            vehicle_id="EV_7", data_dir=str(folder / "data"), bundle=str(folder / "factory"),
            source=SourceConfig(mapping="", dbc="", interface="", channel=""), update=UpdateConfig(**options),  # type: ignore[arg-type]
        )  # fmt: skip
        self.switches: list[tuple[list[Outcome], LoadedBundle | None]] = []
        self.models = Models(
            self.config, catalogue(), self.build, self.clock, timeline=self.clock.boot_id,
            switched=lambda last, bundle: self.switches.append((last, bundle)), config_path=None,
        )  # fmt: skip
        if saved is not None:
            self.models.restore(saved, 0.0)

    def build(self, bundle: LoadedBundle | None) -> Pipeline:
        return Pipeline(catalogue(), vehicle_id="EV_7", cells=2, bundle=bundle, horizon_s=0.0, timeline="t")

    def drive(self, seconds: int, voltage: float = 400.0) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for _ in range(seconds):
            self.clock.now_s += 1.0
            block = ArrivalBlock(
                np.array([self.clock.now_s]), np.array([[voltage, 20.0]], np.float32),
                np.array([[3.7, 3.6]], np.float32), np.empty((1, 0), np.float32),
            )  # fmt: skip
            outcomes += self.models.push(block)
            self.models.step()
        return outcomes

    def install(self, bundle: Path, counter: int) -> None:
        """Do what the updater does at its end."""
        loaded = load_bundle(bundle, catalogue())
        folder = self.folder / "data" / "model"
        known = slots.read(folder)
        shutil.rmtree(folder / known.free, ignore_errors=True)
        bundle.rename(folder / known.free)
        manifest = loaded.manifest
        content = Installed(target=f"bundles/x-{counter}.tar", counter=counter, release=manifest.release,
                            name=manifest.name, state_id=manifest.state_id, sha256=loaded.sha256)  # fmt: skip
        slots.write(folder, slots.install(known, known.free, content))
        self.models._updated(UpdateResult(ending="installed", counter=counter))

    def seconds_observed(self) -> float:
        return float(self.models.pipeline._model_state["seconds"].reshape(-1)[0])

    @property
    def known(self) -> slots.Slots:
        return slots.read(self.folder / "data" / "model")

    def again(self, *, orderly: bool = True, boot: str = "") -> "Car":
        """Let the process end and begin again, on another boot of the machine where one is named."""
        saved = self.models.pipeline.snapshot()
        if orderly:
            self.models.save()
            self.models.stop()
        clock = Clock(boot or self.clock.boot_id)
        clock.now_s = self.clock.now_s
        update = {"warm_up_s": self.config.update.warm_up_s}
        return Car(self.folder, clock=clock, saved=saved, **update)


def bundle(folder: Path, release: int, **options: object) -> Path:
    return build_bundle(
        folder / f"made-{release}", catalogue(), spec=SPEC, release=release, failure_types=TYPES,
        decision=Decision(k=1, n=1, clear_windows=1), **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def car(tmp_path: Path) -> Car:
    bundle(tmp_path, 1).rename(tmp_path / "factory")
    made = Car(tmp_path)
    made.drive(100)
    return made


def said(car: Car) -> tuple[str, int | None, str]:
    state = car.models.state()
    return state.state, state.counter, state.reason


def test_a_vehicle_says_at_its_start_what_decides(car: Car) -> None:
    state = car.models.state()
    assert (state.state, state.slot, state.counter, state.release) == ("running", "factory", None, 1)
    assert state.sha256 == load_bundle(car.folder / "factory", catalogue()).sha256


def test_a_release_of_the_same_trend_takes_over_window_trend_and_standing_alerts(car: Car) -> None:
    raised = [o for o in car.drive(60, voltage=900.0) if isinstance(o, AlertChange)]
    assert [o.transition for o in raised] == ["raised"]
    observed = car.seconds_observed()
    assert observed > 0
    car.install(bundle(car.folder, 2), 2)
    windows = [o for o in car.drive(21, voltage=900.0) if isinstance(o, Scored)]
    assert said(car)[:2] == ("probation", 2)
    assert windows  # the next window ends in its time: the ring of arrivals was taken over
    assert car.seconds_observed() > observed
    cleared = [o for o in car.drive(120) if isinstance(o, AlertChange)]
    assert [o.transition for o in cleared] == ["cleared"]
    assert cleared[0].key == raised[0].key
    assert said(car) == ("running", 2, "")
    assert car.known.highest == 2


def test_counts_of_the_release_before_are_said_in_its_name(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(2)
    last, new = car.switches[0]
    assert {type(o).__name__ for o in last} == {"Counted"}
    assert new is not None
    assert new.manifest.release == 2


def test_a_number_that_is_not_finite_in_probation_goes_back_with_the_own_trend(car: Car) -> None:
    before = car.seconds_observed()
    car.install(bundle(car.folder, 2, trick="late_nan"), 2)
    car.drive(21)
    assert said(car)[0] == "probation"
    car.drive(80, voltage=999.0)
    assert said(car) == ("rolled_back", None, "not_finite")
    assert car.models.bundle is not None
    assert car.models.bundle.manifest.release == 1
    assert car.known.bad == {2: "not_finite"}
    assert car.seconds_observed() >= before
    assert any("release 2 was left" in p for p in car.models.problems(clock_trusted=True))
    assert [o for o in car.drive(40) if isinstance(o, Scored)]  # and goes on scoring


def test_a_release_that_is_too_slow_goes_back(car: Car) -> None:
    car.config = car.config
    slow = Car(car.folder, clock=car.clock, window_s=1e-9)
    slow.drive(61)
    slow.install(bundle(car.folder, 2), 2)
    slow.drive(100)
    assert said(slow)[::2] == ("rolled_back", "slow_model")


def test_another_trend_warms_up_in_shadow_while_the_old_release_decides(car: Car) -> None:
    car.install(bundle(car.folder, 2, state_id="tiny-2"), 2)
    before = car.seconds_observed()
    outcomes = car.drive(150, voltage=900.0)
    assert said(car)[:2] == ("shadow", None)
    assert car.models.state().attempted == 2
    assert [o.transition for o in outcomes if isinstance(o, AlertChange)] == ["raised"]  # the old one's alone
    assert car.models.counters["shadow_alerts"] == 1  # counted, not sent
    assert car.seconds_observed() > before
    car.drive(60, voltage=900.0)
    assert said(car)[:2] == ("probation", 2)
    assert 200 <= car.seconds_observed() <= 260  # its own trend: of what it observed itself, not of the old one's
    outcomes = car.drive(110, voltage=900.0)
    assert said(car)[:2] == ("running", 2)
    assert not [o for o in outcomes if isinstance(o, AlertChange)]  # the alert that stood stands


def test_what_a_release_in_shadow_has_observed_survives_a_boot(car: Car) -> None:
    car.install(bundle(car.folder, 2, state_id="tiny-2"), 2)
    car.drive(120)
    observed = car.models._observed_s
    assert observed >= 100
    later = car.again(boot="boot-2")
    later.drive(2)
    assert said(later)[:2] == ("shadow", None)
    assert later.models._observed_s >= observed


def test_a_rollback_from_another_trend_finds_its_own_again(car: Car) -> None:
    before = car.seconds_observed()
    car.install(bundle(car.folder, 2, state_id="tiny-2", trick="late_nan"), 2)
    car.drive(210)
    assert said(car)[0] == "probation"
    car.drive(85, voltage=999.0)
    assert said(car)[0] == "rolled_back"
    assert car.seconds_observed() >= before + 200


def test_a_release_in_shadow_that_is_not_finite_never_decides(car: Car) -> None:
    car.install(bundle(car.folder, 2, state_id="tiny-2", trick="late_nan"), 2)
    car.drive(80, voltage=999.0)
    assert said(car) == ("rolled_back", None, "not_finite")
    assert not car.switches


def test_an_orderly_end_in_probation_goes_on_with_it(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(21)
    later = car.again()
    assert said(later)[:2] == ("probation", 2)
    later.drive(100)
    assert said(later)[:2] == ("running", 2)


def test_a_process_that_died_in_probation_goes_back_at_its_next_start(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(21)
    later = car.again(orderly=False)
    assert said(later) == ("rolled_back", None, "crashed")
    assert car.known.bad == {2: "crashed"}


def test_a_power_cut_in_probation_goes_on_with_it(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(21)
    assert said(car.again(orderly=False, boot="boot-2"))[:2] == ("probation", 2)


def test_a_damaged_slot_gives_way_to_the_factorys_and_is_said(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(120)
    assert said(car)[:2] == ("running", 2)
    model = car.folder / "data" / "model" / "a" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    later = car.again()
    assert said(later) == ("rolled_back", None, "damaged")
    assert later.models.state().slot == "factory"


def test_both_slots_and_the_factorys_bundle_bad_leaves_the_guards(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(120)
    car.install(bundle(car.folder, 3), 3)
    car.drive(120)
    assert said(car)[:2] == ("running", 3)
    for place in (car.folder / "data" / "model" / "a", car.folder / "data" / "model" / "b", car.folder / "factory"):
        (place / "model.onnx").write_bytes(b"")
    later = car.again()
    assert said(later)[0] == "guards_only"
    assert any("guards only" in problem for problem in later.models.problems(clock_trusted=True))
    hot = later.build(None)
    assert hot is not None
    later.install(bundle(car.folder, 4), 4)
    later.drive(200)
    assert said(later)[:2] == ("running", 4)  # and a good release ends it


def test_a_slot_that_holds_another_bundle_than_was_installed_is_not_run(car: Car) -> None:
    car.install(bundle(car.folder, 2), 2)
    car.drive(120)
    slot = car.folder / "data" / "model" / "a"
    for file in slot.iterdir():
        file.unlink()
    slot.rmdir()
    bundle(car.folder, 9).rename(slot)
    assert said(car.again())[2] == "damaged"


def test_a_refusal_is_said_and_forgotten_when_what_decides_is_what_is_wanted(car: Car) -> None:
    car.models._updated(UpdateResult(ending="refused", reason="expired", detail="…", target="t", counter=5))
    assert said(car) == ("refused", None, "expired")
    assert car.models.state().attempted == 5
    car.models._updated(UpdateResult(ending="current", target="t", counter=1))
    assert said(car) == ("running", None, "")


def test_a_week_without_fresh_metadata_is_a_problem(car: Car) -> None:
    folder = car.folder / "data" / "model"
    floor.write(folder, floor.Floor(floor_s=1.8e9 - 20 * 86_400, keys=("k",)))
    later = Car(car.folder, clock=car.clock, repository="http://127.0.0.1:9/", root="r")
    assert any("no fresh metadata" in problem for problem in later.models.problems(clock_trusted=True))
    assert not any("no fresh metadata" in problem for problem in later.models.problems(clock_trusted=False))


CRASHING = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_models import Car, Clock, bundle
folder = Path(sys.argv[1])
car = Car(folder)
car.drive(100)
build = car.build
def dies(loaded):
    if loaded is not None and loaded.manifest.release == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return build(loaded)
car.models._build = dies
car.install(bundle(folder, 2), 2)
car.drive(10)
print("lived")
"""


def test_a_first_load_that_kills_the_agent_is_gone_back_from_at_the_next_start(tmp_path: Path) -> None:
    """It is written down before it is loaded; a supervisor that starts the agent again gets the old release."""
    bundle(tmp_path, 1).rename(tmp_path / "factory")
    command = [sys.executable, "-c", CRASHING, str(tmp_path)]
    died = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
                          env={**os.environ, "PYTHONFAULTHANDLER": ""})  # fmt: skip
    assert died.returncode == -signal.SIGSEGV, died.stderr
    assert "lived" not in died.stdout
    after = Car(tmp_path)
    assert said(after) == ("rolled_back", None, "crashed")
    assert after.known.bad == {2: "crashed"}
    after.drive(61)
    assert after.models.pipeline.counters["windows_scored"] >= 1


def test_a_rollback_of_long_ago_does_not_cost_the_trend_of_since(car: Car) -> None:
    car.install(bundle(car.folder, 2, trick="late_nan"), 2)
    car.drive(21)
    car.drive(80, voltage=999.0)
    assert said(car)[0] == "rolled_back"
    car.drive(200)
    observed = car.seconds_observed()
    later = car.again()
    assert said(later)[0] == "rolled_back"  # still said
    assert later.seconds_observed() == observed

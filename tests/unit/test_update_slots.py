"""The table of slots: whatever happens in whatever order, something that proved itself can decide."""

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.update import slots
from edge_agent.update.slots import Installed, Last, Slots

BOOT = "boot-1"


def release(counter: int) -> Installed:
    return Installed(target=f"bundles/x-{counter}.tar", counter=counter, release=counter, name="x", state_id="s",
                     sha256=f"{counter:064x}")  # fmt: skip


def staged(counter: int = 1, known: Slots | None = None) -> Slots:
    known = known or Slots()
    return slots.install(known, known.free, release(counter))


def in_probation(counter: int = 1, known: Slots | None = None) -> Slots:
    return slots.loaded(slots.begin_load(staged(counter, known), BOOT))


def running(counter: int = 1, known: Slots | None = None) -> Slots:
    return slots.confirm(in_probation(counter, known))


def test_a_release_that_does_well_decides_and_the_next_goes_into_the_other_slot() -> None:
    one = running(1)
    assert (one.active, one.phase, one.free) == ("a", "running", "b")
    two = running(2, one)
    assert (two.active, two.free, two.highest) == ("b", "a", 2)


def test_a_process_that_died_in_the_first_load_goes_back_at_its_next_start() -> None:
    known = slots.begin_load(staged(2, running(1)), BOOT)
    back = slots.start(known, BOOT)
    assert (back.phase, back.active, back.candidate) == ("running", "a", "")
    assert back.bad == {2: "crashed"}
    assert back.last is not None
    assert (back.last.state, back.last.reason) == ("rolled_back", "crashed")


def test_a_process_that_died_in_probation_goes_back() -> None:
    back = slots.start(in_probation(2, running(1)), BOOT)
    assert (back.phase, back.active, back.bad) == ("running", "a", {2: "crashed"})


def test_an_orderly_end_says_nothing_about_a_release() -> None:
    known = slots.start(slots.end(in_probation(2, running(1))), BOOT)
    assert (known.phase, known.active, known.bad) == ("probation", "b", {})


def test_a_power_cut_says_nothing_but_three_loads_without_a_window_do() -> None:
    known = in_probation(2, running(1))
    for number in range(2):
        known = slots.begin_load(slots.start(known, f"boot-{number + 2}"), f"boot-{number + 2}")
        assert known.phase == "probation"
    back = slots.start(known, "boot-9")
    assert (back.phase, back.active, back.bad) == ("running", "a", {2: "attempts"})


def test_a_window_scored_makes_the_loads_before_it_harmless_and_counts_towards_the_end() -> None:
    known = in_probation(2, running(1))
    for number in range(5):
        boot = f"boot-{number + 2}"
        known = slots.scored(slots.begin_load(slots.start(known, boot), boot))
    assert (known.phase, known.windows, known.attempts) == ("probation", 5, 0)


def test_a_death_beside_the_deciding_release_counts_only_again_and_again() -> None:
    known = slots.beside(slots.begin_load(staged(2, running(1)), BOOT))
    for _ in range(2):
        known = slots.start(known, BOOT)
        assert (known.phase, known.candidate) == ("staged", "b")
        known = slots.beside(slots.begin_load(known, BOOT))
    back = slots.start(known, BOOT)
    assert (back.phase, back.active, back.bad) == ("running", "a", {2: "attempts"})


def test_a_newer_release_may_take_the_place_of_one_in_shadow_but_not_of_one_in_probation() -> None:
    shadow = slots.beside(slots.begin_load(staged(2, running(1)), BOOT))
    assert slots.may_install(shadow)
    assert slots.install(shadow, shadow.free, release(3)).candidate == "b"
    probation = in_probation(2, running(1))
    assert not slots.may_install(probation)
    with pytest.raises(ValueError, match="cannot happen"):
        slots.install(probation, "a", release(3))


def test_a_damaged_slot_gives_way_and_may_be_installed_again() -> None:
    known = running(2, running(1))
    assert slots.order(known) == ("b", "a", "factory")
    found = slots.damaged(known, "a", "model.onnx: hash does not match")
    assert (found.active, found.b, found.bad) == ("a", None, {})
    assert found.last is not None
    assert found.last.reason == "damaged"


def test_what_failed_before_never_decides_again() -> None:
    known = slots.fail(in_probation(2, running(1)), "not_finite", "…")
    assert slots.order(known) == ("a", "factory")


def test_refusals_are_remembered_up_to_a_limit_the_newest_first() -> None:
    known = Slots()
    for counter in range(1, 100):
        last = Last(state="refused", target="t", counter=counter, reason="golden", detail="")
        known = slots.refuse(known, last, bad=True)
    assert len(known.bad) == slots.MOST_BAD
    assert max(known.bad) == 99


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 100, b'{"version": 2}'])
def test_a_damaged_pointer_is_read_from_its_copy(tmp_path: Path, damage: bytes) -> None:
    known = running(1)
    slots.write(tmp_path, known)
    (tmp_path / slots.POINTER).write_bytes(damage)
    assert slots.read(tmp_path) == known
    (tmp_path / slots.COPY).write_bytes(damage)
    assert slots.read(tmp_path) == Slots()  # and with neither: the factory's bundle


def test_the_diagram_in_the_documentation_is_drawn_from_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "releases-over-the-air.md").read_text(encoding="utf-8")
    assert slots.diagram() in text


class Vehicle(RuleBasedStateMachine):
    """Installations, deaths, power cuts, faults and orderly ends in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Slots()
        self.counter = 0
        self.boot = 0
        self.proven: set[int] = set()

    @precondition(lambda self: slots.may_install(self.known))
    @rule()
    def install(self) -> None:
        self.counter += 1
        free = self.known.free
        assert free != self.known.active
        self.known = slots.install(self.known, free, release(self.counter))

    @precondition(lambda self: self.known.phase == "staged")
    @rule()
    def load(self) -> None:
        self.known = slots.begin_load(self.known, str(self.boot))

    @precondition(lambda self: self.known.phase == "loading")
    @rule()
    def decide(self) -> None:
        self.known = slots.loaded(self.known)

    @precondition(lambda self: self.known.phase == "loading")
    @rule()
    def beside(self) -> None:
        self.known = slots.beside(self.known)

    @precondition(lambda self: self.known.phase == "shadow")
    @rule()
    def warm(self) -> None:
        self.known = slots.warm(self.known)

    @precondition(lambda self: self.known.phase in ("shadow", "probation"))
    @rule()
    def score(self) -> None:
        self.known = slots.scored(self.known)

    @precondition(lambda self: self.known.phase == "probation")
    @rule()
    def confirm(self) -> None:
        content = self.known.installed(self.known.active)
        assert content is not None
        self.proven.add(content.counter)
        self.known = slots.confirm(self.known)

    @precondition(lambda self: self.known.phase in ("loading", "shadow", "probation", "staged"))
    @rule()
    def fail(self) -> None:
        self.known = slots.fail(self.known, "not_finite", "")

    @rule()
    def die(self) -> None:
        self.known = slots.start(self.known, str(self.boot))
        self._again()

    @rule()
    def power_cut(self) -> None:
        self.boot += 1
        self.die()

    @rule()
    def end(self) -> None:
        self.known = slots.end(self.known)
        self.die()

    def _again(self) -> None:
        if self.known.phase == "probation":
            self.known = slots.begin_load(self.known, str(self.boot))

    @invariant()
    def something_proven_can_decide(self) -> None:
        content = self.known.installed(self.known.active)
        if self.known.phase == "probation":
            content = self.known.installed(self.known.previous)
        assert content is None or content.counter in self.proven
        assert self.known.phase in slots.PHASES

    @invariant()
    def what_is_bad_never_decides(self) -> None:
        content = self.known.installed(self.known.active)
        assert content is None or content.counter not in self.known.bad

    @invariant()
    def the_highest_counter_is_never_forgotten(self) -> None:
        assert self.known.highest == self.counter


Vehicle.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSlots = Vehicle.TestCase

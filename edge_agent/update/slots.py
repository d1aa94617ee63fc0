"""Which release decides on this vehicle, and how another one takes its place: a table, and the file it is kept in.

Two slots hold releases that came over the air, `a` and `b`; `factory` is the bundle the vehicle came with. The deciding
one (`active`) is never written to. A candidate is loaded only after that was written down, so that a process which
dies of it is known at its next start (RAUC counts boot attempts so). Everything but `read` and `write` is pure.

A death says something only where the machine went on: with the same boot id and no orderly end it is the process that
died. A vehicle that lost its power says nothing, but for three loads of a release in a row without one window scored.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edge_agent.update import files

Slot = Literal["a", "b"]
Deciding = Literal["a", "b", "factory"]
Phase = Literal["running", "staged", "loading", "shadow", "probation"]
EventName = Literal[
    "installed", "loading", "loaded", "beside", "warm", "confirmed", "failed", "died", "power_cut"
]  # fmt: skip

PHASES: tuple[Phase, ...] = ("running", "staged", "loading", "shadow", "probation")
MOST_ATTEMPTS = 3  # loads without a scored window: three cold starts in a garage are no accident any more
MOST_BAD = 64  # counters remembered as bad; releases come weekly at most
POINTER, COPY = "slots.json", "slots.copy.json"

# What a phase does not name cannot happen in it.
TABLE: Mapping[tuple[Phase, EventName], Phase] = {
    ("running", "installed"): "staged",
    ("staged", "installed"): "staged",  # a newer one, before the first was ever loaded
    ("staged", "loading"): "loading",
    ("staged", "died"): "staged",  # before it was loaded: not this release's doing
    ("staged", "power_cut"): "staged",
    ("staged", "failed"): "running",  # its files cannot be read
    ("loading", "loaded"): "probation",  # the same state_id: it takes over at once, with the trend
    ("loading", "beside"): "shadow",  # another state_id: it is scored beside the deciding one
    ("loading", "failed"): "running",
    ("loading", "died"): "running",  # the first load killed the process
    ("loading", "power_cut"): "staged",
    ("shadow", "installed"): "staged",
    ("shadow", "warm"): "probation",
    ("shadow", "failed"): "running",
    ("shadow", "died"): "staged",  # in a week an agent may die of something else: only again and again counts
    ("shadow", "power_cut"): "staged",
    ("probation", "confirmed"): "running",
    ("probation", "failed"): "running",
    ("probation", "died"): "running",
    ("probation", "power_cut"): "probation",
}


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a slot. `sha256` is its manifest's: a slot that holds anything else is damaged."""

    target: str
    counter: Annotated[int, Meta(ge=1)]
    release: int
    name: str
    state_id: str
    sha256: str
    rollout_id: str = ""


class Last(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the last release that was to be installed."""

    state: Literal["rolled_back", "refused"]
    target: str
    counter: int | None
    reason: str
    detail: str
    rollout_id: str = ""


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it. `previous` is where a release in probation goes back to; `boot_id` is of the last load.

    `attempts` are loads of the candidate (in probation: of the active one) since a window was last scored with it;
    `windows` are those scored in probation. `bad` maps counters to the reason they are not tried again for.
    """

    version: Literal[1] = 1
    phase: Phase = "running"
    active: Deciding = "factory"
    previous: Deciding = "factory"
    candidate: Literal["a", "b", ""] = ""
    a: Installed | None = None
    b: Installed | None = None
    attempts: int = 0
    windows: int = 0
    boot_id: str = ""
    ended: bool = True
    highest: int = 0
    bad: dict[int, str] = {}
    last: Last | None = None

    def installed(self, slot: str) -> Installed | None:
        """Return what lies in a slot; None for the factory's bundle and for an empty one."""
        return {"a": self.a, "b": self.b}.get(slot)

    @property
    def free(self) -> Slot:
        """The slot that an installation may write to: never the deciding one, nor the one to go back to."""
        taken = {self.active, self.previous if self.phase == "probation" else self.active}
        return "a" if "a" not in taken else "b"

    @property
    def on_trial(self) -> Slot | None:
        """The slot whose release has not proven itself."""
        slot = self.active if self.phase == "probation" else self.candidate
        return None if slot in ("", "factory") else slot  # type: ignore[return-value]  # mypy does not narrow by `in`


def may_install(slots: Slots) -> bool:
    """Whether a release may be installed now; in probation both slots are needed, and a load must end first."""
    return (slots.phase, "installed") in TABLE


def install(slots: Slots, slot: Slot, content: Installed) -> Slots:
    """Record that `slot`, the free one, holds a verified release which is to be brought in."""
    slots = _put(slots, slot, content)
    return replace(
        slots, phase=_after(slots, "installed"), candidate=slot, attempts=0, windows=0, last=None,
        highest=max(slots.highest, content.counter),
    )  # fmt: skip


def begin_load(slots: Slots, boot_id: str) -> Slots:
    """Record, before it is done, that the candidate (or at a start in probation: the active one) is loaded now."""
    phase = slots.phase if slots.phase == "probation" else _after(slots, "loading")
    return replace(slots, phase=phase, attempts=slots.attempts + 1, boot_id=boot_id, ended=False)


def loaded(slots: Slots) -> Slots:
    """Let the candidate, whose trend is the deciding one's, decide: its probation begins."""
    return _switch(slots, _after(slots, "loaded"))


def beside(slots: Slots) -> Slots:
    """Let the candidate, of another state_id, be scored beside the deciding one."""
    return replace(slots, phase=_after(slots, "beside"))


def warm(slots: Slots) -> Slots:
    """Let a candidate that has observed enough decide: its probation begins."""
    return _switch(slots, _after(slots, "warm"))


def scored(slots: Slots) -> Slots:
    """Record a window scored by the release on trial: it does not kill at once, and in probation it counts."""
    return replace(slots, attempts=0, windows=slots.windows + (slots.phase == "probation"))


def confirm(slots: Slots) -> Slots:
    """End the probation well."""
    return replace(slots, phase=_after(slots, "confirmed"), candidate="", attempts=0, windows=0, last=None)


def fail(slots: Slots, reason: str, detail: str, event: EventName = "failed") -> Slots:
    """End the trial badly: the release before it decides, and this counter is not tried again."""
    slot = slots.on_trial
    if slot is None:
        raise ValueError(f"nothing is on trial in phase {slots.phase}")
    content = slots.installed(slot)
    if _after(slots, event) != "running":
        raise ValueError(f"{event} in phase {slots.phase} does not end the trial")
    last = Last(
        state="rolled_back", target=content.target if content else "", counter=content.counter if content else None,
        reason=reason, detail=detail[:500], rollout_id=content.rollout_id if content else "",
    )  # fmt: skip
    active = slots.previous if slots.phase == "probation" else slots.active
    return replace(
        _blame(slots, content, reason), phase="running", active=active, candidate="", attempts=0, windows=0, last=last
    )


def start(slots: Slots, boot_id: str) -> Slots:
    """Judge, at a start of the agent, how the last process ended."""
    if slots.phase == "running":
        return slots
    died = not slots.ended and slots.boot_id == boot_id
    event: EventName = "died" if died else "power_cut"
    if _after(slots, event) == "running":
        return fail(slots, "crashed", "the process died with it in its trial", event)
    if slots.attempts >= MOST_ATTEMPTS:
        again = replace(slots, phase="probation" if slots.phase == "probation" else "loading")
        return fail(again, "attempts", f"{slots.attempts} loads in a row without one window scored")
    return replace(slots, phase=_after(slots, event))


def end(slots: Slots) -> Slots:
    """Record that the agent ends in order: its end says nothing about a release."""
    return replace(slots, ended=True)


def settled(slots: Slots) -> Slots:
    """Record that what is asked for is what decides: what was refused before is no news any more."""
    return replace(slots, last=None)


def refuse(slots: Slots, last: Last, *, bad: bool) -> Slots:
    """Record a release that did not come as far as a slot; `bad`: it is not to be fetched again."""
    if bad and last.counter is not None:
        slots = replace(slots, bad=_remember(slots.bad, last.counter, last.reason))
    return replace(slots, last=last)


def damaged(slots: Slots, found: Deciding, detail: str) -> Slots:
    """Record that the deciding slot cannot be read any more and `found` decides; it may be installed again."""
    content = slots.installed(slots.active)
    last = Last(
        state="rolled_back", target=content.target if content else "", counter=content.counter if content else None,
        reason="damaged", detail=detail[:500], rollout_id=content.rollout_id if content else "",
    )  # fmt: skip
    if slots.active != "factory":
        slots = _put(slots, slots.active, None)
    phase: Phase = "running" if slots.phase == "probation" else slots.phase
    return replace(slots, phase=phase, active=found, previous=found, last=last)


def order(slots: Slots) -> tuple[Deciding, ...]:
    """Return what may decide, best first: the active one, the one before it, the other slot, the factory's."""
    candidates: list[Deciding] = [slots.active]
    for slot in (slots.previous, "a", "b"):
        content = slots.installed(slot)
        fit = content is not None and content.counter not in slots.bad
        if fit and slot not in (*candidates, slots.candidate):
            candidates.append(slot)
    return tuple(dict.fromkeys((*candidates, "factory")))


def diagram() -> str:
    """Draw the table for the documentation (Mermaid)."""
    lines = ["stateDiagram-v2", "    [*] --> running"]
    lines += [f"    {phase} --> {after}: {event}" for (phase, event), after in TABLE.items()]
    return "\n".join(lines) + "\n"


def read(folder: Path) -> Slots:
    """Read the pointer; where it is damaged its copy, at most one change behind; where there is none, a fresh one.

    Raises `OSError` when the disk cannot be read.
    """
    for name in (POINTER, COPY):
        try:
            return msgspec.json.decode((folder / name).read_bytes(), type=Slots)
        except (FileNotFoundError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            continue
    return Slots()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the pointer between reading and writing it: agent and updater take turns. Raises `OSError`."""
    with (folder / ".slots.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(folder: Path, slots: Slots) -> None:
    """Replace the pointer by one rename; a crash leaves the old one or the new one. Raises `OSError`."""
    data = msgspec.json.encode(slots)
    files.replace(folder / POINTER, data)
    files.replace(folder / COPY, data)


def _after(slots: Slots, event: EventName) -> Phase:
    after = TABLE.get((slots.phase, event))
    if after is None:
        raise ValueError(f"{event} cannot happen in phase {slots.phase}")
    return after


def _switch(slots: Slots, phase: Phase) -> Slots:
    if slots.candidate == "":
        raise ValueError("there is no candidate")
    return replace(slots, phase=phase, previous=slots.active, active=slots.candidate, candidate="", windows=0)


def _put(slots: Slots, slot: str, content: Installed | None) -> Slots:
    return replace(slots, a=content) if slot == "a" else replace(slots, b=content)


def _blame(slots: Slots, content: Installed | None, reason: str) -> Slots:
    return slots if content is None else replace(slots, bad=_remember(slots.bad, content.counter, reason))


def _remember(bad: dict[int, str], counter: int, reason: str) -> dict[int, str]:
    newest = sorted({**bad, counter: reason}.items())[-MOST_BAD:]
    return dict(newest)

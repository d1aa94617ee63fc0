"""How one run of the updater ended: the JSON line between its process and the agent, and the errors that lead to it.

A refusal has a code for machines and one line for people. `refused` is the artefact's or the repository's fault and
comes again with the next try; `failed` is the network's or this machine's, and another try may do better.
"""

from typing import ClassVar, Literal

import msgspec

from edge_agent.contract.errors import VoltwatchError

Ending = Literal["installed", "current", "nothing", "refused", "failed"]
Reason = Literal[
    "",
    # of the signed metadata
    "expired", "rollback", "unsigned", "tampered", "foreign", "not_found", "mismatch",
    # of the artefact
    "oversize", "malformed", "unfit", "crashed", "timeout", "memory", "not_finite", "golden", "slow_model",
    "bad_before",
    # of the network and of this machine
    "network", "slow", "disk", "busy", "no_trial", "damaged", "model_failed", "attempts",
]  # fmt: skip
# of these the release itself is to blame, on this vehicle: it is not fetched again
BAD = frozenset(("malformed", "unfit", "crashed", "timeout", "memory", "not_finite", "golden", "slow_model"))
FAILED = frozenset(("network", "slow", "disk", "busy", "no_trial"))
EXIT_CODES = {"installed": 0, "current": 0, "nothing": 0, "refused": 65, "failed": 75}  # EX_DATAERR, EX_TEMPFAIL


class UpdateResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the updater prints, as one line of JSON, when it ends.

    `fresh_s` is when the metadata that was verified had been signed (Unix seconds), the only time by which an agent may
    raise its floor.
    """

    ending: Ending
    reason: Reason = ""
    detail: str = ""
    target: str = ""
    counter: int | None = None
    rollout_id: str = ""
    slot: str = ""
    release: int | None = None
    name: str = ""
    sha256: str = ""
    fresh_s: float | None = None


class UpdateError(VoltwatchError):
    """The update cannot be had: `reason` for machines, `str()` for people."""

    exit_code: ClassVar[int] = 65

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason

    @property
    def ending(self) -> Ending:
        """Whether another try may do better."""
        return "failed" if self.reason in FAILED else "refused"

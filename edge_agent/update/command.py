"""The updater's process: `edge-agent update`, which lives for one release and then ends.

Standard output gets one line of JSON (`outcome.UpdateResult`), standard error one line for people; the exit code is 0
where there was nothing to refuse, 65 for a refusal, 75 where another try may do better.
"""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from edge_agent.config import Config, read_text
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.messages import Desired
from edge_agent.contract.signals import default_catalogue, parse_schema
from edge_agent.pipeline.alerts import iso
from edge_agent.update.installation import Installation
from edge_agent.update.outcome import EXIT_CODES, UpdateError, UpdateResult


def update(config: Config, *, target: str = "", counter: int = 0, rollout_id: str = "") -> int:
    """Run the updater once; without a `target` the cloud is asked. Returns the exit code. Raises `ConfigError`."""
    if not config.update.repository:
        raise ConfigError("update.repository is not set: there is nowhere to update from")
    catalogue = parse_schema(read_text(Path(config.schema), "schema"), config.schema) if config.schema else None
    desired = Desired(target=target, counter=counter, rollout_id=rollout_id, time=iso(time.time())) if target else None
    run = Installation(config, catalogue or default_catalogue(), wall_s=time.time())
    seconds = config.update.timeout_s

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise UpdateError("slow", f"not done after {seconds:g} s; the next try goes on from there")

    # a server that drips even its headers is in no loop of ours: only a signal ends that
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    run.committing = lambda: signal.setitimer(signal.ITIMER_REAL, 0) and None
    try:
        result = run.run(desired)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return report(result)


def report(result: UpdateResult) -> int:
    """Print how it ended, for the agent and for people; returns the exit code."""
    print(msgspec.json.encode(result).decode(), flush=True)
    if result.reason:
        print(f"edge-agent: update {result.ending}: {result.reason}: {result.detail}", file=sys.stderr)
    return EXIT_CODES[result.ending]

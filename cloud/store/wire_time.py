"""Read the times that vehicles write. Pure; what a time is worth is said by its envelope (`clocktrusted`)."""

from datetime import UTC, datetime

from edge_agent.contract.errors import MessageError


def unix_s(text: str) -> float:
    """Return an ISO 8601 time as Unix seconds; one without a zone is UTC. Raises `MessageError` for no such time."""
    try:
        read = datetime.fromisoformat(text)
        return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise MessageError(f"time {text[:40]!a} is not ISO 8601, as 2026-03-01T00:00:00.000Z") from error

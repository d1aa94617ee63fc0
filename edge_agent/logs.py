"""One structured line an event on standard output: `2026-05-04T10:11:12.345Z info alert vehicle=EV_001 severity=high`.

A value with spaces is quoted as in JSON, so a line splits back into its fields. `--log json` gives one object a line.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

ROOT = "voltwatch"


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log the event `name` with its fields, in the order given; None is left out."""
    logger.log(level, name, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


class KeyValueFormatter(logging.Formatter):
    """Fields as `key=value`, for people and for grep."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        words = [_time(record), record.levelname.lower(), record.getMessage()]
        words += [f"{key}={_word(value)}" for key, value in getattr(record, "fields", {}).items()]
        return " ".join(words) + self._trace(record)

    def _trace(self, record: logging.LogRecord) -> str:
        return "\n" + self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(kind: Literal["text", "json"] = "text", stream: TextIO | None = None) -> logging.Logger:
    """Send the agent's events to `stream` (standard output); returns their root logger."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter() if kind == "json" else KeyValueFormatter())
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def _time(record: logging.LogRecord) -> str:
    stamp = datetime.fromtimestamp(record.created, UTC)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.") + f"{stamp.microsecond // 1000:03d}Z"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else json.dumps(text)

"""Structured logs: one line per event, with the sandbox and saga under way.

Programs call ``configure`` once; everything else uses ``logging.getLogger(__name__)``. No secret, token, environment
or guest output is ever logged.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

_sandbox_id: ContextVar[str] = ContextVar("sandbox_id", default="")
_saga_id: ContextVar[str] = ContextVar("saga_id", default="")


@contextmanager
def log_context(*, sandbox_id: str = "", saga_id: str = "") -> Generator[None]:
    """Lines written inside carry these ids; tasks started inside inherit them."""
    sandbox_token = _sandbox_id.set(sandbox_id or _sandbox_id.get())
    saga_token = _saga_id.set(saga_id or _saga_id.get())
    try:
        yield
    finally:
        _sandbox_id.reset(sandbox_token)
        _saga_id.reset(saga_token)


def _context() -> dict[str, str]:
    pairs = {"sandbox_id": _sandbox_id.get(), "saga_id": _saga_id.get()}
    return {name: value for name, value in pairs.items() if value}


class _LineFormatter(logging.Formatter):
    """For people: time, level, logger, message, ids."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        ids = "".join(f" {name}={value}" for name, value in _context().items())
        line = f"{at} {record.levelname.lower():7} {record.name}: {record.getMessage()}{ids}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """For machines: one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, str] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: str, form: Literal["line", "json"] = "line") -> None:
    """Send logs of ``level`` and above to stderr. Raises ValueError for an unknown level."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(_JsonFormatter() if form == "json" else _LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [output]
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    # Both write whole URLs, and a terminal's holds its command.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)

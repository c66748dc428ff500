"""What the saga engine needs to know of our errors: which are worth another try, and what the log keeps of one.

Used by the sagas and by ``sandboxes``, which builds the executor.
"""

from __future__ import annotations

import logging
from typing import Any

from atelier.model.errors import AtelierError, TransientError
from atelier.saga.definition import SagaInterruptedError

_logger = logging.getLogger(__name__)


def is_transient(error: Exception) -> bool:
    return isinstance(error, TransientError)


def interruption(message: str) -> dict[str, Any]:
    return {"code": "interrupted", "message": message, "hint": "its log may say why; then try again"}


def describe_error(error: Exception) -> dict[str, Any]:
    """``{code, message, hint}``. An error that nobody raised on purpose also goes to the log with its traceback."""
    if isinstance(error, AtelierError):
        return {"code": error.code, "message": error.message, "hint": error.hint}
    if isinstance(error, SagaInterruptedError):
        return interruption("the manager ended in the middle of it")
    _logger.error("unexpected error", exc_info=error)
    return {
        "code": "internal",
        "message": f"{type(error).__name__}: {error}",
        "hint": "this is a defect: please report it with the manager's log",
    }

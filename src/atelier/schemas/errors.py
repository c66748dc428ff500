"""The one error form of the API."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or above has this form. ``code`` is stable; ``message`` names the operation
    and the object; ``hint`` says what to do (may be empty)."""

    code: str
    message: str
    hint: str = ""

"""How lists are paged and filtered: cursors, and labels in a column of JSON. Used by the repositories."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Column, ColumnElement, func, select

from atelier.model.errors import InvalidRequestError


def make_cursor(sequence: int) -> str:
    """For the page behind the row with this number."""
    return base64.urlsafe_b64encode(b"s%d" % sequence).decode().rstrip("=")


def parse_cursor(cursor: str) -> int:
    """Raises InvalidRequestError (``invalid_cursor``)."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True)
        if text[:1] == b"s" and text[1:].isdigit() and len(text) <= 19:
            return int(text[1:])
    except (binascii.Error, UnicodeEncodeError):
        pass
    raise InvalidRequestError(
        "the cursor is not one of this list's",
        code="invalid_cursor",
        hint="pass next_cursor as it was returned, or leave it out to begin anew",
    )


def bearing(column: Column[Any], labels: Mapping[str, str]) -> Iterator[ColumnElement[bool]]:
    """One condition per label: ``column`` holds a JSON object with it."""
    for key, value in labels.items():
        label = func.json_each(column).table_valued("key", "value", joins_implicitly=True)
        yield select(label.c.key).where(label.c.key == key, label.c.value == value).exists()

"""What a call to the manager is, and the pieces that all of them are made of. Without I/O.

Used by ``calls.py`` and ``lifecycle_calls.py``, which say every route once; ``connection.py`` carries calls out.
``operation`` reads on from "could not": it names what was tried and on what, for error messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from atelier.client.addresses import encode_query, encode_segment
from atelier.client.errors import invalid_arguments, not_understood
from atelier.model.errors import InvalidRequestError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

API = "/api/v1"
WAIT_AT_MOST_SECONDS = 120.0
"""How long one request waits for a sandbox; longer waits are asked for again."""

ANSWER_TIMEOUT_SECONDS = 60.0


class Keep(Enum):
    """Says that a limit stays as it is, where None would take it away."""

    KEEP = "keep"


KEEP = Keep.KEEP
_NO_CONTENT = 204


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. ``parse`` receives (status, whole body). ``read_timeout_seconds`` None: as long as it takes.
    ``repeatable``: asking twice does no harm, so a broken connection is tried again."""

    operation: str
    method: str
    path: str
    parse: Callable[[int, bytes], T]
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    read_timeout_seconds: float | None = ANSWER_TIMEOUT_SECONDS
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class LineStream(Generic[T]):
    """A request whose answer is NDJSON without end; ``parse`` reads one line (raises when it tells of a failure)."""

    operation: str
    method: str
    path: str
    parse: Callable[[bytes], T]
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class TerminalSocket(Generic[T]):
    """A WebSocket that carries a terminal. ``parse`` reads one text frame (raises when it tells of a failure).
    ``lost_hint``: what to do when the connection breaks off."""

    operation: str
    path: str
    parse: Callable[[bytes], T]
    lost_hint: str


def sandbox_path(sandbox: str, below: str = "") -> str:
    return f"{API}/sandboxes/{encode_segment(sandbox, 'sandbox')}{below}"


def wait_query(wait_seconds: float) -> str:
    """Have the answer come when it is done, or after this time; 0: at once."""
    return encode_query([("wait", "true"), ("timeout_seconds", f"{wait_seconds:g}")] if wait_seconds > 0 else [])


def make_body(kind: type[BaseModel], operation: str, /, **fields: Any) -> bytes:
    """Without defaults: an older manager, which refuses unknown fields, then takes what a newer client sends."""
    return _dump(_checked(kind, operation, fields), operation, exclude_defaults=True)


def make_patch(kind: type[BaseModel], operation: str, /, **fields: Any) -> bytes:
    """All that is given and nothing else: ``null`` says something, too."""
    return _dump(_checked(kind, operation, fields), operation, exclude_defaults=False)


def _checked(kind: type[M], operation: str, fields: dict[str, Any]) -> M:
    try:
        return kind(**fields)
    except ValidationError as error:
        raise invalid_arguments(operation, error) from error


def _dump(body: BaseModel, operation: str, *, exclude_defaults: bool) -> bytes:
    try:
        return body.model_dump_json(exclude_defaults=exclude_defaults, exclude_unset=True).encode()
    except ValueError as error:
        raise InvalidRequestError(
            f"could not {operation}: a value is no valid text ({error})", hint="give text that is valid unicode"
        ) from error


def read_model(kind: type[M], operation: str) -> Callable[[int, bytes], M]:
    def parse(status: int, content: bytes) -> M:
        del status
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise not_understood(operation, error) from error

    return parse


def read_bytes(status: int, content: bytes) -> bytes:
    del status
    return content


def is_no_content(status: int, content: bytes) -> bool:
    del content
    return status == _NO_CONTENT


def read_nothing(status: int, content: bytes) -> None:
    del status, content

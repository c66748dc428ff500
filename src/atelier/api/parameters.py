"""Parameters that several routes share.

All are coroutines: FastAPI would run plain functions in threads, and the database is the loop's.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Path, Query, Request
from starlette.requests import HTTPConnection

from atelier.api.services import Services
from atelier.model.errors import InvalidRequestError
from atelier.services.guest_sessions import GuestSession, check_path

REFERENCE_MAX_LENGTH = 64
SandboxReference = Annotated[str, Path(description="id or name of the sandbox", max_length=REFERENCE_MAX_LENGTH)]
SnapshotReference = Annotated[str, Path(description="id or name of the snapshot", max_length=REFERENCE_MAX_LENGTH)]
WaitSeconds = Annotated[float, Query(gt=0, le=3600, description="how long to wait at most")]
PageLimit = Annotated[int, Query(ge=1, le=500)]
PageCursor = Annotated[str, Query(max_length=200, description="`next_cursor` of the page before")]
LabelFilter = Annotated[list[str] | None, Query(description="`key=value`; several must all hold", max_length=16)]
GuestUser = Annotated[str, Query(description="user in the guest; empty: the image's default user", max_length=32)]


def services_of(connection: HTTPConnection) -> Services:
    services = connection.app.state.services
    assert isinstance(services, Services)
    return services


def parse_label_filter(pairs: list[str] | None) -> dict[str, str]:
    """Raises InvalidRequestError."""
    labels: dict[str, str] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidRequestError(f"the label filter {pair!r} is not of the form key=value", hint="?label=team=web")
        labels[key] = value
    return labels


async def session_of(request: Request, sandbox: SandboxReference) -> GuestSession:
    """The running sandbox that the path names."""
    return await services_of(request).sessions.enter(sandbox)


async def looking_session_of(request: Request, sandbox: SandboxReference) -> GuestSession:
    """The same for a look at it, which is no use."""
    return await services_of(request).sessions.enter(sandbox, is_use=False)


async def guest_path(
    request: Request,
    path: Annotated[str, Query(description="path in the guest; percent-encoded bytes, so that any name can be said")],
) -> bytes:
    """The exact bytes of ``?path=``: the parsed query has lost what is no UTF-8."""
    for pair in request.url.query.split("&"):
        name, _, value = pair.partition("=")
        if name == "path":
            return check_path(unquote_to_bytes(value.replace("+", " ")))
    raise InvalidRequestError("the query has no path", code="invalid_path", hint="add ?path=/absolute/or/relative")

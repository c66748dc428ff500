"""Who may speak to the manager: bearer token, Host and Origin, checked before any route is looked up.

One plain ASGI layer around the whole application, so that no route, stream or WebSocket can be forgotten. Only
``OPEN_PATHS`` answer without a token; they say nothing about this installation.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from atelier.api import errors
from atelier.model.errors import AccessDeniedError, AtelierError, AuthenticationError, InvalidRequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json"})
OPEN_PREFIX = "/docs/"
"""Health, and the description of the API: the same for everybody who has the software."""

LOCAL_HOST_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_MAX_PLAIN_BODY_BYTES = 32 * 1024 * 1024
_STREAMED_BODIES = ("/files", "/files/archive", "/stdin")


class Gate:
    """ASGI layer that lets through only requests with the right token, Host and Origin.

    ``host_names``: names besides the local ones under which this manager is known, without port.
    """

    def __init__(self, application: Application, token: str, host_names: frozenset[str] = frozenset()) -> None:
        self._application = application
        self._token = token.encode()
        self._host_names = LOCAL_HOST_NAMES | host_names

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        try:
            self._check(scope)
        except AtelierError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._application(scope, receive, send)

    def _check(self, scope: Message) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if _host_name(host) not in self._host_names:
            # A page of a foreign name that resolves to this machine (DNS rebinding) ends here.
            raise AccessDeniedError(
                f"this manager is not known as {host!r}", code="wrong_host", hint="use the address it listens on"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != host:
            raise AccessDeniedError(
                f"requests from pages of {origin!r} are refused", code="wrong_origin", hint="call from the same origin"
            )
        path: str = scope["path"]
        length = headers.get(b"content-length", b"0")
        if not path.endswith(_STREAMED_BODIES) and length.isdigit() and int(length) > _MAX_PLAIN_BODY_BYTES:
            raise InvalidRequestError(
                f"the body has {int(length)} bytes, at most {_MAX_PLAIN_BODY_BYTES} are taken here",
                code="body_too_large",
                hint="send large content to .../files",
            )
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            raise AuthenticationError(
                "no token was sent",
                hint="send 'Authorization: Bearer <key>'; clients read ATELIER_API_KEY or the local token file",
            )
        if not hmac.compare_digest(given.strip(), self._token):
            raise AuthenticationError("the token is wrong", hint="check ATELIER_API_KEY, or the local token file")


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _refuse(error: AtelierError, scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 4401, "reason": error.message[:100]})
        return
    await errors.respond(errors.status_of(error), errors.body_of(error))(scope, receive, send)

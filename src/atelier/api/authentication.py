"""Who speaks to the manager: key or session, Host and Origin, sizes and rates, before any route is looked up.

One plain ASGI layer around the whole application, so that no route, stream or WebSocket can be forgotten. Only open
paths answer without a key or session. Whom it finds, it leaves in the request's state for ``authorisation``, and what that
says of the operation it puts into the audit log.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.websockets import WebSocket

from atelier.api import errors
from atelier.api.services import Services
from atelier.model.errors import AccessDeniedError, AtelierError, AuthenticationError, InvalidRequestError
from atelier.model.principal import Principal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json", "/sign-in", "/sign-out", "/previews/enter"})
OPEN_PREFIXES = ("/docs/", "/sign-in/")
"""Health and the description of the API, the same for everybody who has the software; and the way in."""
PAGES = re.compile(r"/sandboxes/[a-z0-9-]{1,64}/terminal")
"""What people look at with a browser. Who is not signed in comes as far as the page, which sends them to do that."""

LOCAL_HOST_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_MAX_PLAIN_BODY_BYTES = 32 * 1024 * 1024
_STREAMED_BODIES = ("/files", "/files/archive", "/stdin")


class Gate:
    """ASGI layer that lets through only requests with a good key or session, the right Host and Origin.

    ``public_url``: where people reach this manager, as ``https://atelier.example.org``; its sessions' cookies are then
    bound to TLS. ``host_names``: names besides its and the local ones under which the manager is known, without port.
    """

    def __init__(
        self, application: Application, services: Services, public_url: str, host_names: frozenset[str] = frozenset()
    ) -> None:
        self._application = application
        self._services = services
        public = urlsplit(public_url)
        self._public_origin = f"{public.scheme}://{public.netloc}"
        self._host_names = LOCAL_HOST_NAMES | host_names | {public.hostname or ""}
        self._cookie = session_cookie(public_url)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        with contextlib.ExitStack() as stack:
            try:
                headers: dict[bytes, bytes] = dict(scope["headers"])
                self._check_origin(scope, headers)
                _check_promised_size(scope["path"], headers)
                state["principal"] = self._find_principal(scope, headers)
                if principal := state["principal"]:
                    credential = principal.key_id or principal.session_id
                    self._services.rate_limits.take_request(credential)
                    if scope["type"] == "websocket":
                        stack.enter_context(self._services.rate_limits.web_socket(credential))
            except AtelierError as error:
                await _refuse(error, scope, receive, send)
                return
            await self._application(scope, _bounded(scope, receive), self._noting(scope, send))

    # --- the browser's word -------------------------------------------------------------------------------------------

    def _check_origin(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _host_name(host) not in self._host_names:
            # A page of a foreign name that resolves to this machine (DNS rebinding) ends here.
            raise AccessDeniedError(
                f"this manager is not known as {host!r}", code="wrong_host", hint="use the address it listens on"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not self._is_own(origin, host):
            raise AccessDeniedError(
                f"requests from pages of {origin!r} are refused", code="wrong_origin", hint="call from the same origin"
            )

    def _is_own(self, origin: str, host: str) -> bool:
        """Exactly: scheme, name and port."""
        return origin in (self._public_origin, f"http://{host}")

    # --- who it is ----------------------------------------------------------------------------------------------------

    def _find_principal(self, scope: Message, headers: dict[bytes, bytes]) -> Principal | None:
        """None: nobody, at a path that is open to everybody."""
        path: str = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES) or PAGES.fullmatch(path) is not None
        authenticator = self._services.authenticator
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        key = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
        token = _read_cookie(headers.get(b"cookie", b""), self._cookie)
        try:
            if key:
                return authenticator.by_key(key.decode("latin-1"))
            if token:
                principal = authenticator.by_session(token)
                is_unsafe = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
                if is_unsafe and b"origin" not in headers:
                    # A browser sends it; without, nobody can say which page has asked.
                    raise AccessDeniedError(
                        "a session's cookie came without an Origin",
                        code="wrong_origin",
                        hint="programs send a key: Authorization: Bearer <key>",
                    )
                return principal
        except AuthenticationError:
            if not is_open:
                raise
        if not is_open:
            raise no_key_sent()
        return None

    # --- what is written down -----------------------------------------------------------------------------------------

    def _noting(self, scope: Message, send: Send) -> Send:
        async def noting(message: Message) -> None:
            state = scope["state"]
            if operation := state.get("operation", ""):
                if message["type"] == "http.response.start":
                    self._note(scope, operation, message["status"])
                elif message["type"] == "websocket.accept":
                    self._note(scope, operation, 101)
            await send(message)

        return noting

    def _note(self, scope: Message, operation: str, status: int) -> None:
        state = scope["state"]
        self._services.audit.note(state["principal"], operation, state.get("subject", ""), status, address_of(scope))


def no_key_sent() -> AuthenticationError:
    return AuthenticationError(
        "no key was sent",
        hint="send 'Authorization: Bearer <key>'; clients read ATELIER_API_KEY or the local token file",
    )


def session_cookie(public_url: str) -> str:
    """The name of the cookie. With TLS one that no other host, and no page without TLS, can set."""
    return "__Host-atelier" if public_url.startswith("https://") else "atelier_session"


def address_of(scope: Message) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _check_promised_size(path: str, headers: dict[bytes, bytes]) -> None:
    length = headers.get(b"content-length", b"0")
    if not path.endswith(_STREAMED_BODIES) and length.isdigit() and int(length) > _MAX_PLAIN_BODY_BYTES:
        raise InvalidRequestError(
            f"the body has {int(length)} bytes, at most {_MAX_PLAIN_BODY_BYTES} are taken here",
            code="body_too_large",
            hint="send large content to .../files",
        )


def _bounded(scope: Message, receive: Receive) -> Receive:
    """Bodies that come in pieces, without having said how long they are, are counted."""
    if scope["type"] != "http" or scope["path"].endswith(_STREAMED_BODIES):
        return receive
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > _MAX_PLAIN_BODY_BYTES:
            # The one kind of error that the reading of a body lets pass as it is.
            raise HTTPException(413, f"the body has more than {_MAX_PLAIN_BODY_BYTES} bytes")
        return message

    return bounded


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _read_cookie(header: bytes, name: str) -> str:
    try:
        morsel = SimpleCookie(header.decode("latin-1")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


async def _refuse(error: AtelierError, scope: Message, receive: Receive, send: Send) -> None:
    response = errors.answer(error)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
        return
    await response(scope, receive, send)

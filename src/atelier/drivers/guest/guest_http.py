"""HTTP requests to one guest: pooled connections over its channel, bounded answers, errors in the domain's words.

Used by ``agent``, one object per sandbox. A guest that does not answer is a GuestUnreachableError, one that answers
nonsense a GuestProtocolError. A question without side effects is asked once more when the connection broke.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpcore

from atelier.drivers.guest.channel_connection import new_pool
from atelier.drivers.guest.messages import (
    ERROR_MAX_BYTES,
    MESSAGE_MAX_BYTES,
    Message,
    error_of_response,
    parse_message,
    plain,
    read_bounded,
)
from atelier.guest_protocol import connect
from atelier.model.errors import AtelierError, GuestProtocolError, GuestUnreachableError, TimeoutExceededError

CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 60.0
"""How long a guest may take for the answer to a call, or for the headers of a streamed one."""
STALL_SECONDS: Final = 60.0
"""How long a file transfer may stand still."""
_PIECES_PER_TURN: Final = 32
_ORIGIN: Final = b"guest"
_CUT_OFF: Final = ("Server disconnected", "peer closed connection")
"""How httpcore and h11 begin to say that an answer ended before its end; they have no class of its own for that."""

Headers = list[tuple[bytes, bytes]]


def translate(error: Exception, what: str) -> AtelierError:
    """What an exception of httpcore means; ``what`` names the operation and the sandbox."""
    if isinstance(error, (httpcore.ReadTimeout, httpcore.WriteTimeout, TimeoutError)):
        return GuestUnreachableError(f"{what}: the guest does not answer", hint="the sandbox may be overloaded")
    if isinstance(error, httpcore.RemoteProtocolError):
        reason = str(error)
        if not reason.startswith(_CUT_OFF):
            return GuestProtocolError(f"{what}: the guest breaks HTTP: {plain(reason)}")
        return GuestUnreachableError(f"{what}: the guest broke the connection off")
    return GuestUnreachableError(f"{what}: the guest channel does not answer: {plain(str(error))}")


class GuestHttp:
    """Requests to the guest agent of one sandbox. ``token`` is sent with each."""

    def __init__(self, sandbox_id: str, socket_path: Path) -> None:
        self._sandbox_id = sandbox_id
        self._pool = new_pool(lambda: socket_path)
        self.token = ""

    async def close(self) -> None:
        await self._pool.aclose()

    def _headers(self, headers: Mapping[str, str]) -> Headers:
        raw = [(b"host", _ORIGIN)]
        if self.token:
            raw.append((b"x-access-token", self.token.encode()))
        raw += [(name.encode(), value.encode()) for name, value in headers.items()]
        return raw

    @asynccontextmanager
    async def open(
        self,
        what: str,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | AsyncIterator[bytes] = b"",
        absent: str = "not_found",
        expected: tuple[int, ...] = (200,),
        answer_seconds: float | None = ANSWER_SECONDS,
        stall_seconds: float | None = STALL_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> AsyncGenerator[httpcore.Response]:
        """Send a request; the response's body is the caller's to read, through ``body_of``.

        ``answer_seconds`` bounds the time to the headers in all (None: only standing still is bounded),
        ``stall_seconds`` each wait for bytes to go or come. Any status but the ``expected`` is raised.
        """
        raw_headers = self._headers(headers or {})
        if isinstance(body, bytes):
            if body or method == "POST":
                raw_headers.append((b"content-length", str(len(body)).encode()))
        else:
            raw_headers.append((b"transfer-encoding", b"chunked"))
        request = httpcore.Request(
            method,
            httpcore.URL(scheme=b"http", host=_ORIGIN, port=None, target=target.encode()),
            headers=raw_headers,
            content=body,
            extensions={"timeout": {"connect": connect_seconds, "read": stall_seconds, "write": stall_seconds}},
        )
        what = f"{what} in sandbox {self._sandbox_id}"
        try:
            async with asyncio.timeout(answer_seconds):
                response = await self._pool.handle_async_request(request)
                if response.status not in expected:
                    try:
                        error_body = await read_bounded(body_of(response), ERROR_MAX_BYTES)
                    finally:
                        await response.aclose()
                    raise error_of_response(response.status, error_body, absent=absent)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, TimeoutError) as error:
            raise translate(error, what) from error
        try:
            yield response
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            raise translate(error, what) from error
        finally:
            await response.aclose()

    async def ask(
        self,
        what: str,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        absent: str = "not_found",
        expected: tuple[int, ...] = (200,),
        answer_seconds: float = ANSWER_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
        is_question: bool = False,
    ) -> Message:
        """A request and its whole JSON answer. ``is_question``: it changes nothing, so it may be asked twice."""
        for may_repeat in (is_question, False):
            try:
                async with (
                    asyncio.timeout(answer_seconds),
                    self.open(
                        what,
                        method,
                        target,
                        headers=headers,
                        body=body,
                        absent=absent,
                        expected=expected,
                        answer_seconds=None,
                        connect_seconds=connect_seconds,
                    ) as response,
                ):
                    return parse_message(await read_bounded(body_of(response), MESSAGE_MAX_BYTES))
            except TimeoutError as error:
                raise TimeoutExceededError(
                    f"{what} in sandbox {self._sandbox_id}: no answer within {answer_seconds:g} s"
                ) from error
            except GuestUnreachableError:
                if not may_repeat:
                    raise
        raise AssertionError("a loop of two that ended")

    async def call(
        self, what: str, procedure: str, message: object, *, user: str = "", absent: str, is_question: bool = False
    ) -> Message:
        """A unary call of the Connect protocol."""
        headers = {"content-type": connect.CONTENT_TYPE_UNARY, **basic_user(user)}
        return await self.ask(
            what,
            "POST",
            f"/{procedure}",
            headers=headers,
            body=connect.encode_json(message),
            absent=absent,
            is_question=is_question,
        )


async def body_of(response: httpcore.Response) -> AsyncIterator[bytes]:
    """The body's pieces as they come. Who opened the response closes it."""
    taken = 0
    async for piece in response.aiter_stream():
        taken += 1
        if taken % _PIECES_PER_TURN == 0:
            # What is here already may be thousands of tiny chunks: others are served in between.
            await asyncio.sleep(0)
        yield piece


def header(response: httpcore.Response, name: str) -> str:
    """The first header of this name, empty if there is none."""
    wanted = name.encode()
    for key, value in response.headers:
        if key.lower() == wanted:
            return value.decode("latin-1")
    return ""


def basic_user(user: str) -> dict[str, Any]:
    """The header that names the user whom a request acts as; none for the guest's default user."""
    if not user:
        return {}
    from base64 import b64encode

    return {"authorization": "Basic " + b64encode(f"{user}:".encode()).decode()}

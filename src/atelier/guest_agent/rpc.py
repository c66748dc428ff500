"""Connect procedures on the HTTP router: unary, server-streaming and client-streaming calls in their JSON form.

Used by the services (process, filesystem, control) to register. A procedure gets the decoded message and the request
(for its user and headers) and raises ConnectError; what goes over the wire is settled here and in
``guest_protocol.connect``.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from atelier.guest_agent.http import STREAM, UNARY, HttpError, Request, Response, Router, json_response
from atelier.guest_protocol.connect import (
    CONTENT_TYPE_STREAM,
    CONTENT_TYPE_UNARY,
    FLAG_END_STREAM,
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    ConnectError,
    EnvelopeReader,
    decode_json,
    encode_end_stream,
    encode_envelope,
    encode_json,
)

Message = dict[str, Any]
UnaryProcedure = Callable[[Message, Request], Awaitable[Message]]
ServerStreamProcedure = Callable[[Message, Request], AsyncIterator[Message | bytes]]
"""Yields messages, or bytes that are JSON already."""
ClientStreamProcedure = Callable[[AsyncIterator[Message], Request], Awaitable[Message]]

STREAM_HEADERS: Final = {"content-type": CONTENT_TYPE_STREAM}
_MAX_TIMEOUT_DIGITS: Final = 10
_KEEPALIVE_SECONDS: Final = 90.0


def add_unary(router: Router, path: str, procedure: UnaryProcedure, *, is_still: bool = False) -> None:
    async def endpoint(request: Request) -> Response:
        _check_type(request, CONTENT_TYPE_UNARY)
        return json_response(await procedure(decode_json(await request.read(MAX_MESSAGE_BYTES)), request))

    router.add("POST", path, endpoint, is_still=is_still, form=UNARY)


def add_server_stream(router: Router, path: str, procedure: ServerStreamProcedure) -> None:
    async def endpoint(request: Request) -> Response:
        message = await read_stream_request(request)
        return Response(200, STREAM_HEADERS, _envelopes(procedure(message, request)))

    router.add("POST", path, endpoint, form=STREAM)


def add_client_stream(router: Router, path: str, procedure: ClientStreamProcedure) -> None:
    async def endpoint(request: Request) -> Response:
        _check_type(request, CONTENT_TYPE_STREAM)
        answer = await procedure(_incoming(request), request)
        return Response(200, STREAM_HEADERS, encode_envelope(encode_json(answer)) + encode_end_stream())

    router.add("POST", path, endpoint, form=STREAM)


async def read_stream_request(request: Request) -> Message:
    """The one message that opens a server stream. Raises ConnectError."""
    _check_type(request, CONTENT_TYPE_STREAM)
    reader = EnvelopeReader()
    messages = [payload for _, payload in reader.feed(await request.read(MAX_MESSAGE_BYTES + HEADER_BYTES))]
    reader.finish()
    if len(messages) != 1:
        raise ConnectError("invalid_argument", f"one request message is needed, not {len(messages)}")
    return decode_json(messages[0])


def timeout_seconds(request: Request) -> float | None:
    """The call's time limit (header Connect-Timeout-Ms), or None. Raises ConnectError if it is no number."""
    value = request.headers.get("connect-timeout-ms")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_TIMEOUT_DIGITS):
        raise ConnectError("invalid_argument", "Connect-Timeout-Ms is no number of at most 10 digits")
    return int(value) / 1000


def keepalive_seconds(request: Request) -> float:
    """How long a stream may be silent before a keep-alive is sent (header Keepalive-Ping-Interval, seconds)."""
    value = request.headers.get("keepalive-ping-interval", "")
    if value.isascii() and value.isdigit() and 1 <= int(value[:6]) <= 3600:
        return float(int(value[:6]))
    return _KEEPALIVE_SECONDS


def _check_type(request: Request, wanted: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != wanted:
        raise HttpError(415, "invalid_argument", f"the content-type must be {wanted}, not {content_type[:100]!r}")
    for name in ("content-encoding", "connect-content-encoding"):
        if request.headers.get(name, "identity") != "identity":
            raise ConnectError("unimplemented", "compressed messages are not taken")


async def _incoming(request: Request) -> AsyncIterator[Message]:
    reader = EnvelopeReader()
    async for piece in request.iterate():
        for flags, payload in reader.feed(piece):
            if flags & FLAG_END_STREAM:
                raise ConnectError("invalid_argument", "a client ends its stream by ending the body")
            yield decode_json(payload)
    reader.finish()


async def _envelopes(messages: AsyncIterator[Message | bytes]) -> AsyncIterator[bytes]:
    try:
        async for message in messages:
            yield encode_envelope(message if isinstance(message, bytes) else encode_json(message))
    except ConnectError as error:
        yield encode_end_stream(error)
    except Exception as error:
        import traceback

        print(f"guest agent: a stream failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        yield encode_end_stream(ConnectError("internal", f"{type(error).__name__}: {error}"))
    else:
        yield encode_end_stream()
    finally:
        close = getattr(messages, "aclose", None)
        if close is not None:
            await close()

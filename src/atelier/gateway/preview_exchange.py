"""One visitor's connection to previews: reads requests, has the manager say who may go on, and carries both ways.

Made by ``preview_server`` for each connection. Nothing of a request or an answer gathers here, whoever is slow; whatever
breaks ends this connection and no other.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from atelier.gateway import http_head
from atelier.gateway.byte_stream import ByteStream
from atelier.gateway.http_bodies import BodyBroken, BodyCarrier, splice
from atelier.gateway.http_head import NO_BODY, BadHead, ResponseHead
from atelier.gateway.preview_door import PreviewDoor, answer_page
from atelier.gateway.preview_headers import Arrival, NobodySaid, PreviewRequest, for_visitor
from atelier.gateway.preview_upstream import Upstream, UpstreamRefused, Upstreams
from atelier.model.preview_page import PreviewPage
from atelier.model.preview_visit import Admitted, Answered

log = logging.getLogger(__name__)

REQUESTS_PER_SANDBOX: Final = 384
"""Of the 512 streams that a channel has: the rest is the manager's, and SSH's."""
WEB_SOCKETS_PER_SANDBOX: Final = 256
_FIRST_HEAD_SECONDS: Final = 15.0
_NEXT_HEAD_SECONDS: Final = 75.0
_STALL_SECONDS: Final = 120.0
"""How long a visitor may take for the next piece of what they send or read."""
_INTERIM_MAX: Final = 16


@dataclass
class PreviewRoom:
    """What the connections of one gateway share. How many are open is by sandbox."""

    door: PreviewDoor
    upstreams: Upstreams
    requests: dict[str, int] = field(default_factory=dict[str, int])
    web_sockets: dict[str, int] = field(default_factory=dict[str, int])


class _Shown(Exception):
    """The visitor gets this page instead of an answer of the sandbox's."""

    def __init__(self, page: PreviewPage) -> None:
        super().__init__(page.code)
        self.page = page


_TOO_MANY: Final = PreviewPage(
    503,
    "too_many_visitors",
    "Too many at once",
    "As many requests or WebSockets are open to this sandbox as it may have.",
    "Close some tabs, or come again in a moment.",
    again_seconds=10,
)

_MISCONFIGURED: Final = PreviewPage(
    502,
    "proxy_misconfigured",
    "The proxy is set up wrongly",
    "The proxy in front of Atelier did not say who asks: see deploy/caddy/Caddyfile.",
)


def _take_place(taken: dict[str, int], sandbox_id: str, at_most: int) -> None:
    """Raises _Shown where there is none left."""
    count = taken.get(sandbox_id, 0)
    if count >= at_most:
        raise _Shown(_TOO_MANY)
    taken[sandbox_id] = count + 1


def _leave_place(taken: dict[str, int], sandbox_id: str) -> None:
    count = taken.pop(sandbox_id)
    if count > 1:
        taken[sandbox_id] = count - 1


class PreviewConnection:
    """``arrival``: whose connection it is; None: a front proxy's, which says of each request whose that is."""

    def __init__(self, room: PreviewRoom, visitor: ByteStream, arrival: Arrival | None) -> None:
        self._room = room
        self._visitor = visitor
        self._arrival = arrival

    async def serve(self) -> None:
        """Until either side has enough. Raises ConnectionError, TimeoutError."""
        head_seconds = _FIRST_HEAD_SECONDS
        while True:
            try:
                request = await self._read_request(head_seconds)
            except BadHead as bad:
                log.info("a request of %s is refused: %s", self._arrival.address if self._arrival else "a proxy's", bad)
                page = PreviewPage(bad.status, "bad_request", "This request is not understood", f"{bad}.")
                await self._answer(answer_page(page, ""), keeps_alive=False)
                return
            except NobodySaid:
                await self._answer(answer_page(_MISCONFIGURED, ""), keeps_alive=False)
                return
            if request is None or not await self._serve_request(request):
                return
            head_seconds = _NEXT_HEAD_SECONDS

    async def _read_request(self, seconds: float) -> PreviewRequest | None:
        """None: the visitor has gone. Raises BadHead, NobodySaid."""
        try:
            content = await self._visitor.read_until(b"\r\n\r\n", http_head.HEAD_MAX_BYTES, seconds)
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            raise BadHead(431, f"its head has more than {http_head.HEAD_MAX_BYTES} bytes") from None
        return PreviewRequest(content[:-4], self._arrival)

    async def _serve_request(self, request: PreviewRequest) -> bool:
        """Whether the connection is good for another request."""
        door = self._room.door
        try:
            found = door.find_known(request) or await door.ask(request)
            if isinstance(found, Admitted):
                return await self._visit(request, found)
        except _Shown as shown:
            log.info("%s: %s", shown.page.code, request)
            found = answer_page(shown.page, request.carried.accept)
        await self._answer(found, keeps_alive=request.keeps_alive, without_body=request.method == b"HEAD")
        return request.keeps_alive

    async def _visit(self, request: PreviewRequest, admitted: Admitted) -> bool:
        room = self._room
        _take_place(room.requests, admitted.sandbox_id, REQUESTS_PER_SANDBOX)
        try:
            if request.is_repeatable:
                kept = room.upstreams.find_kept(admitted.sandbox_id, admitted.port)
                # The server may just have ended it: then the request is sent again, on a new one.
                if kept is not None and (done := await self._exchange(kept, request)) is not None:
                    return done
            upstream = await self._open(request, admitted)
            if isinstance(upstream, Answered):
                await self._answer(upstream, keeps_alive=False, without_body=request.method == b"HEAD")
                return False
            done = await self._exchange(upstream, request)
            if done is None:
                raise _Shown(_broken(admitted.port, "it ended the connection without an answer"))
            return done
        finally:
            _leave_place(room.requests, admitted.sandbox_id)

    async def _open(self, request: PreviewRequest, admitted: Admitted) -> Upstream | Answered:
        room = self._room
        try:
            try:
                return await room.upstreams.open(admitted.sandbox_id, admitted.port)
            except UpstreamRefused as refused:
                if refused.reason != "unreachable" or not room.door.forget(request):
                    raise
                # It was let in a moment ago, and the sandbox has stopped meanwhile, or was paused: the manager wakes it,
                # or knows what to show.
                again = await room.door.ask(request)
                if isinstance(again, Answered):
                    return again
                return await room.upstreams.open(again.sandbox_id, again.port)
        except UpstreamRefused as refused:
            raise _Shown(_not_reached(admitted.port, refused.reason)) from refused

    async def _exchange(self, upstream: Upstream, request: PreviewRequest) -> bool | None:
        """Whether the visitor's connection is good for another request; None: no byte of an answer came."""
        fields = request.fields
        sending: asyncio.Task[None] | None = None
        is_kept = False
        try:
            upstream.begin_writing(request.write())
            if not fields.body.is_empty:
                sending = asyncio.create_task(self._send_body(upstream, request))
            response = await self._read_answer(upstream, request)
            if response is None:
                return None
            headers = for_visitor(response.headers)
            if response.is_switching:
                written = http_head.write_response(response, headers, NO_BODY, keeps_alive=True)
                await self._switch(upstream, written)
                return False
            body = NO_BODY if request.method == b"HEAD" else response.body
            is_sent = sending is None or sending.done()
            keeps_alive = fields.keeps_alive and is_sent and body.framing != "close" and not fields.is_http_1_0
            written = http_head.write_response(response, headers, body, keeps_alive=keeps_alive)
            await BodyCarrier(upstream, self._visitor, None, _STALL_SECONDS).carry(body, written)
            if response.keeps_alive and is_sent and not fields.is_http_1_0:
                self._room.upstreams.keep(upstream)
                is_kept = True
            return keeps_alive
        except BodyBroken as broken:
            log.info("an answer of sandbox %s, port %d, broke off: %s", *upstream.key, broken)
            # A close is what tells the visitor that it is not whole.
            self._visitor.abort()
            return False
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            if not is_kept:
                upstream.close()

    async def _send_body(self, upstream: Upstream, request: PreviewRequest) -> None:
        """A visitor who stops in the middle is cut; a server that takes no more may answer all the same."""
        try:
            await BodyCarrier(self._visitor, upstream, _STALL_SECONDS, _STALL_SECONDS).carry(request.fields.body)
        except ConnectionError:
            return
        except (BodyBroken, TimeoutError):
            upstream.abort()

    async def _read_answer(self, upstream: Upstream, request: PreviewRequest) -> ResponseHead | None:
        """The answer's head; what comes before it (100, 103) is passed on. None: the connection ended before a byte of
        it. Raises _Shown."""
        fields = request.fields
        for _ in range(_INTERIM_MAX):
            try:
                content = await upstream.read_until(b"\r\n\r\n", http_head.HEAD_MAX_BYTES)
                response = http_head.parse_response(content[:-4])
            except asyncio.IncompleteReadError as error:
                if not error.partial:
                    return None
                raise _Shown(_broken(upstream.key[1], "it ended in the middle of its answer")) from error
            except ConnectionError:
                return None
            except asyncio.LimitOverrunError as error:
                raise _Shown(_broken(upstream.key[1], "the head of its answer is too long")) from error
            except BadHead as bad:
                raise _Shown(_broken(upstream.key[1], str(bad))) from bad
            if response.is_switching and fields.is_web_socket:
                return response
            if response.status == 101 or (fields.is_http_1_0 and response.body.framing == "chunked"):
                raise _Shown(_broken(upstream.key[1], "its answer is none to this request"))
            if response.status >= 200:
                return response
            if not fields.is_http_1_0:
                headers = for_visitor(response.headers)
                interim = http_head.write_response(response, headers, NO_BODY, keeps_alive=True)
                await self._visitor.write(interim, _STALL_SECONDS)
        raise _Shown(_broken(upstream.key[1], "it answers without end"))

    async def _switch(self, upstream: Upstream, head: bytes) -> None:
        """A WebSocket, for as long as both sides want it."""
        room, sandbox_id = self._room, upstream.key[0]
        _take_place(room.web_sockets, sandbox_id, WEB_SOCKETS_PER_SANDBOX)
        try:
            self._visitor.begin_writing(head)
            ways = [
                asyncio.create_task(splice(self._visitor, upstream, lambda: room.door.note_use(sandbox_id))),
                asyncio.create_task(splice(upstream, self._visitor, lambda: None)),
            ]
            try:
                # WebSockets know no half close: who is through has said so before.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            _leave_place(room.web_sockets, sandbox_id)

    async def _answer(self, answered: Answered, *, keeps_alive: bool, without_body: bool = False) -> None:
        lines = [f"HTTP/1.1 {answered.status} {_REASONS.get(answered.status, 'Answer')}"]
        lines += [f"{name}: {value}" for name, value in answered.headers]
        if not keeps_alive:
            lines.append("connection: close")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        await self._visitor.write(head if without_body else head + answered.body, _STALL_SECONDS)


_REASONS: Final = {
    303: "See Other", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway",
    503: "Service Unavailable",
}  # fmt: skip


def _not_reached(port: int, reason: str) -> PreviewPage:
    if reason == "refused":
        return PreviewPage(
            502,
            "port_closed",
            f"Nothing listens on port {port}",
            "The sandbox runs, but no program in it serves this port.",
            "Start one there; it may listen on 127.0.0.1 only. See: atelier ports SANDBOX",
        )
    if reason == "busy":
        return _TOO_MANY
    text = "It may be starting, or busy with itself. This page comes again by itself."
    return PreviewPage(503, "guest_unreachable", "The sandbox does not answer", text, again_seconds=3)


def _broken(port: int, reason: str) -> PreviewPage:
    return PreviewPage(
        502, "bad_answer", f"What serves port {port} gave no good answer", f"{reason}.", "Look at its log."
    )

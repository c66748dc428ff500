"""One visitor's connection to previews: reads requests, has the manager say who may go on, and carries both ways.

Made by ``preview_server`` for each connection. Nothing of a request or an answer gathers here, whoever is slow; whatever
breaks ends this connection and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

from atelier.gateway import http_head
from atelier.gateway.http_bodies import BodyBroken, copy_body, splice
from atelier.gateway.http_head import BadHead, Body, RequestHead, ResponseHead
from atelier.gateway.preview_door import PreviewDoor, answer_page
from atelier.gateway.preview_headers import describe_visit, for_sandbox, for_visitor
from atelier.gateway.preview_upstream import Upstream, UpstreamRefused, Upstreams
from atelier.model.ids import is_sandbox_id
from atelier.model.preview import PORT_HEADER, SANDBOX_HEADER
from atelier.model.preview_page import PreviewPage
from atelier.model.preview_visit import Admitted, Answered, Visit

log = logging.getLogger(__name__)

REQUESTS_PER_SANDBOX: Final = 384
"""Of the 512 streams that a channel has: the rest is the manager's, and SSH's."""
WEB_SOCKETS_PER_SANDBOX: Final = 256
_FIRST_HEAD_SECONDS: Final = 15.0
_NEXT_HEAD_SECONDS: Final = 75.0
_STALL_SECONDS: Final = 120.0
"""How long a visitor may take for the next piece of what they send or read."""
_INTERIM_MAX: Final = 16
_REPEATABLE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS"})


@dataclass
class PreviewRoom:
    """What the connections of one gateway share. The counters are by sandbox."""

    door: PreviewDoor
    upstreams: Upstreams
    requests: Counter[str] = field(default_factory=Counter[str])
    web_sockets: Counter[str] = field(default_factory=Counter[str])

    @contextlib.contextmanager
    def place(self, counter: Counter[str], sandbox_id: str, at_most: int):
        """Raises _Shown where there is none left."""
        if counter[sandbox_id] >= at_most:
            raise _Shown(_TOO_MANY)
        counter[sandbox_id] += 1
        try:
            yield
        finally:
            counter[sandbox_id] -= 1
            if not counter[sandbox_id]:
                del counter[sandbox_id]


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


class PreviewConnection:
    """``behind_proxy``: on the other side is a front proxy, which has asked the manager already and says the outcome."""

    def __init__(
        self,
        room: PreviewRoom,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        address: str,
        *,
        behind_proxy: bool,
    ) -> None:
        self._room = room
        self._reader = reader
        self._writer = writer
        self._address = address
        self._behind_proxy = behind_proxy

    async def serve(self) -> None:
        """Until either side has enough. Raises ConnectionError, TimeoutError."""
        head_seconds = _FIRST_HEAD_SECONDS
        while True:
            try:
                content = await self._read_head(head_seconds)
                if content is None:
                    return
                head = http_head.parse_request(content)
            except BadHead as bad:
                page = PreviewPage(bad.status, "bad_request", "This request is not understood", f"{bad}.")
                log.info("a request of %s is refused: %s", self._address or "the proxy's", bad)
                await self._answer(answer_page(page, ""), keeps_alive=False)
                return
            if not await self._serve_request(head):
                return
            head_seconds = _NEXT_HEAD_SECONDS

    async def _read_head(self, seconds: float) -> bytes | None:
        """None: the visitor has gone. Raises BadHead."""
        try:
            async with asyncio.timeout(seconds):
                content = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            content = b""
        if not content or len(content) > http_head.HEAD_MAX_BYTES:
            raise BadHead(431, f"its head has more than {http_head.HEAD_MAX_BYTES} bytes")
        return content[:-4]

    async def _serve_request(self, head: RequestHead) -> bool:
        """Whether the connection is good for another request."""
        visit = describe_visit(head, self._address, is_asked_about=not self._behind_proxy)
        keeps_alive = head.keeps_alive and head.body.is_empty
        try:
            found = self._trust(head) if self._behind_proxy else await self._room.door.find(visit)
            if isinstance(found, Answered):
                await self._answer(found, keeps_alive=keeps_alive, without_body=head.method == b"HEAD")
                return keeps_alive
            return await self._visit(head, visit, found)
        except _Shown as shown:
            log.info("%s %s: %s", visit.method, visit.host, shown.page.code)
            answered = answer_page(shown.page, visit.accept)
            await self._answer(answered, keeps_alive=keeps_alive, without_body=head.method == b"HEAD")
            return keeps_alive

    @staticmethod
    def _trust(head: RequestHead) -> Admitted:
        """What the proxy says that the manager has said."""
        ids, ports = head.values(SANDBOX_HEADER.encode()), head.values(PORT_HEADER.encode())
        sandbox_id = b"".join(ids).decode("latin-1")
        if not is_sandbox_id(sandbox_id) or len(ports) != 1 or not ports[0].isdigit():
            text = "The proxy in front of Atelier did not say where this is to go: see deploy/caddy/Caddyfile."
            raise _Shown(PreviewPage(502, "proxy_misconfigured", "The proxy is set up wrongly", text))
        return Admitted(sandbox_id, int(ports[0]))

    async def _visit(self, head: RequestHead, visit: Visit, admitted: Admitted) -> bool:
        room = self._room
        with room.place(room.requests, admitted.sandbox_id, REQUESTS_PER_SANDBOX):
            head.headers = for_sandbox(head, self._address, behind_proxy=self._behind_proxy)
            request = http_head.write_request(head)
            if head.method in _REPEATABLE and head.body.is_empty and not head.is_web_socket:
                kept = room.upstreams.find_kept(admitted.sandbox_id, admitted.port)
                # The server may just have ended it: then the request is sent again, on a new one.
                if kept is not None and (done := await self._exchange(kept, head, request)) is not None:
                    return done
            upstream = await self._open(visit, admitted)
            if isinstance(upstream, Answered):
                await self._answer(upstream, keeps_alive=False, without_body=head.method == b"HEAD")
                return False
            done = await self._exchange(upstream, head, request)
            if done is None:
                raise _Shown(_broken(admitted.port, "it ended the connection without an answer"))
            return done

    async def _open(self, visit: Visit, admitted: Admitted) -> Upstream | Answered:
        room = self._room
        try:
            try:
                return await room.upstreams.open(admitted.sandbox_id, admitted.port)
            except UpstreamRefused as refused:
                if refused.reason != "unreachable" or not room.door.forget(visit):
                    raise
                # It was let in a moment ago, and the sandbox has stopped meanwhile, or was paused: the manager wakes it,
                # or knows what to show.
                again = await room.door.find(visit)
                if isinstance(again, Answered):
                    return again
                return await room.upstreams.open(again.sandbox_id, again.port)
        except UpstreamRefused as refused:
            raise _Shown(_not_reached(admitted.port, refused.reason)) from refused

    async def _exchange(self, upstream: Upstream, head: RequestHead, request: bytes) -> bool | None:
        """Whether the visitor's connection is good for another request; None: no byte of an answer came."""
        sending: asyncio.Task[None] | None = None
        is_kept = False
        try:
            upstream.writer.write(request)
            if not head.body.is_empty:
                sending = asyncio.create_task(self._send_body(upstream, head))
            response = await self._read_answer(upstream, head)
            if response is None:
                return None
            response.headers = for_visitor(response.headers)
            if response.is_switching:
                await self._switch(upstream, response)
                return False
            body = Body("none") if head.method == b"HEAD" else response.body
            is_sent = sending is None or sending.done()
            keeps_alive = head.keeps_alive and is_sent and body.framing != "close" and not head.is_http_1_0
            written = http_head.write_response(response, body, keeps_alive=keeps_alive)
            await copy_body(
                body, upstream.reader, self._writer, read_seconds=None, write_seconds=_STALL_SECONDS, head=written
            )
            if response.keeps_alive and is_sent and not head.is_http_1_0:
                self._room.upstreams.keep(upstream)
                is_kept = True
            return keeps_alive
        except BodyBroken as broken:
            log.info("an answer of sandbox %s, port %d, broke off: %s", *upstream.key, broken)
            # A close is what tells the visitor that it is not whole.
            self._writer.transport.abort()
            return False
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            if not is_kept:
                upstream.close()

    async def _send_body(self, upstream: Upstream, head: RequestHead) -> None:
        """A visitor who stops in the middle is cut; a server that takes no more may answer all the same."""
        try:
            await copy_body(
                head.body,
                self._reader,
                upstream.writer,
                read_seconds=_STALL_SECONDS,
                write_seconds=_STALL_SECONDS,
            )
        except ConnectionError:
            return
        except (BodyBroken, TimeoutError):
            upstream.writer.transport.abort()

    async def _read_answer(self, upstream: Upstream, head: RequestHead) -> ResponseHead | None:
        """The answer's head; what comes before it (100, 103) is passed on. None: the connection ended before a byte of
        it. Raises _Shown."""
        for _ in range(_INTERIM_MAX):
            try:
                content = await upstream.reader.readuntil(b"\r\n\r\n")
                if len(content) > http_head.HEAD_MAX_BYTES:
                    raise BadHead(502, f"the head of its answer has more than {http_head.HEAD_MAX_BYTES} bytes")
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
            if response.is_switching and head.is_web_socket:
                return response
            if response.status == 101 or (head.is_http_1_0 and response.body.framing == "chunked"):
                raise _Shown(_broken(upstream.key[1], "its answer is none to this request"))
            if response.status >= 200:
                return response
            if not head.is_http_1_0:
                interim = replace(response, headers=for_visitor(response.headers))
                self._writer.write(http_head.write_response(interim, Body("none"), keeps_alive=True))
        raise _Shown(_broken(upstream.key[1], "it answers without end"))

    async def _switch(self, upstream: Upstream, response: ResponseHead) -> None:
        """A WebSocket, for as long as both sides want it."""
        room, sandbox_id = self._room, upstream.key[0]
        with room.place(room.web_sockets, sandbox_id, WEB_SOCKETS_PER_SANDBOX):
            self._writer.write(http_head.write_response(response, Body("none"), keeps_alive=True))
            ways = [
                asyncio.create_task(splice(self._reader, upstream.writer, lambda: room.door.note_use(sandbox_id))),
                asyncio.create_task(splice(upstream.reader, self._writer, lambda: None)),
            ]
            try:
                # WebSockets know no half close: who is through has said so before.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _answer(self, answered: Answered, *, keeps_alive: bool, without_body: bool = False) -> None:
        lines = [f"HTTP/1.1 {answered.status} {_REASONS.get(answered.status, 'Answer')}"]
        lines += [f"{name}: {value}" for name, value in answered.headers]
        if not keeps_alive:
            lines.append("connection: close")
        self._writer.write("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n")
        if not without_body:
            self._writer.write(answered.body)
        await self._drain()

    async def _drain(self) -> None:
        async with asyncio.timeout(_STALL_SECONDS):
            await self._writer.drain()


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

"""Connections to servers in guests, by way of their channels; some are kept for the next request.

Used by ``preview_exchange``. A server's connection is kept for requests to the same port of the same sandbox, and only if
nothing came on it that nobody had asked for.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from atelier.gateway.http_bodies import PIECE_BYTES
from atelier.model.layout import RunLayout

_CONNECT_SECONDS: Final = 30.0
_ANSWER_MAX_BYTES: Final = 64
_KEPT_PER_PORT: Final = 16
_KEPT_SECONDS: Final = 4.0
"""Less than servers keep theirs: node and uvicorn 5 s."""


class UpstreamRefused(Exception):
    """``reason``: the channel's word for it: ``refused`` (nothing listens there), ``unreachable``, ``busy``,
    ``timeout``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Protocol(asyncio.StreamReaderProtocol):
    """Ends a connection on which something happens while nobody uses it."""

    is_idle = False

    def data_received(self, data: bytes) -> None:
        if self.is_idle:
            self.close()
        else:
            super().data_received(data)

    def eof_received(self) -> bool | None:
        if self.is_idle:
            self.close()
        return super().eof_received()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._own_transport = transport

    def close(self) -> None:
        self._own_transport.close()


class Upstream:
    """One connection to a server. ``was_used``: other requests were sent on it before."""

    def __init__(self, key: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.key = key
        self.reader = reader
        self.writer = writer
        self.was_used = False

    def close(self) -> None:
        self.writer.close()


class Upstreams:
    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._kept: dict[tuple[str, int], list[tuple[Upstream, asyncio.TimerHandle]]] = {}

    def find_kept(self, sandbox_id: str, port: int) -> Upstream | None:
        kept = self._kept.get((sandbox_id, port), [])
        while kept:
            upstream, timer = kept.pop()
            timer.cancel()
            if not kept:
                del self._kept[sandbox_id, port]
            if not upstream.writer.is_closing():
                _protocol_of(upstream).is_idle = False
                upstream.was_used = True
                return upstream
        return None

    async def open(self, sandbox_id: str, port: int) -> Upstream:
        """A new connection. Raises UpstreamRefused."""
        channel: Path = self._run.channel_socket(sandbox_id)
        reader = asyncio.StreamReader(limit=PIECE_BYTES, loop=self._loop)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                transport, protocol = await self._loop.create_unix_connection(
                    lambda: _Protocol(reader, loop=self._loop), str(channel)
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
                upstream = Upstream((sandbox_id, port), reader, writer)
                try:
                    writer.write(f"CONNECT {port}\n".encode())
                    answer = await reader.readuntil(b"\n")
                    if len(answer) > _ANSWER_MAX_BYTES or not answer.startswith(b"OK "):
                        raise UpstreamRefused(answer.decode(errors="replace").removeprefix("ERROR ").strip())
                except BaseException:
                    upstream.close()
                    raise
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise UpstreamRefused("unreachable") from error
        return upstream

    def keep(self, upstream: Upstream) -> None:
        """Its last answer has been read to the end, and it goes on."""
        kept = self._kept.setdefault(upstream.key, [])
        if upstream.writer.is_closing() or upstream.reader.at_eof() or len(kept) >= _KEPT_PER_PORT:
            upstream.close()
            return
        _protocol_of(upstream).is_idle = True
        kept.append((upstream, self._loop.call_later(_KEPT_SECONDS, self._drop, upstream)))

    def close(self) -> None:
        for kept in self._kept.values():
            for upstream, timer in kept:
                timer.cancel()
                upstream.close()
        self._kept.clear()

    def _drop(self, upstream: Upstream) -> None:
        upstream.close()
        kept = [each for each in self._kept.pop(upstream.key, []) if each[0] is not upstream]
        if kept:
            self._kept[upstream.key] = kept


def _protocol_of(upstream: Upstream) -> _Protocol:
    protocol = upstream.writer.transport.get_protocol()
    assert isinstance(protocol, _Protocol)
    return protocol

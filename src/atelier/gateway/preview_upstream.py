"""Connections to servers in guests, by way of their channels; some are kept for the next request.

Used by ``preview_exchange``. A server's connection is kept for requests to the same port of the same sandbox, and only if
nothing came on it that nobody had asked for.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from atelier.gateway.byte_stream import ByteStream
from atelier.model.layout import RunLayout

_CONNECT_SECONDS: Final = 30.0
_ANSWER_MAX_BYTES: Final = 64
_KEPT_PER_PORT: Final = 16
_KEPT_SECONDS: Final = 4.0
"""Less than servers keep theirs: node and uvicorn 5 s."""
_SWEEP_SECONDS: Final = 1.0


class UpstreamRefused(Exception):
    """``reason``: the channel's word for it: ``refused`` (nothing listens there), ``unreachable``, ``busy``,
    ``timeout``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Upstream(ByteStream):
    """One connection to a server, of the sandbox and port in ``key``. It ends if something happens on it while nobody uses
    it. ``kept_until``: by the event loop's clock; 0 while it is used."""

    def __init__(self, key: tuple[str, int]) -> None:
        super().__init__()
        self.key = key
        self.kept_until = 0.0

    def data_received(self, data: bytes) -> None:
        if self.kept_until:
            self.close()
        else:
            super().data_received(data)

    def eof_received(self) -> bool | None:
        if self.kept_until:
            self.close()
        return super().eof_received()


class Upstreams:
    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._kept: dict[tuple[str, int], list[Upstream]] = {}
        """The longest kept first."""
        self._sweep: asyncio.TimerHandle | None = None

    def find_kept(self, sandbox_id: str, port: int) -> Upstream | None:
        kept = self._kept.get((sandbox_id, port))
        while kept:
            upstream = kept.pop()
            is_good = upstream.is_usable and upstream.kept_until > self._loop.time()
            upstream.kept_until = 0.0
            if is_good:
                return upstream
            upstream.close()
        return None

    async def open(self, sandbox_id: str, port: int) -> Upstream:
        """A new connection. Raises UpstreamRefused."""
        channel: Path = self._run.channel_socket(sandbox_id)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, upstream = await self._loop.create_unix_connection(
                    lambda: Upstream((sandbox_id, port)), str(channel)
                )
                try:
                    upstream.begin_writing(f"CONNECT {port}\n".encode())
                    answer = await upstream.read_until(b"\n", _ANSWER_MAX_BYTES)
                    if not answer.startswith(b"OK "):
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
        if not upstream.is_usable or len(kept) >= _KEPT_PER_PORT:
            upstream.close()
            return
        upstream.kept_until = self._loop.time() + _KEPT_SECONDS
        kept.append(upstream)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SWEEP_SECONDS, self._drop_old)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for kept in self._kept.values():
            for upstream in kept:
                upstream.close()
        self._kept.clear()

    def _drop_old(self) -> None:
        now = self._loop.time()
        for key, kept in list(self._kept.items()):
            while kept and kept[0].kept_until <= now:
                kept.pop(0).close()
            if not kept:
                del self._kept[key]
        self._sweep = self._loop.call_later(_SWEEP_SECONDS, self._drop_old) if self._kept else None

"""A server in the place of one in a guest: on a TCP port as it is, and as channels that begin with ``CONNECT``.

``python -m benchmarks.edge_upstream PORT CHANNEL...``; says ``ready`` when it serves. Small answers to whatever is asked, with
connections kept: what is measured is the way there.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

_BODY = b"x" * 100
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\n" + _BODY


class _Server(asyncio.Protocol):
    def __init__(self, *, is_channel: bool) -> None:
        self._waits_for_connect = is_channel
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._waits_for_connect:
            line, end, rest = self._received.partition(b"\n")
            if not end:
                return
            assert line.startswith(b"CONNECT ")
            self._waits_for_connect = False
            self._received = rest
            self._transport.write(b"OK 1\n")
        count = self._received.count(b"\r\n\r\n")
        if count:
            self._received = self._received.rpartition(b"\r\n\r\n")[2]
            self._transport.write(_ANSWER * count)


async def _serve(port: int, channels: list[str]) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _Server(is_channel=False), "127.0.0.1", port)
    for channel in channels:
        await loop.create_unix_server(lambda: _Server(is_channel=True), channel)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2:]))

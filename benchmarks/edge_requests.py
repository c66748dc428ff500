"""``edge_requests``: requests a second for a preview by Caddy and gateway, against the same Caddy with the same server as
its static upstream. ``edge_requests_1000``: that ratio beside a thousand sandboxes, against the one without them."""

from __future__ import annotations

import asyncio
import ssl
import time

import uvloop

from benchmarks.edge_stage import EdgeStage, edge_stage
from benchmarks.figure import Figure, at_least, median
from benchmarks.stage import Stage

ROUNDS = 9
_CONNECTIONS = 16
_ROUND_SECONDS = 2.0
_MANY = 1000


def measure(stage: Stage) -> list[Figure]:
    with edge_stage(stage.folder / "e") as edge:
        ours, static = _compare(edge)
        with edge.stage.manager.client() as client:
            for number in range(_MANY):
                made = client.post("/api/v1/sandboxes?wait=true", json={"name": f"many-{number}", "memory_mib": 128})
                made.raise_for_status()
        ours_beside, static_beside = _compare(edge)
    return [
        Figure("edge_requests", ours, "requests/s", static, at_least(0.45)),
        Figure("edge_requests_1000", ours_beside / static_beside, "of a static one", ours / static, at_least(0.9)),
    ]


def _compare(edge: EdgeStage) -> tuple[float, float]:
    """Requests a second by (gateway, static upstream)."""
    ours: list[float] = []
    static: list[float] = []
    for _ in range(ROUNDS):
        ours.append(uvloop.run(_requests_per_second(edge, edge.caddy.port)))
        static.append(uvloop.run(_requests_per_second(edge, edge.static_port)))
    return median(ours), median(static)


async def _requests_per_second(edge: EdgeStage, port: int) -> float:
    context = ssl.create_default_context(cafile=str(edge.caddy.certificate))
    request = f"GET /x HTTP/1.1\r\nHost: {edge.host}:{edge.caddy.port}\r\nAccept: text/plain\r\n\r\n".encode()
    done = 0
    ends_at = 0.0

    async def visit(started: asyncio.Event) -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=edge.host)
        await started.wait()
        while time.perf_counter() < ends_at:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"a request failed: {head[:60]!r}")
            await reader.readexactly(100)
            done += 1
        writer.close()

    started = asyncio.Event()
    visits = [asyncio.create_task(visit(started)) for _ in range(_CONNECTIONS)]
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    ends_at = began + _ROUND_SECONDS
    started.set()
    await asyncio.gather(*visits)
    return done / (time.perf_counter() - began)

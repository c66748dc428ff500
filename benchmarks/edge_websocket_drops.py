"""``edge_websocket_drops``: how many of the WebSockets through the edge are lost while 200 sandboxes come and go."""

from __future__ import annotations

import contextlib

from tests.api.test_preview_carrying import web_socket_echo
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from benchmarks.edge_stage import EdgeStage, edge_stage
from benchmarks.figure import Figure, at_most
from benchmarks.stage import Stage

_SOCKETS = 20
_SANDBOXES = 200
_PORT = 8008


def measure(stage: Stage) -> list[Figure]:
    with edge_stage(stage.folder / "w") as edge:
        edge.stage.channels.servers[_PORT] = web_socket_echo
        sandbox = edge.stage.create()
        edge.stage.share(sandbox, _PORT)
        return [Figure("edge_websocket_drops", _count_drops(edge, sandbox), "WebSockets", None, at_most(0, "value"))]


def _count_drops(edge: EdgeStage, sandbox: str) -> int:
    host = f"{_PORT}-{sandbox}.{edge.host.partition('.')[2]}"
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(connect(f"ws://{host}:{edge.caddy.port}/", sock=edge.caddy.connect(host)))
            for _ in range(_SOCKETS)
        ]
        with edge.stage.manager.client() as client:
            for number in range(_SANDBOXES):
                made = client.post("/api/v1/sandboxes?wait=true", json={"memory_mib": 128}).raise_for_status().json()
                client.put(f"/api/v1/sandboxes/{made['id']}/ports/80", json={"visibility": "public"}).raise_for_status()
                client.delete(f"/api/v1/sandboxes/{made['id']}?wait=true").raise_for_status()
                each = opened[number % _SOCKETS]
                with contextlib.suppress(ConnectionClosed):
                    each.send(str(number))
        drops = 0
        for each in opened:
            try:
                each.send("last")
                while each.recv(timeout=30) != "last":
                    pass
            except (ConnectionClosed, TimeoutError):
                drops += 1
        return drops

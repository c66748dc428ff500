"""What a front proxy asks before every request for a preview (forward auth): may they enter, and where is it?

Called by ``Gate`` for one path, before all else: the request bears the host of the preview, and nobody's key. The answer is
204 with the gateway's socket and what it is to be told, or what the visitor is to be shown. Plain ASGI, for it is on the
way of every request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from atelier.model.preview import KEY_HEADER, PORT_HEADER, SANDBOX_HEADER, UPSTREAM_HEADER
from atelier.model.preview_visit import Answered, Visit
from atelier.services.preview_entry import PreviewEntry

EDGE_PATH = "/edge/authorise"

Message = MutableMapping[str, Any]


async def answer_edge(
    entry: PreviewEntry, upstream: str, scope: Message, send: Callable[[Message], Awaitable[None]]
) -> None:
    """``upstream``: the gateway's socket."""
    values: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        values.setdefault(name, []).append(value.decode("latin-1"))

    def value_of(name: str) -> str:
        return values.get(name.encode(), [""])[-1]

    decided = await entry.decide(
        Visit(
            host=value_of("host"),
            method=value_of("x-forwarded-method"),
            target=value_of("x-forwarded-uri"),
            # HTTP/2 sends each cookie by itself.
            cookies="; ".join(values.get(b"cookie", [])),
            origin=value_of("origin"),
            key=value_of(KEY_HEADER),
            accept=value_of("accept"),
            address=value_of("x-forwarded-for").rpartition(",")[2].strip(),
            is_upgrade=bool(value_of("x-atelier-upgrade")),
        )
    )
    if isinstance(decided, Answered):
        status, headers, body = decided.status, decided.headers, decided.body
    else:
        told = (SANDBOX_HEADER, decided.sandbox_id), (PORT_HEADER, str(decided.port))
        status, headers, body = 204, [(UPSTREAM_HEADER, upstream), *told], b""
    encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})

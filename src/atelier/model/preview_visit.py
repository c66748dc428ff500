"""A visit to a preview: what the manager is told of a request, and what it says to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Visit:
    """``host`` and ``origin`` as the browser sent them; ``target``: path and query. ``cookies``: a ``Cookie`` header that
    has at least those of the preview. ``key``: an API key, if one came. ``address``: the visitor's."""

    host: str
    method: str
    target: str
    cookies: str = ""
    origin: str = ""
    key: str = ""
    accept: str = ""
    address: str = ""
    is_upgrade: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """They may go on to this port."""

    sandbox_id: str
    port: int


@dataclass(frozen=True, slots=True)
class Answered:
    """They get this instead of the preview. ``headers`` say how long the body is."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

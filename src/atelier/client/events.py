"""Follows ``/api/v1/events`` (server-sent events) and goes on where it was after a break.

Called by the CLI's ``events`` and by programs. Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from atelier.client.calls import events_path
from atelier.client.connection import Connection
from atelier.client.errors import not_understood
from atelier.model.errors import AtelierError, TransientError
from atelier.schemas.events import Event

_OPERATION = "follow the events"
_EVENT_MAX_BYTES = 8 * 1024 * 1024
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    id: str
    kind: str
    data: str


class EventParser:
    """Feed it bytes; it yields whole events. Comments and events without data are passed over."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[str] = []
        self._size_bytes = 0
        self._kind = ""
        self._last_id = ""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if len(self._buffer) > _EVENT_MAX_BYTES:
            raise AtelierError("the manager sent an event beyond all bounds", code="unexpected_answer")
        for line in lines:
            event = self._take_line(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _take_line(self, line: str) -> ServerSentEvent | None:
        if not line:
            event = ServerSentEvent(self._last_id, self._kind, "\n".join(self._data)) if self._data else None
            self._data, self._kind, self._size_bytes = [], "", 0
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._size_bytes += len(value)
            if self._size_bytes > _EVENT_MAX_BYTES:
                raise AtelierError("the manager sent an event beyond all bounds", code="unexpected_answer")
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id" and "\0" not in value:
            self._last_id = value
        return None


def follow_events(
    connection: Connection, *, sandbox: str = "", last_event_id: str = "", reconnect: bool = True
) -> Generator[Event]:
    """Events as they happen, those behind ``last_event_id`` first if it is given. Never ends by itself.

    With ``reconnect`` a break (a manager that restarts) is bridged: it connects again and goes on behind the last
    event. ``sandbox`` is an id. Raises what cannot be mended by waiting: a wrong key, an unknown manager at the start.
    """
    attempt, connected_once = 0, False
    while True:
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        try:
            with connection.open_stream(_OPERATION, "GET", events_path(sandbox), headers=headers) as response:
                connected_once, attempt = True, 0
                parser = EventParser()
                for chunk in response.iter_bytes():
                    for event in parser.feed(chunk):
                        last_event_id = event.id or last_event_id
                        yield _read(event)
        except TransientError:
            if not (reconnect and connected_once):
                raise
        if not reconnect:
            return
        time.sleep(_PAUSES_SECONDS[min(attempt, len(_PAUSES_SECONDS) - 1)])
        attempt += 1


def _read(event: ServerSentEvent) -> Event:
    try:
        return Event.model_validate_json(event.data)
    except ValidationError as error:
        raise not_understood(_OPERATION, error) from error

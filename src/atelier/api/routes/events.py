"""The event stream: what happened to sandboxes and images, resumable after a break."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from atelier.api.authorisation import Caller
from atelier.api.parameters import services_of
from atelier.api.streams import server_sent_events
from atelier.model.errors import InvalidRequestError

router = APIRouter(tags=["events"])

_EVENT_ID = re.compile("[0-9]{1,18}")
"""As large as the database's numbers are."""


@router.get(
    "/events",
    operation_id="stream_events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
)
async def stream_events(
    request: Request,
    caller: Caller,
    sandbox: Annotated[str, Query(max_length=64, description="only events of this sandbox (its id)")] = "",
    last_event_id: Annotated[str, Header()] = "",
) -> StreamingResponse:
    """Follow events of the sandboxes that one may see. With `Last-Event-ID` the stream goes on behind that event; without, it begins now. Events are kept
    for seven days, and at most 100,000. Where some are missing, `stream.gap` stands in their place, with
    `first_lost_id`, `last_lost_id` and a `reason`: `trimmed`, or `unknown_id` if this manager never gave out the id that
    was sent (its database began anew, or is an older one brought back). List the sandboxes again then."""
    if last_event_id and not _EVENT_ID.fullmatch(last_event_id):
        raise InvalidRequestError(f"Last-Event-ID is {last_event_id[:40]!r}", hint="send the id of an event, a number")
    after = int(last_event_id) if last_event_id else None
    return server_sent_events(services_of(request).events.follow(after, sandbox, caller.viewer_id))

"""The way from a preview to the manager and back: here it is known who somebody is, there it is not.

Open to everybody: who is not signed in is sent to do that, and comes back.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from atelier.api.authentication import address_of
from atelier.api.parameters import services_of
from atelier.api.sign_in_pages import PAGE_HEADERS, send_to_sign_in
from atelier.model.errors import AccessDeniedError, NotFoundError
from atelier.model.preview_page import PreviewPage
from atelier.model.principal import Principal

router = APIRouter(include_in_schema=False)


@router.get("/previews/enter", operation_id="enter_preview")
async def enter_preview(
    request: Request,
    host: Annotated[str, Query(max_length=300)] = "",
    onward: Annotated[str, Query(alias="next", max_length=2100)] = "/",
) -> Response:
    """Hand somebody who is signed in over to a preview, by a code that is good once."""
    principal: Principal | None = request.state.principal
    services = services_of(request)
    if principal is None:
        return send_to_sign_in(request, f"/previews/enter?host={quote(host, safe='')}&next={quote(onward, safe='')}")
    try:
        found = services.preview_entry.find(host)
        if found is None:
            raise NotFoundError("there is no such sandbox", code="no_such_sandbox")
        named, port = found
        services.access.find_sandbox(principal, port.sandbox_id, as_owner=False)
    except (NotFoundError, AccessDeniedError):
        # Whether there is one that they may not see is not said.
        text = f"{host[:100]} leads to no sandbox that is yours or shared with {principal.name}."
        page = PreviewPage(403, "access_denied", "You cannot enter here", text, "Ask its owner to share it.")
        headers, body = page.render(request.headers.get("accept", ""))
        return HTMLResponse(body, page.status, dict(headers))
    services.audit.note(principal, "enter_preview", f"{port.sandbox_id}/{named.port}", 303, address_of(request.scope))
    url = services.previews.make_visit(principal, named.sandbox, named.port, onward)
    return RedirectResponse(url, status_code=303, headers=PAGE_HEADERS)

"""The page that shows a sandbox's terminals in a browser, and its files. Plain, and the same for every sandbox: which one
it shows, its script takes from its address, so nothing that anybody named stands in it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute

from atelier.api.authentication import no_key_sent
from atelier.api.parameters import SandboxReference, services_of
from atelier.api.sign_in_pages import send_to_sign_in
from atelier.model.errors import NotFoundError

_OWN: Final = {"terminal.js": "text/javascript", "terminal.css": "text/css"}
_TYPES: Final = {"js": "text/javascript", "css": "text/css"}
_HEADERS: Final = {
    # xterm.js writes style sheets of its own as it runs; no script is taken but those of this origin.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


class _SignedInRoute(APIRoute):
    """Nobody comes further who is not known: a browser goes to sign in, and comes back."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        show = super().get_route_handler()

        async def shown(request: Request) -> Response:
            if request.state.principal is not None:
                return await show(request)
            if "text/html" not in request.headers.get("accept", ""):
                raise no_key_sent()
            return send_to_sign_in(request, request.scope["path"])

        return shown


router = APIRouter(include_in_schema=False, route_class=_SignedInRoute)


@router.get("/sandboxes/{sandbox}/terminal", operation_id="show_terminal_page")
async def show_terminal_page(request: Request, sandbox: SandboxReference) -> Response:
    """Raises MissingPackageError when its scripts cannot be had."""
    await services_of(request).web_files.read("xterm.js")
    return HTMLResponse(_own("terminal.html"), headers=_HEADERS)


@router.get("/terminal-assets/{name}", operation_id="get_terminal_asset")
async def get_terminal_asset(request: Request, name: str) -> Response:
    content = _own(name) if name in _OWN else await services_of(request).web_files.read(name)
    if content is None:
        raise NotFoundError(f"there is no {name!r} here", code="asset_not_found")
    media_type = _TYPES.get(name.rpartition(".")[2], "application/octet-stream")
    headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=media_type, headers=headers)


def _own(name: str) -> bytes:
    return (files("atelier.api") / "pages" / name).read_bytes()

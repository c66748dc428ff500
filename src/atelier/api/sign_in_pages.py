"""The pages by which people sign in and out: plain HTML, no script, nothing from elsewhere.

Open to everybody; whoever posts a form must have got it here, which the Origin says.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from atelier.api.authentication import PAGES, address_of, session_cookie
from atelier.api.errors import status_of
from atelier.api.parameters import services_of
from atelier.model.errors import AccessDeniedError, AtelierError, IdentityProviderError, RateLimitedError
from atelier.model.principal import Principal, User

logger = logging.getLogger(__name__)

_ATTEMPT_SECONDS = 600
_SESSION_SECONDS = 14 * 86400
_PREVIEW = "/previews/enter?host="
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    # Not "no-referrer": browsers would then send "Origin: null" with our own forms.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Atelier</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto 0; max-width: 22rem; padding: 0 1rem; color: #222;
background: #fafafa; }}
h1 {{ font-size: 1.3rem; }}
button {{ font: inherit; width: 100%; padding: .6rem; margin: .3rem 0; border: 1px solid #999; border-radius: .4rem;
background: #fff; color: inherit; cursor: pointer; }}
code {{ color: #666; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #1b1b1b; color: #ddd; }} button {{ background: #2b2b2b; }} }}
</style></head>
<body><h1>{title}</h1>
{content}
</body></html>
"""


def _page(title: str, content: str, status: int = 200) -> HTMLResponse:
    """``content`` is HTML; ``title`` is text."""
    return HTMLResponse(
        _PAGE.format(title=html.escape(title), content=content), status_code=status, headers=PAGE_HEADERS
    )


class _PageRoute(APIRoute):
    """Answers errors with a page, and their stable code on it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        show = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await show(request)
            except AtelierError as error:
                return _describe(error)

        return shown


def _describe(error: AtelierError) -> Response:
    if isinstance(error, IdentityProviderError):
        logger.warning("sign-in: %s", error.message)
    content = (
        f"<p>{html.escape(error.message)}</p><p>{html.escape(error.hint)}</p>"
        f'<p><code>{html.escape(error.code)}</code></p><p><a href="/sign-in">Back</a></p>'
    )
    page = _page("This did not work", content, status_of(error))
    if isinstance(error, RateLimitedError):
        page.headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
    return page


router = APIRouter(include_in_schema=False, route_class=_PageRoute)


@router.get("/sign-in", operation_id="show_sign_in")
async def show_sign_in(request: Request) -> Response:
    principal: Principal | None = request.state.principal
    if principal is not None:
        return _page(
            "Signed in",
            f"<p>You are signed in as {html.escape(principal.name)} ({principal.role}).</p>"
            '<form method="post" action="/sign-out"><button>Sign out</button></form>',
        )
    forms = "".join(
        f'<form method="post" action="/sign-in/{html.escape(name)}">'
        f"<button>Sign in with {html.escape(provider.title)}</button></form>"
        for name, provider in services_of(request).sign_in.providers.items()
    )
    none = "<p>No identity provider is set up yet. The first admin signs in with the link that <code>atelier up</code> "
    return _page("Sign in to Atelier", forms or f"{none}has printed.</p>")


@router.get("/sign-in/first-run", operation_id="show_first_run")
async def show_first_run(request: Request, secret: Annotated[str, Query(max_length=100)] = "") -> Response:
    """A page of its own, so that whoever only looks at the link, as mail and chat programs do, does not use it up."""
    return _page(
        "Welcome to Atelier",
        "<p>This makes you the first admin in this browser. The link works once.</p>"
        '<form method="post" action="/sign-in/first-run">'
        f'<input type="hidden" name="secret" value="{html.escape(secret)}"><button>Go on</button></form>',
    )


@router.post("/sign-in/first-run", operation_id="use_first_run")
async def use_first_run(request: Request, secret: Annotated[str, Form(max_length=100)] = "") -> Response:
    _check_form(request)
    user, token = await services_of(request).sign_in.use_first_link(secret, address_of(request.scope))
    return _welcome(request, user, token, "first-run link")


@router.post("/sign-in/{provider}", operation_id="begin_sign_in")
async def begin_sign_in(request: Request, provider: str) -> Response:
    _check_form(request)
    url, browser = await services_of(request).sign_in.begin(provider, _public_url(request))
    response = RedirectResponse(url, status_code=303, headers=PAGE_HEADERS)
    _set_cookie(request, response, _attempt_cookie(request), browser, _ATTEMPT_SECONDS)
    return response


@router.get("/sign-in/{provider}/callback", operation_id="finish_sign_in")
async def finish_sign_in(
    request: Request,
    provider: str,
    state: Annotated[str, Query(max_length=200)] = "",
    code: Annotated[str, Query(max_length=4096)] = "",
) -> Response:
    services_of(request).rate_limits.take_sign_in(address_of(request.scope))
    browser = request.cookies.get(_attempt_cookie(request), "")
    user, token = await services_of(request).sign_in.finish(provider, state, code, browser, address_of(request.scope))
    response = _welcome(request, user, token, provider)
    response.delete_cookie(_attempt_cookie(request), secure=_is_secure(request), httponly=True, samesite="lax")
    return response


@router.post("/sign-out", operation_id="sign_out")
async def sign_out(request: Request) -> Response:
    _check_origin(request)
    principal: Principal | None = request.state.principal
    if principal is not None and principal.session_id:
        await services_of(request).accounts.revoke_session(principal, principal.session_id)
        services_of(request).audit.note(principal, "sign_out", "", 303, address_of(request.scope))
    response = RedirectResponse("/sign-in", status_code=303, headers=PAGE_HEADERS)
    response.delete_cookie(session_cookie(_public_url(request)), secure=_is_secure(request), httponly=True)
    return response


def _welcome(request: Request, user: User, token: str, through: str) -> Response:
    who = Principal(user.id, user.name, user.role, frozenset())
    services_of(request).audit.note(who, "sign_in", "", 303, address_of(request.scope), through=through)
    # Where they came from, if that was a page of ours or a preview.
    onward = request.cookies.get(_return_cookie(request), "").strip('"')
    to = onward if onward.startswith(_PREVIEW) or PAGES.fullmatch(onward) else "/sign-in"
    response = RedirectResponse(to, status_code=303, headers=PAGE_HEADERS)
    _set_cookie(request, response, session_cookie(_public_url(request)), token, _SESSION_SECONDS)
    response.delete_cookie(_return_cookie(request), secure=_is_secure(request), httponly=True, samesite="lax")
    return response


def send_to_sign_in(request: Request, path: str) -> Response:
    """With a cookie that says where somebody is to go afterwards; only pages and previews are gone to."""
    response = RedirectResponse("/sign-in", status_code=303, headers=PAGE_HEADERS)
    _set_cookie(request, response, _return_cookie(request), path, _ATTEMPT_SECONDS)
    return response


def _check_form(request: Request) -> None:
    _check_origin(request)
    services_of(request).rate_limits.take_sign_in(address_of(request.scope))


def _check_origin(request: Request) -> None:
    """That it is the right one, the gate has seen to."""
    if "origin" not in request.headers:
        raise AccessDeniedError("this form was not sent from its page", code="wrong_origin", hint="begin at /sign-in")


def _public_url(request: Request) -> str:
    return str(request.app.state.public_url)


def _is_secure(request: Request) -> bool:
    return _public_url(request).startswith("https://")


def _attempt_cookie(request: Request) -> str:
    return session_cookie(_public_url(request)) + "_attempt"


def _return_cookie(request: Request) -> str:
    return session_cookie(_public_url(request)) + "_return"


def _set_cookie(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    response.set_cookie(
        name, value, max_age=seconds, path="/", secure=_is_secure(request), httponly=True, samesite="lax"
    )

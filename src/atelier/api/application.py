"""Puts the application together: routes, error form, gate, documentation page."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

import atelier
from atelier.api import errors, preview_pages, sign_in_pages, terminal_page
from atelier.api.authentication import Application, Gate
from atelier.api.authorisation import authorise
from atelier.api.routes import (
    accounts,
    audit,
    events,
    host,
    images,
    metrics,
    networks,
    previews,
    processes,
    sandboxes,
    shares,
    snapshots,
    ssh,
    terminal_sessions,
    terminals,
    warm_pools,
)
from atelier.api.routes import files as file_routes
from atelier.api.services import Services
from atelier.schemas.errors import ErrorBody
from atelier.schemas.health import Health

API_PREFIX = "/api/v1"
_DESCRIPTION = """Self-hosted microVM sandboxes. Every route but `/health` and this page wants
`Authorization: Bearer <key>` or `X-API-Key: <key>`. What somebody may not see does not exist for them. Errors always have the form `{code, message, hint}`."""


def describe_api(health: Health | None = None) -> FastAPI:
    """The routes without anything behind them: enough for the OpenAPI document. ``health``: what ``/health`` says."""
    said = health or Health(status="ok", version=atelier.__version__, mode="")
    app = FastAPI(
        title="Atelier",
        version=atelier.__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    errors.install(app)
    api = APIRouter()
    for module in (
        sandboxes,
        shares,
        snapshots,
        warm_pools,
        networks,
        previews,
        processes,
        terminals,
        terminal_sessions,
        file_routes,
        images,
        events,
        host,
        accounts,
        ssh,
        audit,
    ):
        api.include_router(module.router)
    # The prefix is said here and not above: without one all routes would be built once more, to be looked at.
    app.include_router(api, prefix=API_PREFIX, dependencies=[Depends(authorise)])
    # Where monitoring systems look for it by themselves.
    app.include_router(metrics.router, dependencies=[Depends(authorise)])

    @app.get("/health", operation_id="get_health", tags=["health"])
    async def get_health() -> Health:
        """Whether the manager answers, and which one it is."""
        return said

    return app


def create_application(services: Services, public_url: str, host_names: frozenset[str] = frozenset()) -> Application:
    """The ASGI application; for ``public_url`` and ``host_names`` see ``Gate``."""
    app = describe_api(services.health)
    app.state.services = services
    app.state.public_url = public_url
    app.include_router(sign_in_pages.router)
    app.include_router(preview_pages.router)
    app.include_router(terminal_page.router, dependencies=[Depends(authorise)])

    # The page's scripts come from a package, not from somebody's content network: it works with no internet, and
    # nobody else learns who reads it.
    app.mount("/docs/assets", StaticFiles(directory=str(files("fastapi_offline") / "static")))

    @app.get("/docs", include_in_schema=False)
    async def show_documentation() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Atelier API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
        )

    return Gate(app, services, public_url, host_names)

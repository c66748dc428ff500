"""Ports of a sandbox, where they are visited with a browser, and by whom."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from atelier.api.authorisation import Caller
from atelier.api.parameters import SandboxReference, services_of
from atelier.model.preview import parse_port, tool_of
from atelier.schemas.previews import (
    Port,
    PortList,
    PreviewLink,
    PreviewLinkRequest,
    PreviewVisit,
    PreviewVisitRequest,
    SetVisibilityRequest,
)
from atelier.services.previews import PreviewPort

router = APIRouter(prefix="/sandboxes/{sandbox}/ports", tags=["previews"])

PortReference = Annotated[str, Path(description="a number, or `vscode`, `agent`, `browser`", max_length=20)]


@router.get("", operation_id="list_ports")
async def list_ports(request: Request, sandbox: SandboxReference) -> PortList:
    """Ports on which something listens, and those that are shared, with the addresses of their previews."""
    found = await services_of(request).previews.list_ports(sandbox)
    return PortList(items=[_port(each) for each in found])


@router.get("/{port}", operation_id="get_port")
async def get_port(request: Request, sandbox: SandboxReference, port: PortReference) -> Port:
    """Where one port is visited and by whom; whether anything listens there is not looked at."""
    return _port(services_of(request).previews.get_port(sandbox, parse_port(port)))


@router.put("/{port}", operation_id="set_port_visibility")
async def set_port_visibility(
    request: Request, sandbox: SandboxReference, port: PortReference, body: SetVisibilityRequest
) -> Port:
    """Say who may visit a port. What becomes `private` has no links any more."""
    return _port(await services_of(request).previews.set_visibility(sandbox, parse_port(port), body.visibility))


@router.post("/{port}/links", operation_id="make_preview_link", status_code=201)
async def make_preview_link(
    request: Request, sandbox: SandboxReference, port: PortReference, body: PreviewLinkRequest
) -> PreviewLink:
    """Make a link by which whoever has it may visit the port, until it expires or the port is made private."""
    made = await services_of(request).previews.make_link(sandbox, parse_port(port), body.expires_in_seconds)
    return PreviewLink(url=made.url, expires_at=made.expires_at)


@router.post("/{port}/visits", operation_id="make_preview_visit", status_code=201)
async def make_preview_visit(
    request: Request, caller: Caller, sandbox: SandboxReference, port: PortReference, body: PreviewVisitRequest
) -> PreviewVisit:
    """Make an address by which a browser that nobody has signed in with enters as you: good once, for a minute."""
    url = services_of(request).previews.make_visit(caller, sandbox, parse_port(port), body.path)
    return PreviewVisit(url=url)


def _port(row: PreviewPort) -> Port:
    sharing = row.sharing
    return Port(
        port=sharing.port,
        tool=tool_of(sharing.port),
        is_open=row.is_open,
        visibility=sharing.visibility,
        url=row.url or None,
    )

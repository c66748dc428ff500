"""The routes of ports and previews: what is sent, and how the answer is read. Without I/O."""

from __future__ import annotations

from atelier.client.addresses import encode_segment
from atelier.client.call import Call, make_body, read_model, sandbox_path
from atelier.model.preview import Visibility
from atelier.schemas.previews import (
    Port,
    PortList,
    PreviewLink,
    PreviewLinkRequest,
    PreviewVisit,
    PreviewVisitRequest,
    SetVisibilityRequest,
)


def _port_path(sandbox: str, port: str, below: str = "") -> str:
    return sandbox_path(sandbox, f"/ports/{encode_segment(port, 'port')}{below}")


def list_ports(sandbox: str) -> Call[PortList]:
    operation = f"list the ports of {sandbox}"
    return Call(operation, "GET", sandbox_path(sandbox, "/ports"), read_model(PortList, operation), repeatable=True)


def set_port_visibility(sandbox: str, port: str, visibility: Visibility) -> Call[Port]:
    operation = f"say who may visit port {port} of {sandbox}"
    body = make_body(SetVisibilityRequest, operation, visibility=visibility)
    return Call(operation, "PUT", _port_path(sandbox, port), read_model(Port, operation), body)


def make_preview_link(sandbox: str, port: str, expires_in_seconds: int) -> Call[PreviewLink]:
    operation = f"make a link to port {port} of {sandbox}"
    body = make_body(PreviewLinkRequest, operation, expires_in_seconds=expires_in_seconds)
    return Call(operation, "POST", _port_path(sandbox, port, "/links"), read_model(PreviewLink, operation), body)


def make_preview_visit(sandbox: str, port: str, path: str) -> Call[PreviewVisit]:
    operation = f"open port {port} of {sandbox}"
    body = make_body(PreviewVisitRequest, operation, path=path)
    return Call(operation, "POST", _port_path(sandbox, port, "/visits"), read_model(PreviewVisit, operation), body)


def get_port(sandbox: str, port: str) -> Call[Port]:
    operation = f"find the address of port {port} of {sandbox}"
    return Call(operation, "GET", _port_path(sandbox, port), read_model(Port, operation), repeatable=True)

"""What changes in a message on its way between a visitor and a sandbox: whatever is Atelier's own, or only a proxy may say.

Used by ``preview_exchange``. Without I/O.
"""

from __future__ import annotations

from typing import Final

from atelier.gateway.http_head import Header, RequestHead
from atelier.model.preview import KEY_HEADER, OWN_COOKIES, OWN_HEADERS
from atelier.model.preview_visit import Visit

_OWN: Final = OWN_HEADERS.encode()
_FORWARDED: Final = b"x-forwarded-"
_FORGED: Final = frozenset({b"forwarded", b"x-real-ip", b"x-original-url", b"x-rewrite-url"})
_NOT_A_SANDBOXS: Final = frozenset({b"clear-site-data"})
"""It would sign people out of the manager, which is of the same site."""


def describe_visit(head: RequestHead, address: str, *, is_asked_about: bool) -> Visit:
    """What the manager is told of a request. Of the cookies only our own: the others are no business of its. Where it is
    not asked, what a page needs is enough."""
    if not is_asked_about:
        accept = _text(b",".join(head.values(b"accept")))
        return Visit(_text(head.host), _text(head.method), _text(head.target), accept=accept)
    pairs = (pair.strip() for value in head.values(b"cookie") for pair in _text(value).split(";"))
    return Visit(
        host=_text(head.host),
        method=_text(head.method),
        target=_text(head.target),
        cookies="; ".join(pair for pair in pairs if _is_own(pair)),
        origin=_text(b"".join(head.values(b"origin"))),
        key=_text(b"".join(head.values(KEY_HEADER.encode()))),
        accept=_text(b",".join(head.values(b"accept"))),
        address=address,
        is_upgrade=head.is_web_socket,
    )


def for_sandbox(head: RequestHead, address: str, *, behind_proxy: bool) -> list[Header]:
    """The request's headers as the sandbox sees them. ``behind_proxy``: what it says of the visitor is true."""
    headers: list[Header] = []
    for header in head.headers:
        name, _, value = header
        if name == b"cookie":
            kept = [pair.strip() for pair in _text(value).split(";") if not _is_own(pair.strip())]
            if kept:
                headers.append((name, header[1], "; ".join(kept).encode("latin-1")))
        elif name.startswith(_OWN) or name in _FORGED or (name.startswith(_FORWARDED) and not behind_proxy):
            continue
        else:
            headers.append(header)
    if not behind_proxy:
        for name, value in (
            (b"X-Forwarded-For", address.encode()),
            (b"X-Forwarded-Host", head.host),
            (b"X-Forwarded-Proto", b"http"),
        ):
            headers.append((name.lower(), name, value))
    return headers


def for_visitor(headers: list[Header]) -> list[Header]:
    """The answer's headers as the visitor sees them: a sandbox sets no cookie of ours, and says nothing in our name."""
    return [
        header
        for header in headers
        if not (header[0] == b"set-cookie" and _is_own(_text(header[2])))
        and not header[0].startswith(_OWN)
        and header[0] not in _NOT_A_SANDBOXS
    ]


def _is_own(pair: str) -> bool:
    return pair.partition("=")[0].strip().lower() in OWN_COOKIES


def _text(value: bytes) -> str:
    return value.decode("latin-1")

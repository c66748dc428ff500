"""Previews: the addresses under which ports of sandboxes are reached with a browser, and who may.

``<port>-<sandbox>.<domain>``, or a tool's name instead of the port. What stands here is the same for the manager, which
decides, and for the gateway, which carries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from atelier.model.errors import InvalidRequestError
from atelier.model.ids import NAME_MAX_LENGTH

TOOL_PORTS: Final = {"vscode": 8080, "agent": 4096, "browser": 6080}
"""Names that stand for a port: code-server, opencode, and a browser's screen (noVNC)."""
_TOOL_OF_PORT: Final = {port: name for name, port in TOOL_PORTS.items()}

MIN_PORT, MAX_PORT = 1, 65535
LOCAL_DOMAIN: Final = "atelier.localhost"
"""Where the gateway serves by itself; browsers take every name below ``localhost`` for this machine."""

OWN_PATHS: Final = "/.atelier/"
"""Paths of every preview that are Atelier's own, and never reach a sandbox."""
ENTER_PATH: Final = f"{OWN_PATHS}enter"
START_PATH: Final = f"{OWN_PATHS}start"
KEY_HEADER: Final = "x-atelier-key"
"""The API key of a program that visits: ``Authorization`` is the sandbox's own."""
OWN_HEADERS: Final = "x-atelier-"
"""How headers begin that only Atelier says. What a visitor sends of them reaches nobody."""

_COOKIE: Final = "atelier-preview"
OWN_COOKIES: Final = frozenset(
    prefix + name for prefix in ("", "__host-") for name in (_COOKIE, "atelier", "atelier_session")
) | {name + suffix for name in ("__host-atelier", "atelier_session") for suffix in ("_attempt", "_return")}
"""Lower case. Neither does a sandbox see them, nor can its answers set them."""

_LABEL: Final = re.compile(r"([a-z]+|[1-9][0-9]{0,4})-([a-z0-9](?:[a-z0-9-]*[a-z0-9])?)")


class Visibility(StrEnum):
    """Who may visit a port. ``private``: who may use the sandbox; ``link``: they, and who has a link that was made for it;
    ``public``: everybody."""

    PRIVATE = "private"
    LINK = "link"
    PUBLIC = "public"


@dataclass(frozen=True, slots=True)
class PortSharing:
    """Who may visit one port. ``generation``: of its links; those of an earlier one are worth nothing."""

    port: int
    visibility: Visibility = Visibility.PRIVATE
    generation: int = 0


@dataclass(frozen=True, slots=True)
class PreviewHost:
    """What a host name says. ``sandbox``: an id or a name, of which nobody has said yet that it exists."""

    port: int
    sandbox: str


@dataclass(frozen=True, slots=True)
class PreviewSite:
    """Where previews are: ``domain`` lower case, ``port`` None where it is the scheme's own. ``problem``: why they are
    not served; then the rest may be empty."""

    scheme: str
    domain: str
    port: int | None
    problem: str = ""

    def host(self, sandbox: str, port: int) -> str:
        """The name and port of a preview, as browsers send it."""
        name = f"{_TOOL_OF_PORT.get(port, port)}-{sandbox}.{self.domain}"
        return name if self.port is None else f"{name}:{self.port}"

    def url(self, sandbox: str, port: int) -> str:
        """Empty where previews are not served."""
        return "" if self.problem else f"{self.scheme}://{self.host(sandbox, port)}"

    @property
    def cookie(self) -> str:
        """The preview's own cookie. With TLS one that no sibling, and no page without TLS, can set."""
        return f"__Host-{_COOKIE}" if self.scheme == "https" else _COOKIE

    def parse_host(self, host: str) -> PreviewHost | None:
        """What the ``Host`` of a request says; None for whatever is no preview."""
        name, separator, port = host.lower().partition(":")
        label, dot, domain = name.partition(".")
        if not dot or domain != self.domain or (separator and not port.isascii()):
            return None
        found = _LABEL.fullmatch(label)
        if found is None or len(found[2]) > NAME_MAX_LENGTH:
            return None
        number = TOOL_PORTS.get(found[1]) if found[1].isalpha() else int(found[1])
        return PreviewHost(number, found[2]) if number is not None and number <= MAX_PORT else None


def tool_of(port: int) -> str | None:
    return _TOOL_OF_PORT.get(port)


def parse_port(text: str) -> int:
    """A number or a tool's name. Raises InvalidRequestError (``invalid_port``)."""
    port = TOOL_PORTS.get(text) or (int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0)
    if not MIN_PORT <= port <= MAX_PORT:
        raise InvalidRequestError(
            f"{text[:20]!r} is no port",
            code="invalid_port",
            hint=f"give a number from {MIN_PORT} to {MAX_PORT}, or one of {', '.join(TOOL_PORTS)}",
        )
    return port


def read_cookies(header: str, name: str) -> list[str]:
    """All values of one name, in order: a sibling may have set another of the same name beside ours."""
    pairs = (pair.strip().partition("=") for pair in header.split(";"))
    return [value for key, _, value in pairs if key == name]

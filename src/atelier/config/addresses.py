"""Addresses to listen at."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from atelier.config.errors import InvalidSettingError


@dataclass(frozen=True, slots=True)
class ListenAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the manager."""
        unspecified = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        host = unspecified.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{self.port}"


def parse_listen(text: str, variable: str = "ATELIER_LISTEN") -> ListenAddress:
    """``HOST:PORT`` with an address, ``localhost`` or ``[v6]``; port 0 lets the kernel choose."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        number = -1
    if not separator or not 0 <= number <= 65535:
        raise InvalidSettingError(
            variable,
            text,
            hint="write ADDRESS:PORT, as 127.0.0.1:7420 or [::1]:7420",
        )
    return ListenAddress(host, number)

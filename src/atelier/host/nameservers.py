"""Which nameservers this machine asks. Source: resolv.conf(5)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

RESOLV_CONF = Path("/etc/resolv.conf")

_MAX_COUNT = 3
"""What resolv.conf(5) reads, MAXNS."""
_DEFAULT = (IPv4Address("127.0.0.1"),)


class NameserverFile:
    """``current`` is as new as the file, which programs replace while this one runs (DHCP, a VPN)."""

    def __init__(self, path: Path = RESOLV_CONF) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._nameservers: tuple[IPv4Address | IPv6Address, ...] = _DEFAULT

    def current(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """In the order in which they are to be asked; where the file names none, or is none, this machine itself. One
        with an interface's name behind its address (``fe80::1%eth0``) is left out."""
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._nameservers = _read(self._path.read_text(errors="replace")) or _DEFAULT
                self._seen = seen
        except OSError:
            self._nameservers, self._seen = _DEFAULT, None
        return self._nameservers


def _read(text: str) -> tuple[IPv4Address | IPv6Address, ...]:
    found: list[IPv4Address | IPv6Address] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            address = ip_address(words[1])
        except ValueError:
            continue
        if not (isinstance(address, IPv6Address) and address.scope_id):
            found.append(_DEFAULT[0] if address.is_unspecified else address)
    return tuple(found[:_MAX_COUNT])

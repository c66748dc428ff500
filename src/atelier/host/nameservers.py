"""Which nameserver this machine asks, as far as others may ask it too. Source: resolv.conf(5)."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second is systemd-resolved's, with those behind its own on loopback."""


def find_nameserver(files: tuple[Path, ...] = _FILES) -> IPv4Address | None:
    """The first with an IPv4 address that is not loopback; None if there is none."""
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) < 2 or words[0] != "nameserver":
                continue
            try:
                address = IPv4Address(words[1])
            except AddressValueError:
                continue
            if not address.is_loopback and not address.is_unspecified:
                return address
    return None

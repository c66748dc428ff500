"""Addresses that follow from a sandbox's id, so that nobody has to remember them."""

from __future__ import annotations

import hashlib

_LOCAL_UNICAST = 0b10


def mac_address_of(sandbox_id: str) -> str:
    """A locally administered unicast MAC address, the same each time. Source: IEEE 802-2014, 8.2.2."""
    octets = bytearray(hashlib.sha256(b"mac " + sandbox_id.encode()).digest()[:6])
    octets[0] = (octets[0] & 0b1111_1100) | _LOCAL_UNICAST
    return octets.hex(":")

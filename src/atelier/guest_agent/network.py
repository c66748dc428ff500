"""Sets the guest's network card as the host says: hardware address, IPv4 address, default route, name server.

Called by ``control`` on ``/init`` only, inside a guest, as root. Plain ioctls: spawning ``ip`` costs a hundred times as
much under software emulation. Source: netdevice(7), ip(7), Linux include/uapi/linux/route.h.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any, Final

from atelier.guest_protocol.connect import ConnectError

RESOLV_CONF: Final = "/etc/resolv.conf"

CARDS: Final = "/sys/class/net"
_ROUTES: Final = "/proc/net/route"
_ARPHRD_ETHER: Final = "1"
_SIOCADDRT: Final = 0x890B
_SIOCDELRT: Final = 0x890C
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFHWADDR: Final = 0x8924
_SIOCGIFHWADDR: Final = 0x8927
_IFF_UP: Final = 1
_RTF_UP: Final = 1
_RTF_GATEWAY: Final = 2


class NetworkSettings:
    """A checked ``network`` object of ``/init``."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.address = _ipv4(fields, "address")
        self.gateway = _ipv4(fields, "gateway")
        self.nameserver = _ipv4(fields, "nameserver")
        prefix: object = fields.get("prefixLength")
        if not isinstance(prefix, int) or isinstance(prefix, bool) or not 1 <= prefix <= 32:
            raise ConnectError("invalid_argument", "network: prefixLength must be 1 to 32")
        self.prefix_length = prefix


def parse_mac_address(text: str) -> bytes:
    """Six octets. Raises ConnectError for what no card can have."""
    try:
        octets = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        octets = b""
    if len(octets) != 6 or octets[0] & 1 or not any(octets):
        raise ConnectError("invalid_argument", "macAddress must be six octets in hexadecimal, of one card")
    return octets


def apply(settings: NetworkSettings | None, mac_address: bytes | None) -> None:
    """Make the machine's Ethernet card what the two say; None: it keeps what it has. Twice is once."""
    card = _find_card()
    if card is None:
        raise ConnectError("failed_precondition", "the guest has no network card")
    name = card.encode().ljust(16, b"\0")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
            if mac_address is not None:
                _set_mac_address(door, name, mac_address)
            if settings is not None:
                _set_card(door, name, settings)
                _write_resolver(settings.nameserver)
    except OSError as error:
        raise ConnectError("internal", f"cannot set the network card: {error.strerror or error}") from None


def _set_mac_address(door: socket.socket, name: bytes, mac_address: bytes) -> None:
    from fcntl import ioctl

    if ioctl(door, _SIOCGIFHWADDR, name + bytes(24))[18:24] == mac_address:
        return  # so that the connections of a machine that is resumed live on
    flags = _flags(door, name)
    # Down: many a card takes no other address while it is up, and all that was learned under the old one goes.
    ioctl(door, _SIOCSIFFLAGS, name + struct.pack("H22x", flags & ~_IFF_UP))
    ioctl(door, _SIOCSIFHWADDR, name + struct.pack("H", int(_ARPHRD_ETHER)) + mac_address.ljust(22, b"\0"))
    ioctl(door, _SIOCSIFFLAGS, name + struct.pack("H22x", flags))


def _flags(door: socket.socket, name: bytes) -> int:
    from fcntl import ioctl

    (flags,) = struct.unpack_from("H", ioctl(door, _SIOCGIFFLAGS, name + bytes(24)), 16)
    return flags


def _set_card(door: socket.socket, name: bytes, settings: NetworkSettings) -> None:
    from fcntl import ioctl

    flags = _flags(door, name)
    ioctl(door, _SIOCSIFADDR, name + _socket_address(settings.address) + bytes(8))
    mask = (0xFFFFFFFF << (32 - settings.prefix_length)) & 0xFFFFFFFF
    ioctl(door, _SIOCSIFNETMASK, name + _socket_address(mask.to_bytes(4, "big")) + bytes(8))
    ioctl(door, _SIOCSIFFLAGS, name + struct.pack("H22x", flags | _IFF_UP))
    present = _default_gateways(name)
    for gateway in present - {settings.gateway}:
        ioctl(door, _SIOCDELRT, _default_route(gateway))
    if settings.gateway not in present:
        ioctl(door, _SIOCADDRT, _default_route(settings.gateway))


def _default_route(gateway: bytes) -> bytes:
    """struct rtentry: pad, destination, gateway, mask, flags, and fields that are all zero here."""
    nowhere = _socket_address(bytes(4))
    route = struct.pack("L", 0) + nowhere + _socket_address(gateway) + nowhere
    return (route + struct.pack("H", _RTF_UP | _RTF_GATEWAY)).ljust(120, b"\0")


def _default_gateways(name: bytes) -> set[bytes]:
    """Of this card. Source: Linux net/ipv4/fib_trie.c, fib_route_seq_show."""
    card = name.rstrip(b"\0").decode()
    with open(_ROUTES, encoding="ascii") as lines:
        rows = [line.split() for line in lines]
    nowhere = "00000000"
    return {
        bytes.fromhex(row[2])[::-1]
        for row in rows
        if row[0] == card and (row[1], row[7]) == (nowhere, nowhere) and row[2] != nowhere
    }


def _socket_address(address: bytes) -> bytes:
    return struct.pack("HH", socket.AF_INET, 0) + address + bytes(8)


def _find_card() -> str | None:
    """The first that is the machine's. The guest's users make others: docker0 comes before eth0, and so does dummy0."""
    for name in sorted(os.listdir(CARDS)):
        card = Path(CARDS, name)
        try:
            kind = (card / "type").read_text().strip()
        except OSError:
            continue
        # Only what a driver has found has a device. Source: Linux Documentation/ABI/testing/sysfs-class-net.
        if kind == _ARPHRD_ETHER and (card / "device").exists():
            return name
    return None


def _write_resolver(nameserver: bytes) -> None:
    """A link belongs to a resolver of the image's own (systemd-resolved, resolvconf), which is left alone."""
    if not os.path.islink(RESOLV_CONF):
        Path(RESOLV_CONF).write_text(f"nameserver {socket.inet_ntoa(nameserver)}\n")


def _ipv4(fields: dict[str, Any], name: str) -> bytes:
    try:
        return socket.inet_pton(socket.AF_INET, str(fields.get(name)))
    except OSError:
        raise ConnectError("invalid_argument", f"network: {name} must be an IPv4 address") from None

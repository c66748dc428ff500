"""Links, bridge ports, addresses and routes of one network namespace, by the kernel's own messages (rtnetlink).

Used by the network holder and the checks of the host. A socket belongs to the namespace in which it was opened, wherever
its process goes later. Starting ``ip`` would cost 3 to 9 ms for each of the steps that take 0.1 ms here.
Source: rtnetlink(7), linux/if_link.h, linux/if_bridge.h, linux/neighbour.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from atelier.model.errors import HostError

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 20, 22, 24, 26
_NEWNEIGH, _GETNEIGH, _GETNETCONF = 28, 30, 82
_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE, DUMP = 0x1, 0x4, 0x100, 0x200, 0x400, 0x300
_ROUTES = 0
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_ATTRIBUTE = struct.Struct("=HH")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_PROTINFO, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD = (
    1, 3, 10, 12, 18, 20, 28,
)  # fmt: skip
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFLA_QDISC, _IFLA_STATS64, _IFLA_GROUP = 6, 23, 27
_BRIDGE_MCAST_SNOOPING = 23
_PORT_LEARNING, _PORT_UNICAST_FLOOD, _PORT_ISOLATED = 8, 9, 33
_UP = 1
_AF_BRIDGE = 7
_PORT_HEADER = struct.pack("=BxHiII", _AF_BRIDGE, 0, 0, 0, 0)
_CLOSED_PORT = {_PORT_ISOLATED: b"\1", _PORT_LEARNING: b"\0", _PORT_UNICAST_FLOOD: b"\0"}
_NTF_MASTER, _NUD_NOARP, _NDA_LLADDR = 4, 0x40, 2
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_TABLE_LOCAL = 255
_UNICAST, _LOCAL = 1, 2
_ALL_INTERFACES = -1
_IPV4_ADDRESSES, _IPV4_ROUTES = 0x10, 0x40
_NETCONF_IFINDEX, _NETCONF_FORWARDING = 1, 2


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    kind: str
    """``bridge``, ``veth``, ``tun``; empty for a real card."""
    alias: str
    mac_address: str
    master: int
    group: int
    up: bool
    queue: str
    """The queueing discipline of what is sent to it: ``noqueue``, ``tbf``, ..."""


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """As the host sees it: what a TAP has received was sent by the guest."""

    received_packets: int
    sent_packets: int
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Route:
    """``connected``: its addresses are reached without another router."""

    network: IPv4Network
    interface: int
    connected: bool


class NetlinkSocket:
    """Requests are answered before a call returns. Raises HostError (``network_refused``) with the kernel's reason."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.bind((0, 0))
        self._socket.settimeout(5)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def change(self, kind: int, flags: int, body: bytes, doing: str) -> None:
        for _ in self.ask(kind, flags | _ACK, body, doing):
            pass

    def ask(self, kind: int, flags: int, body: bytes, doing: str) -> Iterator[tuple[int, bytes]]:
        """Messages of the answer, read whole before the first is given out."""
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, self._sequence, 0)
        try:
            self._socket.send(header + body)
            found = self._read(doing, until_done=flags & DUMP == DUMP)
        except OSError as error:
            raise HostError(f"{doing}: {error.strerror or error}", code="network_refused") from error
        return iter(found)

    def _read(self, doing: str, *, until_done: bool) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        while True:
            data = self._socket.recv(1 << 18)
            while len(data) >= 16:
                length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
                payload, data = data[16:length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    (number,) = struct.unpack_from("=i", payload)
                    if number:
                        raise NetlinkRefusedError(doing, -number)
                    return found
                found.append((kind, payload))
                if not until_done:
                    # Asked without an acknowledgement: one message is the whole answer.
                    return found


class RouteSocket(NetlinkSocket):
    def __init__(self) -> None:
        super().__init__(_ROUTES)

    # --- looking ------------------------------------------------------------------------------------------------------

    def links(self) -> dict[str, Link]:
        found: dict[str, Link] = {}
        for _, payload in self.ask(_GETLINK, DUMP, struct.pack("=BxHiII", 0, 0, 0, 0, 0), "listing links"):
            link = _parse_link(payload)
            found[link.name] = link
        return found

    def traffic(self) -> dict[str, LinkTraffic]:
        """Of each link, since it was made."""
        found: dict[str, LinkTraffic] = {}
        for _, payload in self.ask(_GETLINK, DUMP, _link_header(0), "reading the links' counters"):
            attributes = dict(read_attributes(payload, 16))
            counters = struct.unpack_from("=4Q", attributes.get(_IFLA_STATS64, bytes(32)))
            found[_string(attributes.get(_IFLA_IFNAME))] = LinkTraffic(*counters)
        return found

    def find_link(self, name: str) -> Link | None:
        body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _text(_IFLA_IFNAME, name)
        try:
            for _, payload in self.ask(_GETLINK, 0, body, f"looking for the link {name}"):
                return _parse_link(payload)
        except NetlinkRefusedError as error:
            if error.number == errno.ENODEV:
                return None
            raise
        return None

    def get_link(self, name: str) -> Link:
        link = self.find_link(name)
        if link is None:
            raise HostError(f"there is no link {name}", code="no_such_link")
        return link

    def addresses(self) -> list[tuple[int, IPv4Interface]]:
        """(interface's index, address with its network)."""
        found: list[tuple[int, IPv4Interface]] = []
        body = struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)
        for _, payload in self.ask(_GETADDR, DUMP, body, "listing addresses"):
            family, prefix, _, _, index = struct.unpack_from("=BBBBi", payload)
            attributes = dict(read_attributes(payload, 8))
            address = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
            if family == socket.AF_INET and address is not None:
                found.append((index, IPv4Interface((address, prefix))))
        return found

    def routes(self) -> list[Route]:
        """IPv4 routes of all tables but the one of this machine's own addresses."""
        return [route for table, kind, route in self._all_routes() if table != _TABLE_LOCAL and kind == _UNICAST]

    def connected_networks(self) -> list[IPv4Network]:
        """What this machine reaches without another router."""
        return sorted({route.network for route in self.routes() if route.connected and route.network.prefixlen})

    def local_networks(self) -> list[IPv4Network]:
        """What this machine takes for itself: each of its addresses, and whole networks that were made so."""
        return sorted({route.network for _, kind, route in self._all_routes() if kind == _LOCAL})

    def _all_routes(self) -> Iterator[tuple[int, int, Route]]:
        """(table, kind, route)."""
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        for _, payload in self.ask(_GETROUTE, DUMP, body, "listing routes"):
            family, length, _, _, table, _, _, kind, _ = struct.unpack_from("=BBBBBBBBI", payload)
            attributes = dict(read_attributes(payload, 12))
            if _RTA_TABLE in attributes:
                (table,) = struct.unpack("=I", attributes[_RTA_TABLE])
            if family != socket.AF_INET:
                continue
            network = IPv4Network((attributes.get(_RTA_DST, bytes(4)), length))
            interface = struct.unpack("=i", attributes.get(_RTA_OIF, bytes(4)))[0]
            yield table, kind, Route(network, interface, _RTA_GATEWAY not in attributes)

    def is_forwarding(self) -> bool:
        """``net.ipv4.ip_forward`` of this socket's namespace."""
        body = struct.pack("=Bxxx", socket.AF_INET) + packed_attribute(
            _NETCONF_IFINDEX, struct.pack("=i", _ALL_INTERFACES)
        )
        for _, payload in self.ask(_GETNETCONF, 0, body, "asking for ip_forward"):
            value = dict(read_attributes(payload, 4)).get(_NETCONF_FORWARDING, bytes(4))
            return struct.unpack("=i", value)[0] != 0
        return False

    def forwarding_entries(self) -> list[tuple[int, str]]:
        """The bridges' table: (port's index, MAC address)."""
        found: list[tuple[int, str]] = []
        body = struct.pack("=BxHiII", _AF_BRIDGE, 0, 0, 0, 0)
        for _, payload in self.ask(_GETNEIGH, DUMP, body, "listing the bridges' entries"):
            (index,) = struct.unpack_from("=i", payload, 4)
            found.append((index, dict(read_attributes(payload, 12)).get(_NDA_LLADDR, b"").hex(":")))
        return found

    def closed_ports(self) -> set[int]:
        """Indices of bridge ports that are as ``close_port`` leaves them."""
        found: set[int] = set()
        for _, payload in self.ask(_GETLINK, DUMP, _PORT_HEADER, "listing the bridges' ports"):
            options = dict(read_attributes(dict(read_attributes(payload, 16)).get(_IFLA_PROTINFO, b"")))
            if all(options.get(option) == value for option, value in _CLOSED_PORT.items()):
                found.add(struct.unpack_from("=i", payload, 4)[0])
        return found

    # --- changing -----------------------------------------------------------------------------------------------------

    def create_bridge(self, name: str, mac_address: str) -> None:
        """With a MAC address of its own: one taken from its ports would change as they come and go."""
        options = packed_attribute(_BRIDGE_MCAST_SNOOPING, b"\0")
        self._create(
            _text(_IFLA_IFNAME, name)
            + packed_attribute(_IFLA_ADDRESS, _mac(mac_address))
            + packed_nest(_IFLA_LINKINFO, _text(_INFO_KIND, "bridge") + packed_nest(_INFO_DATA, options)),
            f"making the bridge {name}",
        )

    def create_veth(self, name: str, peer: str, peer_namespace: int) -> None:
        """A pair of links: ``name`` in this namespace, ``peer`` in that of the descriptor."""
        other = (
            struct.pack("=BxHiII", 0, 0, 0, 0, 0)
            + _text(_IFLA_IFNAME, peer)
            + packed_attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
        )
        self._create(
            _text(_IFLA_IFNAME, name)
            + packed_nest(
                _IFLA_LINKINFO, _text(_INFO_KIND, "veth") + packed_nest(_INFO_DATA, packed_attribute(_VETH_PEER, other))
            ),
            f"making the link {name}",
        )

    def delete_link(self, name: str) -> None:
        """Idempotent."""
        link = self.find_link(name)
        if link is None:
            return
        try:
            self.change(_DELLINK, 0, _link_header(link.index), f"deleting the link {name}")
        except NetlinkRefusedError as error:
            if error.number != errno.ENODEV:
                raise

    def set_group(self, index: int, group: int) -> None:
        """So that many links can be deleted at once."""
        body = _link_header(index) + packed_attribute(_IFLA_GROUP, struct.pack("=I", group))
        self.change(_SETLINK, 0, body, f"putting link {index} into a group")

    def set_group_of(self, name: str, group: int) -> None:
        """``set_group`` by name, which spares looking for the link. Without one of this name nothing happens."""
        body = _link_header(0) + _text(_IFLA_IFNAME, name) + packed_attribute(_IFLA_GROUP, struct.pack("=I", group))
        try:
            self.change(_SETLINK, 0, body, f"putting the link {name} into a group")
        except NetlinkRefusedError as error:
            if error.number != errno.ENODEV:
                raise

    def delete_group(self, group: int) -> None:
        """All links of the group, in a hundredth of the time that one after the other takes. Idempotent."""
        body = _link_header(0) + packed_attribute(_IFLA_GROUP, struct.pack("=I", group))
        try:
            self.change(_DELLINK, 0, body, f"deleting the links of group {group}")
        except NetlinkRefusedError as error:
            if error.number not in (errno.ENODEV, errno.EINVAL):
                raise

    def set_up(self, index: int, up: bool = True) -> None:
        flags = _UP if up else 0
        self.change(_SETLINK, 0, struct.pack("=BxHiII", 0, 0, index, flags, _UP), f"bringing link {index} up")

    def set_alias(self, index: int, alias: str) -> None:
        # Without a final NUL: it would become a part of it.
        self.change(
            _SETLINK, 0, _link_header(index) + packed_attribute(_IFLA_IFALIAS, alias.encode()), f"naming link {index}"
        )

    def set_master(self, index: int, bridge: int) -> None:
        body = _link_header(index) + packed_attribute(_IFLA_MASTER, struct.pack("=i", bridge))
        self.change(_SETLINK, 0, body, f"making link {index} a port of the bridge")

    def close_port(self, index: int) -> None:
        """Let this port of a bridge reach no other closed one, learn no address, and get nothing that is not its own."""
        options = b"".join(packed_attribute(option, value) for option, value in _CLOSED_PORT.items())
        header = struct.pack("=BxHiII", _AF_BRIDGE, 0, index, 0, 0)
        self.change(_SETLINK, 0, header + packed_nest(_IFLA_PROTINFO, options), f"isolating port {index}")

    def set_forwarding_entry(self, index: int, mac_address: str) -> None:
        """Where the bridge sends what is for this MAC address, for good."""
        header = struct.pack("=BxHiHBB", _AF_BRIDGE, 0, index, _NUD_NOARP, _NTF_MASTER, 0)
        body = header + packed_attribute(_NDA_LLADDR, _mac(mac_address))
        self.change(_NEWNEIGH, _CREATE | _REPLACE, body, f"giving port {index} its MAC address")

    def ensure_address(self, index: int, address: IPv4Interface) -> None:
        header = struct.pack("=BBBBi", socket.AF_INET, address.network.prefixlen, 0, 0, index)
        body = (
            header + packed_attribute(_IFA_LOCAL, address.ip.packed) + packed_attribute(_IFA_ADDRESS, address.ip.packed)
        )
        self.change(_NEWADDR, _CREATE | _REPLACE, body, f"giving link {index} the address {address}")

    def ensure_default_route(self, index: int, gateway: IPv4Address) -> None:
        main, boot = 254, 3
        header = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, main, boot, 0, _UNICAST, 0)
        body = (
            header
            + packed_attribute(_RTA_GATEWAY, gateway.packed)
            + packed_attribute(_RTA_OIF, struct.pack("=i", index))
        )
        self.change(_NEWROUTE, _CREATE | _REPLACE, body, f"setting the default route to {gateway}")

    # --- messages -----------------------------------------------------------------------------------------------------

    def _create(self, attributes: bytes, doing: str) -> None:
        self.change(_NEWLINK, _CREATE | _EXCL, _link_header(0) + attributes, doing)


class AddressWatch:
    """Becomes readable when IPv4 addresses or routes of the namespace change; ``fileno`` is for an event loop."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        self._socket.bind((0, _IPV4_ADDRESSES | _IPV4_ROUTES))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def drain(self) -> bool:
        """Read what there is; whether there was anything. What was lost counts too: somebody looks at all of it."""
        changed = False
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return changed
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            changed = True


class NetlinkRefusedError(HostError):
    default_code = "network_refused"

    def __init__(self, doing: str, number: int) -> None:
        hint = "this takes root" if number == errno.EPERM else ""
        super().__init__(f"{doing}: {os.strerror(number)}", hint=hint)
        self.number = number


def _link_header(index: int) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, 0, 0)


def packed_attribute(kind: int, value: bytes) -> bytes:
    padding = -len(value) % 4
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(padding)


def packed_nest(kind: int, value: bytes) -> bytes:
    return packed_attribute(kind | _NESTED, value)


def _text(kind: int, value: str) -> bytes:
    return packed_attribute(kind, value.encode() + b"\0")


def _mac(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


def read_attributes(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    while start + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[start + 4 : start + length]
        start += (length + 3) & ~3


def _parse_link(payload: bytes) -> Link:
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", payload)
    attributes = dict(read_attributes(payload, 16))

    kind = dict(read_attributes(attributes.get(_IFLA_LINKINFO, b""))).get(_INFO_KIND)
    master = attributes.get(_IFLA_MASTER)
    return Link(
        index=index,
        name=_string(attributes.get(_IFLA_IFNAME)),
        kind=_string(kind),
        alias=_string(attributes.get(_IFLA_IFALIAS)),
        mac_address=attributes.get(_IFLA_ADDRESS, b"").hex(":"),
        master=struct.unpack("=i", master)[0] if master else 0,
        group=struct.unpack("=I", attributes.get(_IFLA_GROUP, bytes(4)))[0],
        up=bool(flags & _UP),
        queue=_string(attributes.get(_IFLA_QDISC)),
    )


def _string(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")

"""The kernel's table of flows (conntrack) of one network namespace: what is remembered of a guest that is gone.

Used by the network holder. The kernel remembers an open TCP connection for five days after its last packet. Source:
linux/netfilter/nfnetlink_conntrack.h; nf_conntrack-sysctl.rst, ``nf_conntrack_tcp_timeout_established``.
"""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address

from atelier.host.netlink import (
    DUMP,
    NetlinkRefusedError,
    NetlinkSocket,
    packed_attribute,
    packed_nest,
    read_attributes,
)

_NETFILTER = 12
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)
_TUPLE_ORIGINAL, _MARK, _FILTER = 1, 8, 25
_TUPLE_IP, _IPV4_SOURCE = 1, 1
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_SOURCE = 1


class FlowTable(NetlinkSocket):
    def __init__(self) -> None:
        super().__init__(_NETFILTER)

    def forget(self, source: IPv4Address, *, but_marked: int | None, at_most: int) -> int:
        """Remove flows that were opened from this address, but for those that carry this mark; how many there were. Raises
        HostError."""
        forgotten = 0
        for flow in self._opened_by(source, but_marked)[:at_most]:
            doing = f"forgetting a flow of {source}"
            try:
                self.change(_DELETE, 0, _HEADER + packed_nest(_TUPLE_ORIGINAL, flow), doing)
                forgotten += 1
            except NetlinkRefusedError as error:
                if error.number != errno.ENOENT:
                    raise
        return forgotten

    def _opened_by(self, source: IPv4Address, but_marked: int | None) -> list[bytes]:
        """The flows' original direction, as the kernel writes it."""
        address = packed_nest(_TUPLE_IP, packed_attribute(_IPV4_SOURCE, source.packed))
        # Kernels before 5.8 do not read the filter and tell of all flows.
        sifted = packed_attribute(_FILTER_ORIGINAL, struct.pack("=I", _BY_SOURCE))
        sifted += packed_attribute(_FILTER_REPLY, struct.pack("=I", 0))
        body = _HEADER + packed_nest(_TUPLE_ORIGINAL, address) + packed_nest(_FILTER, sifted)
        found: list[bytes] = []
        for _, payload in self.ask(_GET, DUMP, body, f"listing the flows of {source}"):
            attributes = dict(read_attributes(payload, len(_HEADER)))
            flow = attributes.get(_TUPLE_ORIGINAL, b"")
            addresses = dict(read_attributes(dict(read_attributes(flow)).get(_TUPLE_IP, b"")))
            (mark,) = struct.unpack("!I", attributes.get(_MARK, bytes(4)))
            if addresses.get(_IPV4_SOURCE) == source.packed and mark != but_marked:
                found.append(flow)
        return found

"""Ethernet frames as a guest may send them: packed by hand, so that the wrong ones can be made too."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

ARP, IPV4, IPV6, VLAN, VLAN_OUTER, RARP = 0x0806, 0x0800, 0x86DD, 0x8100, 0x88A8, 0x8035
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
DO_NOT_FRAGMENT = 0x4000
BROADCAST = "ff:ff:ff:ff:ff:ff"


def mac(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


def ethernet(destination: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac(destination) + mac(source) + struct.pack("!H", kind) + payload


def arp(operation: int, sender_mac: str, sender: str, target_mac: str, target: str, trailer: bytes = b"") -> bytes:
    """``trailer`` stands where Ethernet's padding would."""
    addresses = mac(sender_mac) + IPv4Address(sender).packed + mac(target_mac) + IPv4Address(target).packed
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + addresses + trailer


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, destination: str, protocol: int, payload: bytes, *, fragment: int = 0) -> bytes:
    ends = IPv4Address(source).packed + IPv4Address(destination).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def udp(source_port: int, port: int, payload: bytes) -> bytes:
    """Without a checksum, which UDP over IPv4 allows."""
    return struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload


SYN, PUSH, ACK = 0x02, 0x08, 0x10


def tcp_syn(source: str, destination: str, source_port: int, port: int, payload: bytes) -> bytes:
    return tcp(source, destination, source_port, port, SYN, 1, 0, payload)


def tcp(
    source: str, destination: str, source_port: int, port: int, flags: int, number: int, acknowledged: int, data: bytes
) -> bytes:
    segment = struct.pack("!HHIIBBHHH", source_port, port, number, acknowledged, 0x50, flags, 64240, 0, 0) + data
    pseudo = IPv4Address(source).packed + IPv4Address(destination).packed + struct.pack("!BBH", 0, TCP, len(segment))
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


def icmp(kind: int, identifier: int, payload: bytes) -> bytes:
    message = struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + payload
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def icmp_error(kind: int, code: int, quoted: bytes) -> bytes:
    message = struct.pack("!BBHI", kind, code, 0, 0) + quoted
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def ipv6(source: str, destination: str, next_header: int, payload: bytes) -> bytes:
    ends = IPv6Address(source).packed + IPv6Address(destination).packed
    return struct.pack("!IHBB", 6 << 28, len(payload), next_header, 255) + ends + payload


def icmpv6(source: str, destination: str, kind: int, body: bytes) -> bytes:
    message = struct.pack("!BBH", kind, 0, 0) + body
    ends = IPv6Address(source).packed + IPv6Address(destination).packed
    pseudo = ends + struct.pack("!IHBB", len(message), 0, 0, ICMPV6)
    message = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    return ipv6(source, destination, ICMPV6, message)


def destination_port(frame: bytes) -> int | None:
    """None if the frame is not IPv4 with TCP or UDP."""
    if len(frame) < 38 or struct.unpack_from("!H", frame, 12)[0] != IPV4 or frame[23] not in (TCP, UDP):
        return None
    return struct.unpack_from("!H", frame, 14 + (frame[14] & 15) * 4 + 2)[0]


def asked_for(frame: bytes) -> tuple[str, int] | None:
    """Address and port, if the frame is the beginning of a TCP connection."""
    if len(frame) < 54 or (port := destination_port(frame)) is None or frame[23] != TCP:
        return None
    is_first = frame[14 + (frame[14] & 15) * 4 + 13] & (SYN | ACK) == SYN
    return (str(IPv4Address(frame[30:34])), port) if is_first else None

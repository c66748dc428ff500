"""Packet filter rules of one network namespace, through libnftables; and a watch that tells when rules go.

Used by the network holder alone. Each call is one transaction: all of it stands, or nothing. The library belongs to the
Debian package nftables; called in-process a change takes under a millisecond, where starting ``nft`` takes five to
thirteen. An object belongs to the namespace in which it was made. Source: libnftables(3), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from atelier.host.nftables_messages import RulesMessage
from atelier.model.errors import CommandError, MissingProgramError

_LIBRARY = "libnftables.so.1"
_MISSING = ("libnftables is not installed", "apt-get install nftables")
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _NO_BUFFER_ERRORS = 270, 1, 5
_GROUP_OF_NFTABLES = 7
_NFTABLES_SUBSYSTEM = 10
_NEW_GENERATION, _GET_GENERATION = 15, 16
"""The first ends each transaction's messages, with the process that made it."""
_GENERATION_ID, _PROCESS_ID = 1, 2
_REQUEST, _ACK = 1, 4
_ERROR, _BATCH_BEGIN, _BATCH_END = 2, 16, 17
_BATCH_OF_NFTABLES = struct.pack("!BBH", 0, 0, _NFTABLES_SUBSYSTEM)
_LARGEST_TRANSACTION = 1024 * 1024
_WITHOUT_STATE = 1 << 2
"""Source: nftables/libnftables.h, NFT_CTX_OUTPUT_STATELESS."""


def _load() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise MissingProgramError(_MISSING[0], hint=_MISSING[1]) from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    return library


def is_installed() -> bool:
    try:
        _load()
    except MissingProgramError:
        return False
    return True


class Nftables:
    """Raises MissingProgramError without the library."""

    def __init__(self) -> None:
        self._library = _load()
        self._context: int | None = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(5)
        # As much as an ordinary user may ask for.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST_TRANSACTION)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def run(self, commands: str) -> str:
        """Perform commands in nft's own language; returns what they list. Raises CommandError with nft's words."""
        status = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output = self._library.nft_ctx_get_output_buffer(self._context).decode(errors="replace")
        said = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace").strip()
        if status != 0:
            raise CommandError(f"nft refused the rules: {said or 'without a word'}")
        return output

    def apply(self, messages: Sequence[RulesMessage]) -> None:
        """One transaction of the kernel's own messages. Raises CommandError with the kernel's reason."""
        first = self._sequence + 1
        self._sequence += len(messages) + 2
        parts = [_packed(_BATCH_BEGIN, _REQUEST, first, _BATCH_OF_NFTABLES)]
        for number, message in enumerate(messages, first + 1):
            # The kernel answers what it refuses, and the last one in any case.
            flags = _REQUEST | message.flags | (_ACK if message is messages[-1] else 0)
            parts.append(_packed(_NFTABLES_SUBSYSTEM << 8 | message.kind, flags, number, message.body))
        parts.append(_packed(_BATCH_END, _REQUEST, self._sequence, _BATCH_OF_NFTABLES))
        refused = 0
        try:
            self._socket.send(b"".join(parts))
            answered = 0
            while answered not in (first, self._sequence - 1):
                kind, answered, data = self._receive()
                if answered >= first and kind == _ERROR:
                    refused = refused or -struct.unpack_from("=i", data)[0]
        except OSError as error:
            raise CommandError(f"the kernel did not take the rules: {error.strerror or error}") from error
        if refused:
            raise CommandError(f"the kernel refused the rules: {os.strerror(refused)}")

    def find(self, what: str) -> str | None:
        """The listing of ``table inet x`` or ``chain inet x y``, without what packets and time change (counters, the time
        that elements have left); None if there is none."""
        self._library.nft_ctx_output_set_flags(self._context, _WITHOUT_STATE)
        try:
            return self.run(f"list {what}")
        except CommandError:
            return None
        finally:
            self._library.nft_ctx_output_set_flags(self._context, 0)

    def generation(self) -> int:
        """The number of the namespace's last transaction, whoever made it: each adds one, up to 2^32, where 0 is left
        out. Raises OSError."""
        self._sequence += 1
        self._socket.send(_packed(_NFTABLES_SUBSYSTEM << 8 | _GET_GENERATION, _REQUEST, self._sequence, bytes(4)))
        answered = 0
        data = b""
        while answered != self._sequence:
            _, answered, data = self._receive()
        return _number(data[4:], _GENERATION_ID)

    def _receive(self) -> tuple[int, int, bytes]:
        """(kind, sequence number, body) of the next message: the kernel sends answers one at a time."""
        data = self._socket.recv(1 << 16)
        _, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        return kind, sequence, data[16:]


class RulesWatch:
    """Becomes readable when rules of the namespace are changed; ``fileno`` is for an event loop.

    Rules of the old iptables are not told of. Where this process has another number for the kernel than for itself (in a
    container) its own changes count as another's, which costs a look at the rules and no more.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_OF_NFTABLES)
        # Whatever was lost: the next message makes somebody look at all of it.
        self._socket.setsockopt(_SOL_NETLINK, _NO_BUFFER_ERRORS, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def drain(self) -> bool:
        """Read what there is; whether another process than this one has changed rules."""
        foreign = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return foreign
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _NFTABLES_SUBSYSTEM << 8 | _NEW_GENERATION:
                    foreign |= _number(data[20:length], _PROCESS_ID) != os.getpid()
                data = data[max(16, (length + 3) & ~3) :]


def _packed(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def _number(attributes: bytes, wanted: int) -> int:
    """The attribute of that kind; 0 if there is none."""
    while len(attributes) >= 8:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == wanted:
            return struct.unpack_from("!I", attributes, 4)[0]
        attributes = attributes[max(4, (length + 3) & ~3) :]
    return 0

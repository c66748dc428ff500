"""TAP devices: the host's end of a guest's network card. Used by the network holder, and by ``unconnected_tap``.

They are made in the namespace of the calling thread, and persist without anybody holding them open, so that rules can
stand before a machine starts and outlive it. Source: Documentation/networking/tuntap.rst, linux/if_tun.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from atelier.model.errors import ConflictError, HostError

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_TAP, _NO_PACKET_INFORMATION, _OFFLOAD_HEADER = 0x0002, 0x1000, 0x4000
_NODE = "/dev/net/tun"


def create_persistent(name: str) -> None:
    """Have a TAP of this name; it is down until somebody brings it up."""
    descriptor = _attach(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def open_existing(name: str) -> int:
    """The TAP as a descriptor (with virtio's offload header before each frame), for one holder at a time.

    Raises ConflictError (``slot_in_use``) when a machine holds it already.
    """
    return _attach(name)


def set_owner(name: str, user_id: int) -> None:
    """Let this user open the TAP without root. Raises as ``open_existing``."""
    descriptor = _attach(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, user_id)
    finally:
        os.close(descriptor)


def _attach(name: str) -> int:
    try:
        descriptor = os.open(_NODE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(
            f"{_NODE} cannot be opened: {error.strerror}", code="no_tap_devices", hint="as root: modprobe tun"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        request = struct.pack("16sH22x", name.encode(), _TAP | _NO_PACKET_INFORMATION | _OFFLOAD_HEADER)
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ConflictError(
                    f"the TAP {name} is held open by another machine",
                    code="slot_in_use",
                    hint="it comes free when that one ends",
                ) from error
            raise HostError(
                f"the TAP {name} was refused: {error.strerror}",
                code="network_refused",
                hint="this takes root" if error.errno == errno.EPERM else "",
            ) from error
        stack.pop_all()
    return descriptor

"""Keeps the guest's wall clock on the host's. Called by ``control`` on ``SetClock``, inside a guest, as root.

The rule: a clock that is behind by more than 0.5 s is stepped forward at once, one that is ahead by more than 60 s is
stepped back at once; all else is slewed, at most 5 % faster or slower than the host, so that time never jumps back for
a little and never stands still. The kernel slews by itself up to 0.2 s at a time and ends so by itself: an agent that
is killed meanwhile leaves no clock behind that runs wrong. While the guest stands still, as after a restore, a clock that
is behind is stepped however little that is (``catch_up``).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Final

from atelier.guest_protocol.connect import ConnectError

STEP_FORWARD_NS: Final = 500_000_000
STEP_BACK_NS: Final = 60_000_000_000
SLEW_AT_ONCE_NS: Final = 200_000_000
_SECOND_NS: Final = 1_000_000_000
_PAUSE_SECONDS: Final = 1.0

# Source: Linux include/uapi/linux/timex.h.
_ADJ_OFFSET: Final = 0x0001
_ADJ_STATUS: Final = 0x0010
_ADJ_TIMECONST: Final = 0x0020
_ADJ_SETOFFSET: Final = 0x0100
_ADJ_NANO: Final = 0x2000
_STA_PLL: Final = 0x0001
_STA_FREQHOLD: Final = 0x0080

_slewing: asyncio.Task[None] | None = None


class _Timex(ctypes.Structure):
    """struct timex of x86-64. Source: adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("precision", ctypes.c_long),
        ("tolerance", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
        ("tick", ctypes.c_long),
        ("unused", ctypes.c_long * 20),
    )


def needs_step(offset_ns: int) -> bool:
    """Whether a clock that is ahead by ``offset_ns`` (negative: behind) is stepped rather than slewed."""
    return offset_ns < -STEP_FORWARD_NS or offset_ns > STEP_BACK_NS


def next_slew(remaining_ns: int) -> int:
    """How much of a correction is given to the kernel at once."""
    return max(-SLEW_AT_ONCE_NS, min(SLEW_AT_ONCE_NS, remaining_ns))


def correct(offset_ns: int) -> None:
    """Take ``offset_ns`` off the clock, at once or little by little; what is still being slewed is given up for it.

    Raises ConnectError.
    """
    global _slewing
    if _slewing is not None:
        _slewing.cancel()
        _slewing = None
    if needs_step(offset_ns):
        _step(-offset_ns)
        return
    first_ns = next_slew(-offset_ns)
    _give(first_ns)
    if first_ns != -offset_ns:
        _slewing = asyncio.get_running_loop().create_task(_slew_on(-offset_ns, first_ns))


def catch_up(time_ns: int) -> None:
    """Have the clock show ``time_ns`` (ns since the epoch) after the machine stood still for an unknown time: forward
    at once, back as ``correct`` does it. Raises ConnectError."""
    offset_ns = time.time_ns() - time_ns
    correct(max(offset_ns, 0))
    if offset_ns < 0:
        _step(-offset_ns)


async def _slew_on(remaining_ns: int, given_ns: int) -> None:
    """Give the kernel more each second, for as long as it has not got all. It does a quarter of what it has a second."""
    while given_ns != remaining_ns:
        await asyncio.sleep(_PAUSE_SECONDS)
        remaining_ns -= given_ns - _pending()
        given_ns = next_slew(remaining_ns)
        _give(given_ns)


def _step(by_ns: int) -> None:
    timex = _Timex()
    timex.modes = _ADJ_SETOFFSET | _ADJ_NANO
    # Relative to the present time, whatever passes until then; nanoseconds are not negative.
    timex.seconds, timex.nanoseconds = divmod(by_ns, _SECOND_NS)
    _adjust(timex)


def _give(by_ns: int) -> None:
    """Have the kernel slew by this much, instead of what it still had to. It leaves the clock's rate as it is."""
    timex = _Timex()
    timex.modes = _ADJ_OFFSET | _ADJ_STATUS | _ADJ_TIMECONST | _ADJ_NANO
    timex.status = _STA_PLL | _STA_FREQHOLD
    timex.offset = by_ns
    _adjust(timex)


def _pending() -> int:
    timex = _Timex()
    _adjust(timex)
    return timex.offset


def _adjust(timex: _Timex) -> None:
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        raise ConnectError("internal", f"cannot set the clock: {os.strerror(ctypes.get_errno())}")

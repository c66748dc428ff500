"""A network holder that ends without a word while it takes or frees a slot: before its Nth call that changes something.

Its arguments are N and the holder's own. Started by ``test_holder_crashes``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from atelier.host import tap
from atelier.host.netlink import NetlinkSocket
from atelier.host.nftables import Nftables
from atelier.network_holder import __main__ as holder
from atelier.network_holder.policies import PolicyFiles
from atelier.network_holder.slots import NetworkSlots

_CHANGES: tuple[tuple[Any, str], ...] = (
    (NetlinkSocket, "change"),
    (Nftables, "apply"),
    (Nftables, "run"),
    (tap, "create_persistent"),
    (PolicyFiles, "write"),
    (PolicyFiles, "remove"),
)


def crash_before(number: int) -> None:
    """Counted from the first call of a slot's that is taken or freed."""
    left: int | None = None

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left is not None:
                left -= 1
                if left == 0:
                    os._exit(9)
            return change(*arguments, **options)

        return call

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left = number
            return work(*arguments, **options)

        return call

    for where, name in _CHANGES:
        setattr(where, name, counted(getattr(where, name)))
    for name in ("ensure", "ensure_all_absent"):
        setattr(NetworkSlots, name, counting(getattr(NetworkSlots, name)))


if __name__ == "__main__":
    crash_before(int(sys.argv[1]))
    sys.exit(holder.main(sys.argv[2:]))

"""``/ports``: on which TCP ports programs in this guest listen. Registered by ``program``.

Read from the kernel's own tables; what listens on the guest's loopback counts, as a stream of the channel reaches that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from atelier.guest_agent.http import Request, Response, Router, json_response

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN: Final = "0A"
_PORTS_MAX: Final = 1024


def list_listening_ports(tables: tuple[Path, ...] = _TABLES) -> list[int]:
    """Sorted, the lowest 1024 of them. A kernel without IPv6 lacks the second table."""
    found: set[int] = set()
    for table in tables:
        try:
            with table.open(encoding="ascii") as lines:
                next(lines, None)
                for line in lines:
                    # sl, local_address (hexadecimal, with the port behind a colon), rem_address, st. Source: proc(5).
                    words = line.split(maxsplit=4)
                    if len(words) > 3 and words[3] == _LISTEN:
                        found.add(int(words[1].rpartition(":")[2], 16))
        except FileNotFoundError:
            continue
    return sorted(found)[:_PORTS_MAX]


def register(router: Router) -> None:
    async def ports(request: Request) -> Response:
        return json_response({"ports": list_listening_ports()})

    router.add("GET", "/ports", ports)

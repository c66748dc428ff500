"""How fast a guest may receive: a token bucket on its TAP, written by ``tc``.

How fast it may send is a rule of its slot (``rules``): what comes in cannot be queued, and classifiers that police it are
absent from many kernels. Source: tc-tbf(8).
"""

from __future__ import annotations

from atelier.host import command
from atelier.host.netlink import Link
from atelier.model.errors import CommandError, HostError

_BUCKET = "tbf"
_MIN_BURST_BYTES = 16384
_BURSTS_PER_SECOND = 50
"""A bucket holds what comes in a fiftieth of a second: kernels' clocks tick a hundred times a second, or oftener."""
_LATENCY = "100ms"
_BYTES_PER_KBIT = 125


async def set_download(link: Link, kbit_per_second: int | None) -> None:
    """None: as fast as it goes. For a link of the namespace that this process is in. Idempotent.

    Raises MissingProgramError, HostError (``network_rate_refused``).
    """
    if kbit_per_second is None:
        if link.queue == _BUCKET:
            await _tc("delete", link, f"no longer limiting {link.name}")
        return
    burst = max(_MIN_BURST_BYTES, kbit_per_second * _BYTES_PER_KBIT // _BURSTS_PER_SECOND)
    bucket = ("rate", f"{kbit_per_second}kbit", "burst", f"{burst}b", "latency", _LATENCY)
    await _tc("replace", link, f"limiting {link.name} to {kbit_per_second} kbit/s", _BUCKET, *bucket)


async def _tc(verb: str, link: Link, doing: str, *discipline: str) -> None:
    try:
        await command.run(["tc", "qdisc", verb, "dev", link.name, "root", *discipline], package_hint="iproute2")
    except CommandError as error:
        raise HostError(
            f"{doing}: {error.message}",
            code="network_rate_refused",
            hint="the kernel needs sch_tbf (as root: modprobe sch_tbf); or set no download rate",
        ) from error

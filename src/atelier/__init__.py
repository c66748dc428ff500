"""Atelier: self-hosted microVM sandboxes for developers and AI agents.

``from atelier import Sandbox`` gives the Python SDK; it is loaded on first use, so that ``atelier --help`` and the
guest's own copy of this package import nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from atelier.client.sandbox import AsyncSandbox, Sandbox
    from atelier.client.snapshots import AsyncSnapshot, Snapshot
    from atelier.client.warm_pools import AsyncWarmPool, WarmPool

__all__ = ["AsyncSandbox", "AsyncSnapshot", "AsyncWarmPool", "Sandbox", "Snapshot", "WarmPool", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("Sandbox", "AsyncSandbox"):
        from atelier.client import sandbox

        return getattr(sandbox, name)
    if name in ("Snapshot", "AsyncSnapshot"):
        from atelier.client import snapshots

        return getattr(snapshots, name)
    if name in ("WarmPool", "AsyncWarmPool"):
        from atelier.client import warm_pools

        return getattr(warm_pools, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

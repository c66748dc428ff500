"""Where a home is: a network namespace, and what keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atelier.host import namespaces
from atelier.network_holder.keeper_client import NetworkKeeper


class Place(Protocol):
    @property
    def shared(self) -> bool:
        """Whether others have links, rules and settings there, which are not ours to touch."""
        ...

    async def ensure(self) -> int:
        """Have the namespace; a descriptor of it, which is the caller's. Raises HostError."""
        ...

    async def remove(self) -> None:
        """Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class NamedPlace:
    """Root's: kept by a name in the file system, as ``ip netns`` makes it."""

    name: str

    @property
    def shared(self) -> bool:
        return False

    async def ensure(self) -> int:
        return await namespaces.ensure_named(self.name)

    async def remove(self) -> None:
        await namespaces.ensure_named_absent(self.name)


@dataclass(frozen=True, slots=True)
class KeptPlace:
    """An ordinary user's: kept by the keeper. This process is in it already."""

    keeper: NetworkKeeper

    @property
    def shared(self) -> bool:
        return False

    async def ensure(self) -> int:
        return namespaces.open_current()

    async def remove(self) -> None:
        self.keeper.end()


class HostPlace:
    """The host's own."""

    @property
    def shared(self) -> bool:
        return True

    async def ensure(self) -> int:
        return namespaces.open_current()

    async def remove(self) -> None:
        """It was there before."""

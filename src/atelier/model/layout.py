"""Where things lie in the data, cache and run folders. Pure path arithmetic: nothing here touches the disk.

A test pins this layout, since snapshots, backups and a newer manager rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atelier.model.errors import HostError

SOCKET_PATH_MAX_BYTES = 107
"""``sun_path`` holds 108 bytes with its final NUL. Source: unix(7)."""


@dataclass(frozen=True, slots=True)
class DataLayout:
    """``ATELIER_DATA_DIR``: what must outlive a reboot."""

    root: Path

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    @property
    def database(self) -> Path:
        return self.root / "atelier.db"

    @property
    def token_file(self) -> Path:
        """JSON ``{"api_url": str, "api_key": str}``, mode 0600: what the CLI reads when no ``ATELIER_API_KEY`` is set."""
        return self.root / "token.json"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    def volume(self, sandbox_id: str) -> Path:
        """The root disk of a sandbox, where disks are files."""
        return self.volumes / f"{sandbox_id}.qcow2"

    @property
    def bases(self) -> Path:
        """Images that volumes stand over, kept beside them."""
        return self.volumes / "bases"

    @property
    def consoles(self) -> Path:
        return self.root / "consoles"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def network_plan(self) -> Path:
        """JSON ``{"subnet": str}``: which addresses the sandboxes have, where they have a bridge."""
        return self.root / "network.json"


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The run directory: sockets and what dies with a reboot."""

    root: Path

    @property
    def sandboxes(self) -> Path:
        return self.root / "sandboxes"

    def vmm_directory(self, sandbox_id: str) -> Path:
        """Sockets and console of one VMM, which receives them open: the folder is the manager's own."""
        return self.sandboxes / sandbox_id

    @property
    def channels(self) -> Path:
        """The gateway's: one socket per sandbox."""
        return self.root / "channels"

    def channel_socket(self, sandbox_id: str) -> Path:
        return self.channels / f"{sandbox_id}.sock"

    @property
    def gateway_socket(self) -> Path:
        return self.root / "gateway.sock"

    @property
    def network_socket(self) -> Path:
        """The network holder's."""
        return self.root / "network.sock"

    @property
    def network_lock(self) -> Path:
        """Held by the network holder. The file stays as long as the network may, holder or not."""
        return self.root / "network.lock"

    @property
    def network_keeper_socket(self) -> Path:
        """Of the process that keeps an ordinary user's namespaces for the network holder."""
        return self.root / "network-keeper.sock"

    @property
    def network_policies(self) -> Path:
        """The network holder's: what each sandbox may reach, as JSON."""
        return self.root / "network"

    @property
    def manager_socket(self) -> Path:
        return self.root / "manager.sock"


def check_socket_path(path: Path) -> Path:
    """Return ``path``, or raise HostError if the kernel would refuse it for its length."""
    length = len(bytes(path))
    if length > SOCKET_PATH_MAX_BYTES:
        raise HostError(
            f"the socket path {path} has {length} bytes, the kernel allows {SOCKET_PATH_MAX_BYTES}",
            code="path_too_long",
            hint="set ATELIER_RUN_DIR to a shorter folder",
        )
    return path

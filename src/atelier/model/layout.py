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
class DiskLayout:
    """Disks that are files, and what they stand over. All on one file system: many of these are hard links."""

    root: Path

    def volume(self, sandbox_id: str) -> Path:
        """The root disk of a sandbox: what is written to."""
        return self.root / f"{sandbox_id}.qcow2"

    def next_top(self, sandbox_id: str, snapshot_id: str) -> Path:
        """The empty overlay that becomes the volume when the machine was switched to it."""
        return self.root / f"{sandbox_id}-{snapshot_id}.qcow2.next"

    @property
    def bases(self) -> Path:
        """Images that volumes and snapshot disks stand over."""
        return self.root / "bases"

    @property
    def layers(self) -> Path:
        """What volumes stand over, by sandbox: what its snapshots froze, and the disk of the snapshot it came from."""
        return self.root / "layers"

    def layer(self, sandbox_id: str, snapshot_id: str, number: int) -> Path:
        """What a sandbox's volume was until the ``number``-th attempt at this snapshot."""
        return self.layers / f"{sandbox_id}-{snapshot_id}-{number}.qcow2"

    def origin(self, sandbox_id: str, snapshot_id: str) -> Path:
        """A second name of the disk of the snapshot that the sandbox was made from."""
        return self.layers / f"{sandbox_id}-from-{snapshot_id}.qcow2"

    def is_layer(self, path: Path) -> bool:
        return path.parent == self.layers and not self.is_origin(path)

    def is_origin(self, path: Path) -> bool:
        return path.parent == self.layers and "-from-" in path.name

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    def snapshot_disk(self, snapshot_id: str) -> Path:
        return self.snapshots / f"{snapshot_id}.qcow2"

    def snapshot_layer(self, snapshot_id: str) -> Path:
        """A second name of the layer that the snapshot's disk is to be copied from; gone when it is made."""
        return self.snapshots / f"{snapshot_id}.qcow2.layer"

    def snapshot_checksum(self, snapshot_id: str) -> Path:
        """SHA-256 of the snapshot's disk, in hexadecimal."""
        return self.snapshots / f"{snapshot_id}.sha256"

    @property
    def origins(self) -> Path:
        """Second names of snapshots' disks that disks of other snapshots stand over."""
        return self.root / "origins"

    def snapshot_origin(self, snapshot_id: str) -> Path:
        return self.origins / f"{snapshot_id}.qcow2"


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
    def ssh_host_key(self) -> Path:
        """By which SSH clients know this installation, mode 0600; the public half beside it, in ``.pub``."""
        return self.root / "ssh_host_ed25519_key"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    @property
    def disks(self) -> DiskLayout:
        """What is in ``volumes``, where disks are files."""
        return DiskLayout(self.volumes)

    @property
    def snapshots(self) -> Path:
        """Saved machines: a folder per snapshot, with its memory, its state and what it says of itself."""
        return self.root / "snapshots"

    def snapshot(self, snapshot_id: str) -> Path:
        return self.snapshots / snapshot_id

    @property
    def paused(self) -> Path:
        """Machines of paused sandboxes."""
        return self.root / "paused"

    def saved_memory(self, sandbox_id: str) -> Path:
        """A machine with its memory, as one stream."""
        return self.paused / f"{sandbox_id}.memory"

    def saved_tools(self, sandbox_id: str) -> Path:
        """A second name of the tools image that the memory belongs to."""
        return self.paused / f"{sandbox_id}.tools"

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
class CacheLayout:
    """``ATELIER_CACHE_DIR``, as far as it is not the image driver's: what can be made anew, for all installations."""

    root: Path

    @property
    def templates(self) -> Path:
        return self.root / "templates"

    @property
    def templates_lock(self) -> Path:
        """Held by who puts one there."""
        return self.templates / "lock"

    def template(self, key: str) -> Path:
        """A folder with all of one template; whole if it has this name."""
        return self.templates / key


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
    def previews_socket(self) -> Path:
        """The gateway's, where a front proxy stands before it; unless the settings name another place."""
        return self.root / "previews.sock"

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

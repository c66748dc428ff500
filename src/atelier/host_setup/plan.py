"""What makes a host of this machine, area by area, in the order in which it is made: from settings, changes.

No other file decides what belongs to a production host.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atelier.config.host import HostSettings
from atelier.config.production import CompanionChoice, VmmChoice
from atelier.config.settings import NetworkChoice, NetworkHome, ServerMode, Settings
from atelier.host_setup.access_changes import (
    BridgeNameCheck,
    PortCheck,
    RootSettingsChange,
    RootsOwnCheck,
    SudoersChange,
    helper_program,
)
from atelier.host_setup.caddy import EDGE_FOLDER, CaddyCheck, caddy_changes
from atelier.host_setup.changes import Change, FileChange, FolderChange
from atelier.host_setup.config_change import ConfigChange
from atelier.host_setup.firecracker_release import FirecrackerChange
from atelier.host_setup.journal import FOLDER
from atelier.host_setup.provision import Area
from atelier.host_setup.root_settings import RootSettings
from atelier.host_setup.storage_changes import LoopFileChange, ThinPoolChange, VolumeGroupChange
from atelier.host_setup.system_changes import (
    LiveSettingChange,
    ModulesChange,
    PackagesChange,
    ServicesChange,
    UserChange,
)
from atelier.host_setup.units import (
    NETWORK_CAPABILITIES,
    POOL_UNIT,
    SERVICES,
    UNITS,
    deploy_folder,
    render,
)
from atelier.model.errors import InvalidRequestError

CONFIG = Path("/etc/atelier/atelier.toml")
RUN_FOLDER = Path("/run/atelier")
PRODUCTION_VALUES = {
    "server.mode": '"production"',
    "server.data_dir": f'"{FOLDER}/data"',
    "server.cache_dir": f'"{FOLDER}/cache"',
    "server.run_dir": f'"{RUN_FOLDER}"',
    "server.companions": '"services"',
    "vmm.jails_dir": f'"{FOLDER}/jails"',
    "network.kind": '"bridge"',
    "network.home": '"host"',
}
"""What a production host's configuration says, unless its administrator says otherwise: key to TOML."""

_STORAGE_VALUES = {"storage.kind": '"lvm-thin"'}
_CADDY_VALUES = {"previews.listen": f'"unix:{EDGE_FOLDER}/previews.sock"'}

_PACKAGES = (
    *("qemu-system-x86", "qemu-utils", "mmdebstrap", "e2fsprogs", "uidmap", "util-linux"),
    *("iproute2", "nftables", "procps", "kmod", "sudo"),
)
_STORAGE_PACKAGES = ("lvm2", "thin-provisioning-tools")
_MODULES = ("tun", "bridge", "nf_tables", "vhost_vsock")
_DAEMON_RELOAD = ("systemctl", "daemon-reload")
_UNIT_FOLDER = "/etc/systemd/system"


def production_values(*, has_group: bool, has_caddy: bool) -> Mapping[str, str]:
    """What is filled in where a configuration does not say it. ``has_group``: it names a volume group."""
    return {
        **PRODUCTION_VALUES,
        **(_STORAGE_VALUES if has_group else {}),
        **(_CADDY_VALUES if has_caddy else {}),
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """``config``: the text of the configuration file that ``settings`` and ``host`` were read from, ``derived_from`` what it
    was before it was completed, if it is the host's; ``python``: the one that Atelier is installed for."""

    settings: Settings
    host: HostSettings
    config: str
    derived_from: str
    python: Path

    def check(self) -> None:
        """Raises InvalidRequestError (``not_production``) for settings that no production host can have."""
        settings = self.settings
        for key, is_right, wanted in (
            ("server.mode", settings.mode is ServerMode.PRODUCTION, "production"),
            ("server.companions", settings.production.companions is CompanionChoice.SERVICES, "services"),
            ("server.run_dir", settings.run_dir.parent == RUN_FOLDER, str(RUN_FOLDER)),
            (
                "network.home",
                settings.network is NetworkChoice.CLOSED or settings.network_home is NetworkHome.HOST,
                "host",
            ),
        ):
            if not is_right:
                raise InvalidRequestError(
                    f"{key} is not {wanted}, which a production host wants",
                    code="not_production",
                    hint=f"leave {key} out of the configuration, or set it so",
                )

    def areas(self) -> Sequence[Area]:
        """All, in the order in which they are made."""
        areas = (
            Area("packages", "programs that Atelier needs", self._packages()),
            Area("account", "the user that Atelier runs as, and its folders", self._account()),
            Area("network", "forwarding, modules, the bridge's name", self._network()),
            Area("storage", "where the sandboxes' disks are", self._storage()),
            Area("firecracker", "the VMM", self._firecracker()),
            Area("privileges", "what the manager may ask of root", self._privileges()),
            Area("ssh", "the port that SSH is served at", self._ports()),
            Area("systemd", "the services", self._services()),
            Area("caddy", "the proxy in front", self._caddy()),
        )
        return [area for area in areas if area.changes]

    def _packages(self) -> Sequence[Change]:
        storage = _STORAGE_PACKAGES if self.settings.production.volume_group else ()
        caddy = ("caddy",) if self.host.has_caddy else ()
        checks = [CaddyCheck()] if self.host.has_caddy else []
        return [*checks, RootsOwnCheck(self.python), PackagesChange((*_PACKAGES, *storage, *caddy))]

    def _account(self) -> Sequence[Change]:
        user = self.host.user
        settings = self.settings
        return [
            UserChange(user, str(FOLDER)),
            FolderChange(str(FOLDER)),
            *(
                FolderChange(str(folder), 0o700, user, user, is_data=True)
                for folder in (settings.data_dir, settings.cache_dir)
            ),
            FolderChange(str(settings.production.jails_dir), 0o711, is_data=True),
            FolderChange(str(CONFIG.parent), is_shared=True),
            ConfigChange(str(CONFIG), self.config, user, self.derived_from),
        ]

    def _network(self) -> Sequence[Change]:
        if self.settings.network is NetworkChoice.CLOSED:
            return []
        forwarding = b"# Sandboxes' packets are forwarded. Written by: atelier host network.\nnet.ipv4.ip_forward = 1\n"
        modules = "".join(f"{name}\n" for name in _MODULES).encode()
        return [
            BridgeNameCheck(self.settings.bridge_name),
            FileChange("/etc/sysctl.d/60-atelier.conf", forwarding),
            LiveSettingChange("net.ipv4.ip_forward", "1", needed_by_others="/sys/class/net/docker0"),
            FileChange("/etc/modules-load.d/atelier.conf", modules),
            ModulesChange(_MODULES),
        ]

    def _storage(self) -> Sequence[Change]:
        production = self.settings.production
        group, pool = production.volume_group, production.thin_pool
        if not group:
            return []
        if self.host.loop_file is None:
            device = str(self.host.storage_device or "")
            return [VolumeGroupChange(group, device), ThinPoolChange(group, pool)]
        file = str(self.host.loop_file)
        values = {
            "LOOP_FILE": file,
            "VOLUME_GROUP": group,
            "LOSETUP": shutil.which("losetup", path="/usr/sbin:/sbin") or "/usr/sbin/losetup",
            "VGCHANGE": "/usr/sbin/vgchange",
        }
        unit = render(deploy_folder() / "systemd" / POOL_UNIT, values)
        return [
            LoopFileChange(file, self.host.loop_size_gib),
            VolumeGroupChange(group, file, is_loop=True),
            ThinPoolChange(group, pool),
            FileChange(f"{_UNIT_FOLDER}/{POOL_UNIT}", unit, after=_DAEMON_RELOAD),
            ServicesChange((POOL_UNIT,)),
        ]

    def _firecracker(self) -> Sequence[Change]:
        release = self.host.firecracker
        if not release.source:
            return []
        change = FirecrackerChange(release)
        return [FolderChange(change.folder, is_shared=True), change]

    def _privileges(self) -> Sequence[Change]:
        production = self.settings.production
        wanted = RootSettings(
            user=self.host.user,
            installation_id="",
            volume_group=production.volume_group,
            thin_pool=production.thin_pool if production.volume_group else "",
            **self._firecracker_places(),
        )
        return [
            RootSettingsChange(wanted, self.python, CONFIG, str(FOLDER)),
            helper_program(self.python),
            SudoersChange(self.host.user),
        ]

    def _firecracker_places(self) -> dict[str, str]:
        """Nothing where there is no Firecracker, and none is to come."""
        production = self.settings.production
        is_there = bool(self.host.firecracker.source) or production.firecracker.exists()
        if production.vmm is VmmChoice.QEMU or not is_there:
            return {}
        return {
            "jails": str(production.jails_dir),
            "firecracker": str(production.firecracker),
            "jailer": str(production.jailer),
        }

    def _ports(self) -> Sequence[Change]:
        listens = self.settings.listen
        checks = [PortCheck(listens.host, listens.port, "server.listen")]
        if (ssh := self.settings.ssh_listen) is not None:
            checks.append(PortCheck(ssh.host, ssh.port, "ssh.listen"))
        return checks

    def _services(self) -> Sequence[Change]:
        values = {
            "USER": self.host.user,
            "HOME": str(FOLDER),
            "PYTHON": str(self.python),
            "CONFIG": str(CONFIG),
            "DATA_DIR": str(self.settings.data_dir),
            "NETWORK_CAPABILITIES": " ".join(NETWORK_CAPABILITIES),
        }
        units = self._units()
        files = [
            FileChange(
                f"{_UNIT_FOLDER}/{name}", render(deploy_folder() / "systemd" / name, values), after=_DAEMON_RELOAD
            )
            for name in units
        ]
        services = tuple(name for name in SERVICES if name in units)
        return [*files, ServicesChange(services, (str(RUN_FOLDER), "/run/atelier-privileged", "/dev/atelier"))]

    def _units(self) -> Sequence[str]:
        """Without a way out for sandboxes there is no network to be held."""
        is_closed = self.settings.network is NetworkChoice.CLOSED
        return [name for name in UNITS if not (is_closed and name.startswith("atelier-network"))]

    def _caddy(self) -> Sequence[Change]:
        return caddy_changes(self.settings, self.host) if self.host.has_caddy else []

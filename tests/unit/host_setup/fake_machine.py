"""A machine in a folder: files that are files, and programs of the system that do to it what they would do to a host.

What programs keep elsewhere (packages, volume groups, services) is kept in attributes, so that two states of the whole
machine can be compared. A program that is asked for something that it does not know fails the test.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atelier.host_setup.host import Host
from atelier.model.errors import CommandError, HostError, MissingProgramError

_COMES_WITH = {"lvm2": ("dmeventd",), "caddy": ("libnss3-tools",), "qemu-system-x86": ("seabios",)}
_FOLDERS = (
    *("etc/sudoers.d", "etc/sysctl.d", "etc/modules-load.d", "etc/systemd/system", "etc/tmpfiles.d", "usr/local/sbin"),
    *("usr/local/lib", "usr/local/bin", "var/lib", "run", "proc/sys/net/ipv4", "sys/module", "sys/class/net", "dev"),
)


class Interrupted(BaseException):
    """The machine's power is cut."""


@dataclass
class FakeMachine(Host):
    root: Path
    packages: set[str] = field(
        default_factory=lambda: {"dpkg", "apt", "systemd", "util-linux", "procps", "kmod", "iproute2"}
    )
    services: dict[str, str] = field(default_factory=dict[str, str])
    """enabled, or not there."""
    groups: dict[str, str] = field(default_factory=dict[str, str])
    """LVM's: name to device."""
    pools: set[str] = field(default_factory=set[str])
    volumes: dict[str, str] = field(default_factory=dict[str, str])
    """vg/name to its pool."""
    loops: dict[str, str] = field(default_factory=dict[str, str])
    """device to file."""
    disks: set[str] = field(default_factory=set[str])
    signatures: dict[str, str] = field(default_factory=dict[str, str])
    links: dict[str, str] = field(default_factory=dict[str, str])
    """name to alias."""
    ports: dict[int, str] = field(default_factory=dict[int, str])
    owners: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    apt_lists: bool = False
    ran: list[str] = field(default_factory=list[str])
    power_until: int | None = None
    """How many more commands are run before the power is cut."""
    before_command: Callable[[Sequence[str]], None] = lambda words: None

    def __post_init__(self) -> None:
        super().__init__(self.root, self._run)
        for folder in _FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
        (self.root / "etc/group").write_text("root:x:0:\nkvm:x:104:\n")
        (self.root / "proc/sys/net/ipv4/ip_forward").write_text("0\n")
        (self.root / "sys/module/tun").mkdir()

    def state(self) -> dict[str, object]:
        """All that can be told of it, files with their bytes, modes and owners."""
        files: dict[str, object] = {}
        for path in sorted(self.root.rglob("*")):
            name = "/" + str(path.relative_to(self.root))
            found = path.lstat()
            # A module that is loaded stays until a reboot.
            if name.startswith("/sys/module/"):
                continue
            is_small = stat.S_ISREG(found.st_mode) and found.st_size < 1 << 20
            content = path.read_bytes() if is_small else str(found.st_size * stat.S_ISREG(found.st_mode)).encode()
            files[name] = (oct(found.st_mode), content, self.owners.get(name, ("root", "root")))
        kept = ("packages", "services", "groups", "pools", "volumes", "loops", "links")
        return {"files": files, **{name: json.dumps(sorted(getattr(self, name))) for name in kept}}

    def install_lvm(self) -> None:
        """As its administrator did."""
        self.packages |= {"lvm2", "thin-provisioning-tools"}
        (self.root / "etc/lvm/profile").mkdir(parents=True)

    # --- what only root can do with files ------------------------------------------------------------------------------

    def set_owner(self, path: Path, owner: str, group: str) -> None:
        if self.user_id(owner) is None or (self.group_id(group) is None and group != "caddy"):
            raise HostError(f"no {owner}:{group}", code="user_missing")
        inode = path.lstat().st_ino
        self._owner_of_inode = {**getattr(self, "_owner_of_inode", {}), inode: (owner, group)}

    def is_owned(self, found: os.stat_result, owner: str, group: str) -> bool:
        return getattr(self, "_owner_of_inode", {}).get(found.st_ino, ("root", "root")) == (owner, group)

    def check_roots_own(self, path: Path) -> None:
        pass

    async def ensure_thin_pool(self, group: str, pool: str) -> None:
        await self.run("lvcreate", f"{group}/{pool}")
        profile = self.path("/etc/lvm/profile/atelier.profile")
        profile.write_text("profile\n")

    def is_block_device(self, absolute: Path) -> bool:
        return str(absolute) in self.disks

    # --- programs -------------------------------------------------------------------------------------------------------

    async def _run(self, words: Sequence[str]) -> str:
        words = list(words)
        if words[0] == "env" and "apt-get" in words:
            words = words[words.index("apt-get") :]
        self.before_command(words)
        changes = words[0] not in _LOOKING and "--simulate" not in words and words[1:2] not in (["is-active"], ["cat"])
        if self.power_until is not None and changes:
            if self.power_until == 0:
                raise Interrupted
            self.power_until -= 1
        self.ran.append(" ".join(words))
        return getattr(self, "_" + words[0].replace("-", "_"))(words[1:])

    def _fail(self, words: str) -> str:
        raise CommandError(words)

    def _dpkg_query(self, _: list[str]) -> str:
        return "".join(f"{name} installed\n" for name in sorted(self.packages))

    def _apt_get(self, words: list[str]) -> str:
        options = [word for word in words if word.startswith("-")]
        action, *names = [word for word in words if not word.startswith("-")]
        if action == "update":
            self.apt_lists = True
            return ""
        if action == "install":
            if not self.apt_lists:
                return self._fail("E: Unable to locate package")
            coming = [
                each for name in names for each in (*_COMES_WITH.get(name, ()), name) if each not in self.packages
            ]
            if "--simulate" in options:
                return "".join(f"Inst {name} (1.0)\n" for name in coming)
            self.packages |= set(coming)
            if "lvm2" in coming:
                (self.root / "etc/lvm/profile").mkdir(parents=True)
            return ""
        assert action == "purge", words
        going = [name for name in names if name in self.packages]
        going += [f"{name}-tools" for name in names if f"{name}-tools" in self.packages]
        if "--simulate" in options:
            return "".join(f"Purg {name} [1.0]\n" for name in going)
        self.packages -= set(going)
        if "lvm2" in going:
            (self.root / "etc/lvm/profile").rmdir()
            (self.root / "etc/lvm").rmdir()
        return ""

    def _useradd(self, words: list[str]) -> str:
        name = words[-1]
        with (self.root / "etc/passwd").open("a") as file:
            file.write(f"{name}:x:997:997::/var/lib/atelier:/usr/sbin/nologin\n")
        with (self.root / "etc/group").open("a") as file:
            file.write(f"{name}:x:997:\n")
        return ""

    def _usermod(self, words: list[str]) -> str:
        *_, group, name = words
        file = self.root / "etc/group"
        file.write_text(file.read_text().replace(f"{group}:x:104:\n", f"{group}:x:104:{name}\n"))
        return ""

    def _userdel(self, words: list[str]) -> str:
        (name,) = words
        for file in (self.root / "etc/passwd", self.root / "etc/group"):
            lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(f"{name}:")]
            file.write_text("".join(lines).replace(f":{name}\n", ":\n"))
        return ""

    def _sysctl(self, words: list[str]) -> str:
        name, _, value = words[-1].partition("=")
        (self.root / "proc/sys" / name.replace(".", "/")).write_text(f"{value}\n")
        return ""

    def _modprobe(self, words: list[str]) -> str:
        for name in words[1:]:
            (self.root / "sys/module" / name).mkdir()
        return ""

    def _systemctl(self, words: list[str]) -> str:
        action, *names = [word for word in words if not word.startswith("--")]
        (name,) = names or [""]
        unit = self.root / "etc/systemd/system" / name
        match action:
            case "daemon-reload":
                return ""
            case "is-active":
                return "active" if name in self.services else self._fail("inactive")
            case "is-enabled":
                return self.services.get(name) or self._fail("disabled")
            case "cat":
                return "[Unit]" if unit.is_file() or name in self.services else self._fail("no such unit")
            case "enable" | "restart":
                if not unit.is_file() and name != "caddy.service":
                    return self._fail(f"Unit {name} not found")
                self.services[name] = "enabled"
                if name == "atelier-manager.service":
                    (self.root / "run/atelier").mkdir(exist_ok=True)
                return ""
            case "disable" | "stop":
                self.services.pop(name, None)
                return ""
        raise AssertionError(words)

    def _journalctl(self, _: list[str]) -> str:
        return "its last words"

    def _vgs(self, words: list[str]) -> str:
        if "lvm2" not in self.packages:
            raise MissingProgramError("vgs is not installed")
        return "".join(f"  {name}\n" for name in self.groups)

    def _lvs(self, words: list[str]) -> str:
        if "lvm2" not in self.packages:
            raise MissingProgramError("lvs is not installed")
        group = words[-1]
        if group not in self.groups:
            return self._fail("not found")
        wants_attributes, wants_pool = "lv_name,lv_attr" in words, "lv_name,pool_lv" in words
        lines = [
            f"  {each.partition('/')[2]}" + (" twi-a-tz--" if wants_attributes else "")
            for each in self.pools
            if each.startswith(f"{group}/")
        ]
        for each, pool in self.volumes.items():
            if each.startswith(f"{group}/"):
                extra = " Vwi-a-tz--" if wants_attributes else f" {pool}" if wants_pool else ""
                lines.append(f"  {each.partition('/')[2]}{extra}")
        return "\n".join(lines) + "\n"

    def _pvs(self, words: list[str]) -> str:
        return words[-1] if words[-1] in self.signatures else self._fail("no physical volume")

    def _vgcreate(self, words: list[str]) -> str:
        *_, name, device = words
        assert device in self.disks or device in self.loops, device
        self.groups[name] = device
        self.signatures[device] = "LVM2_member"
        return ""

    def _vgremove(self, words: list[str]) -> str:
        del self.groups[words[-1]]
        return ""

    def _pvremove(self, words: list[str]) -> str:
        del self.signatures[words[-1]]
        return ""

    def _lvcreate(self, words: list[str]) -> str:
        self.pools.add(words[-1])
        return ""

    def _lvremove(self, words: list[str]) -> str:
        group, _, pool = words[-1].partition("/")
        self.pools.discard(words[-1])
        self.volumes = {
            name: of for name, of in self.volumes.items() if not (name.startswith(f"{group}/") and of == pool)
        }
        return ""

    def _losetup(self, words: list[str]) -> str:
        if "--associated" in words:
            return "".join(f"{device}\n" for device, file in self.loops.items() if file == words[-1])
        if "--detach" in words:
            self.signatures.pop(words[-1], None)
            del self.loops[words[-1]]
            return ""
        self.loops[f"/dev/loop{len(self.loops)}"] = words[-1]
        return ""

    def _wipefs(self, words: list[str]) -> str:
        found = self.signatures.get(words[-1])
        return f"# offset,uuid,label,type\n0x1,,,{found}\n" if found else ""

    def _lsblk(self, words: list[str]) -> str:
        name = Path(words[-1]).name
        return f"{name} {self.signatures.get(words[-1], '')}\n"

    def _visudo(self, words: list[str]) -> str:
        text = Path(words[-1].partition("=")[2]).read_text()
        return "" if "NOPASSWD" in text else self._fail("syntax error")

    def _runuser(self, words: list[str]) -> str:
        if "--prepare" in words:
            folder = self.root / "var/lib/atelier/data"
            assert folder.is_dir()
            (folder / "atelier.db").write_text("rows")
            return "k3v2\n"
        if "--down" in words:
            return ""
        raise AssertionError(words)

    def _ip(self, words: list[str]) -> str:
        name = words[-1]
        if name not in self.links:
            return self._fail("does not exist")
        return json.dumps([{"ifname": name, "ifalias": self.links[name]}])

    def _ss(self, words: list[str]) -> str:
        port = int(words[-1].rpartition(":")[2])
        return self.ports.get(port, "")

    def _systemd_tmpfiles(self, _: list[str]) -> str:
        return ""


_LOOKING = frozenset({"dpkg-query", "vgs", "lvs", "pvs", "wipefs", "lsblk", "ip", "ss", "visudo", "journalctl"})

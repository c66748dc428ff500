"""What root has decided about this host, in a file that root alone can write: who may ask, and what may be touched.

Read by the privileged helper program at its start, written by ``atelier host init``. Nothing that the asking side says can
widen it.
"""

from __future__ import annotations

import json
import os
import pwd
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from atelier.model.errors import HostError
from atelier.model.lvm_names import is_group_name, is_installation_id

ROOT_SETTINGS = Path("/etc/atelier/privileged.json")


@dataclass(frozen=True, slots=True)
class RootSettings:
    """``user``: whom Atelier's manager runs as, to whom devices and sockets are given. ``volume_group``, ``thin_pool``:
    empty where disks are files. ``jails``: the folder that Firecracker's machines live in; ``firecracker``, ``jailer``: the
    programs; empty where there is no Firecracker."""

    user: str
    installation_id: str
    volume_group: str = ""
    thin_pool: str = ""
    jails: str = ""
    firecracker: str = ""
    jailer: str = ""

    @property
    def owner(self) -> tuple[int, int]:
        """User and group id. Raises HostError (``user_missing``)."""
        try:
            found = pwd.getpwnam(self.user)
        except KeyError:
            raise HostError(
                f"this host has no user {self.user}", code="user_missing", hint="as root: atelier host init"
            ) from None
        return found.pw_uid, found.pw_gid


def root_settings_text(settings: RootSettings) -> bytes:
    """What the file holds."""
    return json.dumps(asdict(settings), indent=1).encode() + b"\n"


def read_root_settings(path: Path = ROOT_SETTINGS) -> RootSettings:
    """Raises HostError (``root_settings_missing``, ``root_settings_unsafe``, ``root_settings_damaged``)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(
            f"{path} cannot be read: {error.strerror}",
            code="root_settings_missing",
            hint="as root: atelier host init, which writes it",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise HostError(
                f"{path} can be written by others than root",
                code="root_settings_unsafe",
                hint=f"look what is in it, then: chown root:root {path} && chmod 644 {path}",
            )
        text = file.read()
    try:
        return _parse(cast("dict[str, Any]", json.loads(text)))
    except (ValueError, TypeError, AttributeError) as error:
        raise HostError(
            f"{path} is not what atelier host init writes: {error}",
            code="root_settings_damaged",
            hint="as root: atelier host init",
        ) from error


def _parse(told: dict[str, Any]) -> RootSettings:
    settings = RootSettings(**told)
    if any(not isinstance(value, str) for value in told.values()):
        raise TypeError("all values are words")
    if not is_installation_id(settings.installation_id):
        raise ValueError(f"{settings.installation_id!r} is no installation's id")
    for name in (settings.volume_group, settings.thin_pool):
        if name and not is_group_name(name):
            raise ValueError(f"{name!r} is no name of LVM's")
    for path in (settings.jails, settings.firecracker, settings.jailer):
        if path and not (Path(path).is_absolute() and ".." not in Path(path).parts):
            raise ValueError(f"{path!r} is no absolute path")
    return settings

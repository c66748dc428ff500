"""Root's side of the VMMs: limits of QEMU's machines, and Firecracker's jails. Where those lie, which programs run in them and
whose devices they may get is root's to say; the rest is ``host.jail_verbs``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from atelier.host.jail_verbs import JailVerbs, Verb
from atelier.host.jails import RootJails, root_host
from atelier.host_setup.root_settings import RootSettings
from atelier.host_setup.scope_verbs import ScopeVerbs
from atelier.host_setup.sudo_access import check_roots_own
from atelier.model.errors import HostError
from atelier.model.lvm_names import LvmKind, LvmName

_DEVICES = Path("/sys/dev/block")


def vmm_verbs(settings: RootSettings) -> Mapping[str, Verb]:
    """Those of jails where root's settings name a folder for them. Raises HostError (``firecracker_missing``,
    ``program_not_roots``)."""
    verbs = ScopeVerbs(settings).verbs
    return {**verbs, **_jail_verbs(settings)} if settings.jails else verbs


def _jail_verbs(settings: RootSettings) -> Mapping[str, Verb]:
    programs = (Path(settings.firecracker), Path(settings.jailer))
    if not all(program.is_file() for program in programs):
        raise HostError(
            "root's settings name a Firecracker and a jailer that are not there",
            code="firecracker_missing",
            hint="as root: atelier host firecracker",
        )
    for program in programs:
        check_roots_own(program)
    user_id, group_id = settings.owner
    host = root_host(settings.installation_id, Path(settings.jails), *programs, user_id=user_id, group_id=group_id)
    return JailVerbs(RootJails(host, may_have_device=lambda device: is_own_volume(settings, device))).verbs


def is_own_volume(settings: RootSettings, device: int, devices: Path = _DEVICES) -> bool:
    """Whether the block device of this number is the volume of a sandbox of this installation's."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        name = (devices / number / "dm" / "name").read_text().strip()
    except OSError:
        return False
    # Source: lvm2 lib/misc/lvm-string.c: a device is called group-volume, with the hyphens in both doubled.
    group = settings.volume_group.replace("-", "--")
    if not group or not name.startswith(f"{group}-") or name.startswith(f"{group}--"):
        return False
    parsed = LvmName.parse(name[len(group) + 1 :].replace("--", "-"))
    return parsed is not None and (parsed.installation_id, parsed.kind) == (settings.installation_id, LvmKind.VOLUME)

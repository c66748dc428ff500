"""What a production host has besides: ``ATELIER_VMM``, ``ATELIER_FIRECRACKER``, ``ATELIER_JAILER``, ``ATELIER_JAILS_DIR``,
``ATELIER_VOLUME_GROUP``, ``ATELIER_THIN_POOL``, ``ATELIER_COMPANIONS``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from atelier.config.choices import choose
from atelier.config.errors import InvalidSettingError

_LVM_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,126}")


class VmmChoice(StrEnum):
    """``auto``: Firecracker where its program is, else QEMU."""

    AUTO = "auto"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"


class CompanionChoice(StrEnum):
    """``kept``: the manager starts and watches gateway and network holder; ``services``: the host's service manager does,
    and the manager waits for them."""

    KEPT = "kept"
    SERVICES = "services"


@dataclass(frozen=True, slots=True)
class ProductionSettings:
    """``volume_group`` empty: disks are files. Programs that are not named lie where ``atelier host firecracker`` puts
    them."""

    vmm: VmmChoice
    firecracker: Path
    jailer: Path
    jails_dir: Path
    volume_group: str
    thin_pool: str
    companions: CompanionChoice


def load_production(variables: Mapping[str, str], data_dir: Path) -> ProductionSettings:
    """Raises InvalidSettingError."""
    return ProductionSettings(
        vmm=choose(VmmChoice, variables, "ATELIER_VMM", VmmChoice.AUTO),
        firecracker=_program(variables, "ATELIER_FIRECRACKER", "/usr/local/lib/atelier/firecracker"),
        jailer=_program(variables, "ATELIER_JAILER", "/usr/local/lib/atelier/jailer"),
        jails_dir=Path(variables.get("ATELIER_JAILS_DIR") or data_dir.parent / "jails").absolute(),
        volume_group=lvm_name(variables.get("ATELIER_VOLUME_GROUP", ""), "ATELIER_VOLUME_GROUP", may_be_empty=True),
        thin_pool=lvm_name(variables.get("ATELIER_THIN_POOL") or "atelier", "ATELIER_THIN_POOL"),
        companions=choose(CompanionChoice, variables, "ATELIER_COMPANIONS", CompanionChoice.KEPT),
    )


def lvm_name(text: str, variable: str, *, may_be_empty: bool = False) -> str:
    """A name that LVM takes for a volume group or a volume. Source: lvm(8), VALID NAMES."""
    if (text or not may_be_empty) and (not _LVM_NAME.fullmatch(text) or text in (".", "..")):
        raise InvalidSettingError(variable, text, hint="letters, digits and + _ . -, not beginning with -")
    return text


def _program(variables: Mapping[str, str], variable: str, default: str) -> Path:
    path = Path(variables.get(variable) or default)
    if not path.is_absolute():
        raise InvalidSettingError(variable, str(path), hint="an absolute path")
    return path

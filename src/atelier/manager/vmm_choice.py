"""Whether the machines of a production host are Firecracker's. Called by ``wiring``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from atelier.drivers.vmm.firecracker_version import read_version
from atelier.model.errors import AtelierError, MissingProgramError

logger = logging.getLogger(__name__)


async def takes_firecracker(choice: Literal["auto", "firecracker", "qemu"], executable: Path, jailer: Path) -> bool:
    """``auto``: where both programs are there and can be used; the log says why they are not taken, and QEMU with KVM is
    the second choice, which says itself why that does not work. ``firecracker``: raises MissingProgramError, VmmError
    with the remedy where they cannot be used."""
    if choice == "qemu":
        return False
    try:
        await read_version(executable)
        if not os.access(jailer, os.X_OK):
            raise MissingProgramError(
                f"there is no jailer at {jailer}", hint="as root: atelier host firecracker, or set ATELIER_JAILER"
            )
    except AtelierError as error:
        if choice == "firecracker":
            raise
        logger.warning("machines are QEMU's, under KVM: %s", error)
        return False
    return True

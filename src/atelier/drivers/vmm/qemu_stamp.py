"""What a saved machine depends on beside its own files: QEMU, the machine it plays, the processor, the counter's rate.

Called by the QEMU driver.
"""

from __future__ import annotations

import re
from pathlib import Path

from atelier.drivers.vmm.processor import read_processor
from atelier.drivers.vmm.qemu_arguments import MACHINE_TYPE, AcceleratorKind
from atelier.host import command
from atelier.model.errors import VmmError
from atelier.model.machine import MachineStamp

_FORMAT = 1
"""To be raised with every change of the devices that a machine has, or of their order."""

_VERSION = re.compile(r"version (\d+\.\d+\.\d+)")


async def read_version(executable: Path) -> str:
    """``major.minor.micro``, as ``query_version`` tells it of one that runs. Raises VmmError, CommandError."""
    said = (await command.run([str(executable), "--version"])).stdout.decode(errors="replace")
    if found := _VERSION.search(said):
        return found[1]
    raise VmmError(f"{executable} does not say its version: {said.strip()[:200]!r}")


def vmm_name(accelerator: AcceleratorKind) -> str:
    return f"qemu-{accelerator}"


def make_stamp(version: str, accelerator: AcceleratorKind, tsc_khz: int, network_kind: str) -> MachineStamp:
    """Under emulation the guest sees QEMU's own processor, whatever the host's is, but for the counter's rate."""
    model, flags = ("max", "") if accelerator == "tcg" else read_processor()
    return MachineStamp(
        vmm=vmm_name(accelerator),
        vmm_version=version,
        machine_type=MACHINE_TYPE,
        cpu_model=model,
        cpu_flags=flags,
        tsc_khz=tsc_khz if accelerator == "tcg" else 0,
        network_kind=network_kind,
        format=_FORMAT,
    )

"""Starts one confined QEMU: a user of its own, every file handed over open, its limits.

Called by the QEMU driver for machines of sandboxes and for those that only bake.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.vmm.kvm_probe import kvm_group_ids
from atelier.drivers.vmm.qemu_arguments import (
    AcceleratorKind,
    EmptyDisk,
    OpenDisk,
    OpenMemory,
    kernel_command_line,
    machine_arguments,
    process_name,
)
from atelier.drivers.vmm.run_folder import RunFolder, opened_machine
from atelier.drivers.vmm.vmm_users import UserRange, claim_user
from atelier.host import processes
from atelier.host.processes import ResourceLimits
from atelier.model.errors import MissingProgramError
from atelier.model.machine import MachineSpec, ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits

PROGRAM = "qemu-system-x86_64"
_OPEN_FILES_LIMIT = 256
_MIB = 1024 * 1024
_OWN_MEMORY_MIB = 256
"""Beside its guest's memory: 40 MiB of its own, its stacks, a code cache where it emulates, what it has open of files."""
_OWN_TASKS = 80
"""Beside its processors: QEMU's pool of threads for disks grows to 64."""


@dataclass(frozen=True, slots=True)
class QemuHost:
    """What is the same for all machines here."""

    installation_id: str
    accelerator: AcceleratorKind
    tsc_khz: int
    users: UserRange | None


@dataclass(frozen=True, slots=True)
class FileLimits:
    """See ``disk_growth.file_size_limits``."""

    file_size_bytes: int
    ceiling_bytes: int


def machine_limits(spec: MachineSpec) -> ProcessorAndMemoryLimits:
    """Of the whole QEMU process: its guest, and what it needs itself."""
    return ProcessorAndMemoryLimits(
        spec.vcpu_count, (spec.memory_mib + _OWN_MEMORY_MIB) * _MIB, spec.vcpu_count + _OWN_TASKS
    )


def find_executable() -> Path:
    found = shutil.which(PROGRAM)
    if found is None:
        raise MissingProgramError(f"{PROGRAM} is not installed", hint="apt-get install qemu-system-x86")
    return Path(found)


async def launch(
    host: QemuHost,
    name: str,
    spec: MachineSpec,
    *,
    disks: Sequence[OpenDisk | EmptyDisk],
    limits: FileLimits,
    memory: OpenMemory | None = None,
    network_descriptor: int | None = None,
    boots: bool = True,
) -> ProcessIdentity:
    """Start the machine of ``spec`` under ``name``; one that does not boot waits for a state to be loaded.

    Raises VmmError when a file is missing, CommandError when QEMU ends at once, CapacityError.
    """
    folder = RunFolder(spec.run_directory)
    with contextlib.ExitStack() as stack:
        descriptors = stack.enter_context(opened_machine(folder, spec.boot if boots else None))
        claim = stack.enter_context(claim_user(host.users, spec.sandbox_id)) if host.users else None
        if memory is not None and memory.shared and claim is not None:
            # It is opened once more, by its name in /proc.
            os.fchown(memory.descriptor, claim.user_id, claim.user_id)
        arguments = machine_arguments(
            find_executable(),
            process_name(host.installation_id, name),
            accelerator=host.accelerator,
            vcpu_count=spec.vcpu_count,
            memory_mib=spec.memory_mib,
            command_line=kernel_command_line(host.accelerator, host.tsc_khz),
            descriptors=descriptors,
            disks=tuple(disks),
            network=spec.network,
            network_descriptor=network_descriptor,
            memory=memory,
        )
        groups = (kvm_group_ids() or ()) if host.accelerator == "kvm" else ()
        return await processes.start_detached(
            arguments,
            stderr_path=folder.stderr,
            user=claim.process_user(groups) if claim else None,
            limits=ResourceLimits(_OPEN_FILES_LIMIT, limits.file_size_bytes, limits.ceiling_bytes, core_bytes=0),
            pass_descriptors=[
                *descriptors.all,
                *(descriptor for disk in disks for descriptor in disk.descriptors),
                *([claim.claim_descriptor] if claim else []),
                *([network_descriptor] if network_descriptor is not None else []),
                *([memory.descriptor] if memory else []),
            ],
        )

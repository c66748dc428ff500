"""Whether KVM really runs a guest here. A ``/dev/kvm`` proves nothing: on some machines a guest hangs on it for ever.

Called by the QEMU driver. It boots our own kernel and initramfs with ``atelier.probe`` on the command line, confined
as every machine; the initramfs answers on the console and powers off. The answer is kept for this boot, QEMU and kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from atelier.drivers.vmm.qemu_arguments import kernel_command_line, machine_arguments
from atelier.drivers.vmm.run_folder import RunFolder, opened_machine
from atelier.drivers.vmm.vmm_users import UserRange, claim_user
from atelier.host.files import read_tail, write_atomically
from atelier.host.processes import ResourceLimits, boot_id, kill_and_wait, start_detached, wait_ended
from atelier.model.errors import AtelierError
from atelier.model.machine import BootFiles

PROBE_ARGUMENT = "atelier.probe"
PROBE_ANSWER = b"ATELIER-PROBE-OK"

_KVM_NODE = Path("/dev/kvm")
_TIME_LIMIT_SECONDS = 3.0
_DEMANDED_TIME_LIMIT_SECONDS = 60.0
"""Where nothing else is to be had: a host whose own processor is emulated takes that long."""
_MEMORY_MIB = 128
_CONSOLE_LIMIT_BYTES = 64 * 1024
_FALLBACK_HINT = "software emulation is used instead"


@dataclass(frozen=True, slots=True)
class KvmAnswer:
    """``reason`` is a sentence for people, also when KVM is usable; ``hint`` says what would mend it."""

    usable: bool
    reason: str
    hint: str = ""


async def probe_kvm(
    executable: Path,
    qemu_version: str,
    boot: BootFiles,
    cache_file: Path,
    users: UserRange | None,
    *,
    is_demanded: bool = False,
) -> KvmAnswer:
    """Kept answer, or that of a tiny guest within 3 s; within 60 s where KVM ``is_demanded``. Never raises for a KVM that
    does not work."""
    # Asked each time: rights to the node may be given at any moment.
    if obstacle := find_node_obstacle(_KVM_NODE, users):
        return obstacle
    key = {
        "boot_id": boot_id(),
        "qemu_version": qemu_version,
        "kernel": str(boot.kernel),
        "users": users is not None,
        "is_demanded": is_demanded,
    }
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        kept = json.loads(cache_file.read_bytes())
        if kept["key"] == key:
            return KvmAnswer(**kept["answer"])
    answer = await boot_tiny_guest(executable, boot, users, is_demanded=is_demanded)
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache_file, json.dumps({"key": key, "answer": asdict(answer)}).encode(), durable=False)
    return answer


def find_node_obstacle(node: Path, users: UserRange | None) -> KvmAnswer | None:
    """Why a VMM could not even open the node, or None."""
    if not node.exists():
        return KvmAnswer(False, f"there is no {node}", "enable virtualization in firmware or hypervisor")
    if users is None:
        if not os.access(node, os.R_OK | os.W_OK):
            return KvmAnswer(False, f"this user may not open {node}", "sudo usermod -aG kvm $USER, then log in again")
    elif kvm_group_ids(node) is None:
        return KvmAnswer(
            False, f"only root may open {node}, and VMMs do not run as root", f"chgrp kvm {node} && chmod 660 {node}"
        )
    return None


def kvm_group_ids(node: Path = _KVM_NODE) -> tuple[int, ...] | None:
    """The supplementary groups by which a VMM with a user id of its own may open the node; None if none would help."""
    found = node.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o006 == 0o006:
        return ()
    if mode & 0o060 == 0o060 and found.st_gid != 0:
        return (found.st_gid,)
    return None


async def boot_tiny_guest(
    executable: Path, boot: BootFiles, users: UserRange | None, *, is_demanded: bool = False
) -> KvmAnswer:
    """The proof itself: boot, answer, power off, within the limit."""
    limit_seconds = _DEMANDED_TIME_LIMIT_SECONDS if is_demanded else _TIME_LIMIT_SECONDS
    hint = "" if is_demanded else _FALLBACK_HINT
    with tempfile.TemporaryDirectory(prefix="atelier-kvm-") as directory, contextlib.ExitStack() as stack:
        folder = RunFolder(Path(directory))
        descriptors = stack.enter_context(opened_machine(folder, boot))
        claim = stack.enter_context(claim_user(users, "kvm-probe")) if users else None
        arguments = machine_arguments(
            executable,
            "atelier-kvm-probe",
            accelerator="kvm",
            vcpu_count=1,
            memory_mib=_MEMORY_MIB,
            command_line=kernel_command_line("kvm", 0, (PROBE_ARGUMENT,)),
            descriptors=descriptors,
        )
        passed = [*descriptors.all, *([claim.claim_descriptor] if claim else [])]
        try:
            identity = await start_detached(
                arguments,
                stderr_path=folder.stderr,
                user=claim.process_user(kvm_group_ids() or ()) if claim else None,
                limits=ResourceLimits(open_files=256, file_size_bytes=1024 * 1024),
                pass_descriptors=passed,
            )
            try:
                async with asyncio.timeout(limit_seconds):
                    await wait_ended(identity)
            except TimeoutError:
                return KvmAnswer(
                    False,
                    f"a guest under KVM did not come up within {limit_seconds:g} s",
                    hint,
                )
            finally:
                await kill_and_wait(identity)
        except AtelierError as error:
            return KvmAnswer(False, f"a guest under KVM could not be started: {error.message}", error.hint)
        if PROBE_ANSWER in read_tail(folder.console, _CONSOLE_LIMIT_BYTES):
            return KvmAnswer(True, "a guest booted under KVM")
        said = read_tail(folder.stderr, 1000).decode(errors="replace").splitlines()
        first = said[0] if said else "QEMU said nothing"
        return KvmAnswer(False, f"a guest under KVM ended without an answer: {first}", hint)

"""What the privileged helper moves into a scope: machines of its own installation's and user's, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from atelier.drivers.vmm.confinement import AskedConfinement
from atelier.drivers.vmm.qemu_arguments import process_name
from atelier.host import machine_scopes, processes
from atelier.host_setup.root_settings import RootSettings
from atelier.host_setup.scope_verbs import ScopeVerbs
from atelier.model.errors import HostError
from atelier.model.machine import ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits

SANDBOX, INSTALLATION = "aaaaaaaaaaaa", "abcd"
LIMITS = ProcessorAndMemoryLimits(2, 1 << 30, 82)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[ProcessIdentity]:
    """A process that looks like a machine: of QEMU's name, with a machine's."""
    program = tmp_path / "qemu-system-x86_64"
    program.write_bytes(Path("/bin/bash").read_bytes())
    program.chmod(0o755)
    words = [program, "-c", "read -r", "-name", process_name(INSTALLATION, SANDBOX)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        identity = processes.find_identity(process.pid)
        assert identity is not None
        yield identity
        process.kill()


class Moved:
    """Stands in for systemd, which no test may ask; ``tests/host`` has a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, systemd: bool = True) -> None:
        self.calls: list[tuple[object, ...]] = []
        monkeypatch.setattr(machine_scopes, "is_possible", lambda: systemd)
        monkeypatch.setattr(machine_scopes, "confine", self.confine)

    async def confine(self, *arguments: object) -> None:
        self.calls.append(arguments)


class Helper:
    """The asking side's way to root, without a process between."""

    def __init__(self, user: str = "root") -> None:
        self._verbs = ScopeVerbs(RootSettings(user, INSTALLATION)).verbs

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        return await self._verbs[verb](fields)


@pytest.mark.skipif(os.geteuid() != 0, reason="the machine of a test is this user's, and the manager's is named root")
async def test_a_machine_is_moved_with_its_limits(machine: ProcessIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(monkeypatch)
    await AskedConfinement(Helper()).confine(SANDBOX, machine, LIMITS)
    assert moved.calls == [(f"at-{INSTALLATION}-{SANDBOX}", machine, LIMITS)]


@pytest.mark.skipif(os.geteuid() != 0, reason="the machine of a test is this user's, and the manager's is named root")
async def test_without_systemd_nothing_is_moved(machine: ProcessIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(monkeypatch, systemd=False)
    await AskedConfinement(Helper()).confine(SANDBOX, machine, LIMITS)
    assert moved.calls == []


@pytest.mark.parametrize("whose", ["another sandbox's", "another user's", "no machine", "an earlier one's pid"])
async def test_what_is_no_machine_of_the_managers_is_left_alone(
    machine: ProcessIdentity, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    moved = Moved(monkeypatch)
    process, sandbox, user = machine, SANDBOX, "root"
    match whose:
        case "another sandbox's":
            sandbox = "bbbbbbbbbbbb"
        case "another user's":
            user = "nobody"
        case "no machine":
            found = processes.find_identity(os.getpid())
            assert found is not None
            process = found
        case _:
            process = ProcessIdentity(machine.pid, machine.start_time_ticks - 1, machine.boot_id)
    with pytest.raises(HostError) as refused:
        await AskedConfinement(Helper(user)).confine(sandbox, process, LIMITS)
    assert refused.value.code == "process_refused"
    assert moved.calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"sandbox_id": "../../x"},
        {"limits": {"processors": 0, "memory_bytes": 1, "tasks": 1}},
        {"limits": {"processors": True, "memory_bytes": 1, "tasks": 1}},
        {"limits": {"processors": 1}},
        {"process": {"pid": -1, "start_time_ticks": 1, "boot_id": ""}},
        {"process": 7},
        {"more": 1},
    ],
)
async def test_what_is_no_request_is_refused(machine: ProcessIdentity, change: dict[str, Any]) -> None:
    request = {"sandbox_id": SANDBOX, "process": asdict(machine), "limits": asdict(LIMITS), **change}
    with pytest.raises((TypeError, ValueError)):
        await Helper().ask("confine", **request)

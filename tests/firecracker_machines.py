"""Machines of the Firecracker driver over the fake Firecracker, which holds every request and answer against the vendor's
document.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.fake_firecracker.document import find_document

from atelier.drivers.vmm.asked_jails import AskedJails
from atelier.drivers.vmm.firecracker import FirecrackerVmm
from atelier.drivers.vmm.firecracker_launch import MachineChoices
from atelier.drivers.vmm.vmm_users import find_user_range
from atelier.host.jail_verbs import JailVerbs
from atelier.host.jails import JailHost, RootJails
from atelier.model.jail import JailPlaces
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    TOOLS_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    MachineSpec,
    NetworkAttachment,
)

VERSION = "1.16.1"
DISK_MIB = 16
MEMORY_MIB = 32
_PROGRAM = Path(__file__).resolve().parent / "fake_firecracker" / "program.py"
_KERNEL = b"\x7fELF, as far as anybody looks"


class FakeTaps:
    """TAPs are files that the fake machine looks at: they hold ``up`` or ``down``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.owners: dict[str, int] = {}

    def set_owner(self, name: str, user_id: int) -> None:
        self.owners[name] = user_id

    def set_link(self, name: str, *, up: bool) -> None:
        (self._folder / f"tap-{name}").write_text("up" if up else "down")


class _Helper:
    """The privileged helper's verbs, in this process."""

    def __init__(self, jails: RootJails) -> None:
        self._verbs = JailVerbs(jails).verbs

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        return json.loads(json.dumps(await self._verbs[verb](json.loads(json.dumps(fields)))))


class FirecrackerStand:
    """A driver with all that it needs, below ``folder``; sandboxes have their run directories there."""

    def __init__(
        self,
        folder: Path,
        installation_id: str,
        *,
        version: str = VERSION,
        agent: Path | None = None,
        choices: MachineChoices | None = None,
    ) -> None:
        self.folder = folder
        self.installation_id = installation_id
        # A machine's user passes through, to what it was given.
        folder.chmod(0o755)
        self.said = folder / "said"
        self.said.mkdir(exist_ok=True)
        self.said.chmod(0o777)
        self.executable = folder / "firecracker"
        self.install(version)
        document = find_document()
        assert document is not None
        python = Path(sys.executable)
        words = [str(python), "-P", str(_PROGRAM), "--fake-folder", str(self.said), "--fake-document", str(document)]
        words += ["--fake-version", version]
        if agent is not None:
            words += ["--fake-agent", str(agent), "--fake-unconfined"]
        self.taps = FakeTaps(self.said)
        host = JailHost(
            installation_id,
            JailPlaces(folder / "jails", self.executable.name),
            self.executable,
            tuple(words),
            (python.resolve().name,),
            os.geteuid(),
            os.getegid(),
        )
        self.jails = RootJails(host, taps=self.taps)
        # As a manager that is not root has them: by requests as JSON.
        asked = AskedJails(_Helper(self.jails), self.jails.places)
        self.vmm = FirecrackerVmm(installation_id, asked, self.executable, users=find_user_range(), choices=choices)

    def install(self, version: str) -> None:
        self.executable.write_text(f'#!/bin/sh\necho "Firecracker v{version}"\necho\n')
        self.executable.chmod(0o755)

    def spec(self, sandbox_id: str, *, network: NetworkAttachment | None = None) -> MachineSpec:
        images = self.folder / "images"
        images.mkdir(mode=0o700, exist_ok=True)
        for name, content in (("kernel", _KERNEL), ("initramfs", b"initramfs"), ("tools", bytes(4096))):
            (images / name).write_bytes(content)
            (images / name).chmod(0o444)
        boot = BootFiles(images / "kernel", images / "initramfs", images / "tools", "6.1", "tools")
        return MachineSpec(
            sandbox_id=sandbox_id,
            installation_id=self.installation_id,
            vcpu_count=1,
            memory_mib=MEMORY_MIB,
            boot=boot,
            root=self.disk(sandbox_id),
            tools=Disk(TOOLS_DISK_SERIAL, DiskFile(images / "tools", "raw"), read_only=True),
            network=network or NetworkAttachment("none"),
            run_directory=self.folder / sandbox_id,
        )

    def disk(self, name: str, of: Path | None = None) -> Disk:
        """A raw volume; a copy of ``of``'s bytes."""
        path = self.folder / f"{name}.raw"
        if of is not None:
            shutil.copyfile(of, path)
        else:
            with path.open("wb") as file:
                file.truncate(DISK_MIB * 1024 * 1024)
        path.chmod(0o600)
        return Disk(ROOT_DISK_SERIAL, DiskFile(path, "raw"))

    async def started(self, spec: MachineSpec) -> MachineSpec:
        await self.vmm.ensure_run_directory(spec.sandbox_id, spec.run_directory)
        await self.vmm.ensure_started(spec)
        return spec

    # --- what the fake is told, and tells -----------------------------------------------------------------------------

    def misbehave(self, request: str = "", **fault: Any) -> None:
        """From now on, at this request: ``kind`` is answer (status, message), nonsense (bytes), close, hang (seconds) or
        die. Without a request: behave."""
        path = self.said / "faults.json"
        path.write_text(json.dumps({request: fault} if request else {}))
        path.chmod(0o644)

    def requests(self) -> list[tuple[str, Any]]:
        """(method and path, body) of all requests but questions."""
        return [
            (f"{each['method']} {each['path']}", each["body"])
            for each in self._lines("requests")
            if each["method"] != "GET"
        ]

    def forget_requests(self) -> None:
        (self.said / "requests").unlink(missing_ok=True)

    def breaches(self) -> list[Any]:
        """Requests and answers that the vendor's document does not allow."""
        return self._lines("breaches")

    def _lines(self, name: str) -> list[Any]:
        path = self.said / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tapped(spec: MachineSpec, device: str) -> MachineSpec:
    return replace(spec, network=NetworkAttachment("tap", "02:00:00:00:00:01", None, device))

"""A production host without hardware: QEMU in software emulation, with systemd, device-mapper and a working /dev/kvm inside.

It is booted once per run, given the package as it is in this checkout, and saved; each test's host begins from there,
in seconds, over disks of its own. Commands run inside as root, by ``agent`` behind a virtio-serial port, so the machine
needs no network. Python is some 16 times slower inside: nothing here asserts a duration.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tests.host.guest_files import pack_guest_files
from tests.host.host_image import HostImage
from tests.real_machines import REPOSITORY

LVM_DISK = "/dev/vdb"
LVM_DISK_SIZE = "3G"
SITE_PACKAGES = "/opt/atelier/venv/lib/python3.11/site-packages"
PYTHON = "/opt/atelier/venv/bin/python"
CHECKOUT = "/opt/atelier/checkout"
FIRECRACKER = f"{CHECKOUT}/firecracker-release"
_PROGRAM_SERVER = f"{CHECKOUT}/tests/host/program_server.py"
_PARCEL_BYTES = 64 * 1024 * 1024
_MEMORY = "3G"
_BOOT_SECONDS = 600.0
_COMMAND_SECONDS = 300.0
_SAVE_SECONDS = 300.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class SavedHost:
    """A booted host at rest: its disks, which others stand over, and its memory and devices."""

    image: HostImage
    disk: Path
    lvm_disk: Path
    parcel: Path
    guest_files: Path
    state: Path


class EmulatedHost:
    """One machine, in ``folder``, until ``end``. Not for use by several threads at once."""

    def __init__(
        self, image: HostImage, folder: Path, disk: Path, lvm_disk: Path, parcel: Path, guest_files: Path
    ) -> None:
        self.disk, self.lvm_disk = disk, lvm_disk
        self._folder = folder
        self._console = folder / "console"
        self._numbers = itertools.count(1)
        self._received = b""
        self._words = [
            *(
                "setpriv",
                "--pdeathsig",
                "KILL",
                "qemu-system-x86_64",
                "-M",
                "q35",
                "-accel",
                "tcg,thread=multi,tb-size=512",
                "-cpu",
                "EPYC-Rome",
            ),
            *("-smp", "2", "-m", _MEMORY, "-nodefaults", "-nographic", "-monitor", "none"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            "-append",
            "console=ttyS0 root=/dev/vda rw mitigations=off net.ifnames=0 tsc=reliable no_timer_check panic=-1",
            *_drive("root", disk, "qcow2"),
            *_drive("lvm", lvm_disk, "qcow2"),
            *_drive("parcel", parcel, "raw", read_only=True),
            *_drive("guest-files", guest_files, "raw", read_only=True),
            *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={folder / 'agent'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=atelier.test"),
            *("-serial", f"file:{self._console}", "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None

    def start(self, state: Path | None = None) -> None:
        """Boot it, or let it go on from ``state``; returns when it carries out commands."""
        incoming = ["-incoming", f"exec:cat {state}"] if state else []
        with (self._folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._words, *incoming], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if state:
            self._qmp_until("query-status", lambda told: told["status"] in ("paused", "postmigrate"), _SAVE_SECONDS)
            self._qmp("cont")
        self._greet()
        if state:
            # The clock stands where the machine was saved.
            self.run(f"date -s @{int(time.time())}")

    def save(self, state: Path) -> None:
        """Write the machine to ``state``; it stands still from then on."""
        self.run("sync")
        self._disconnect()
        self._qmp("stop")
        self._qmp("migrate-set-parameters", {"max-bandwidth": 8 << 30})
        self._qmp("migrate", {"uri": f"exec:cat >{state}"})
        self._qmp_until("query-migrate", lambda told: told.get("status") == "completed", _SAVE_SECONDS)

    def end(self) -> None:
        """As if the plug was pulled."""
        self._disconnect()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reboot(self) -> None:
        """In order, by systemd; returns when it carries out commands again."""
        ask_boot = {"words": ["cat", "/proc/sys/kernel/random/boot_id"], "input": "", "seconds": 60}
        before = self._ask(ask_boot, 60)["out"]
        self.run("systemctl --no-block reboot")
        limit = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < limit:
            # A question that the end comes in between to is answered by nobody.
            with contextlib.suppress(TimeoutError):
                if self._ask(ask_boot, 5)["out"] != before:
                    return
        raise TimeoutError(f"the emulated host did not come back: {self.console_tail()}")

    def pull_the_plug(self) -> None:
        """A power cut: what was not flushed is lost; then it boots anew."""
        self._qmp("system_reset")
        self._received = b""
        self._greet()

    def run(
        self, script: str, *, user: str = "", given: bytes = b"", seconds: float = _COMMAND_SECONDS, check: bool = True
    ) -> Outcome:
        """Run a shell script as root, or as ``user``. Raises AssertionError with what it said unless it exits with 0."""
        words = ["bash", "-euo", "pipefail", "-c", script]
        if user:
            words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env", *words]
        request = {"words": words, "input": base64.b64encode(given).decode(), "seconds": seconds}
        answer = self._ask(request, seconds + 60)
        outcome = Outcome(
            answer["status"],
            base64.b64decode(answer["out"]).decode(errors="replace"),
            base64.b64decode(answer["err"]).decode(errors="replace"),
        )
        assert not answer["late"], f"{script}\ndid not end within {seconds:g} s\n{outcome.out}\n{outcome.err}"
        assert not check or outcome.status == 0, f"{script}\nexit status {outcome.status}\n{outcome.out}\n{outcome.err}"
        return outcome

    def run_program(
        self,
        module: str,
        *words: str,
        user: str = "root",
        variables: Mapping[str, str] | None = None,
        seconds: float = _COMMAND_SECONDS,
        check: bool = True,
    ) -> Outcome:
        """``python -P -m module words...``, as ``run``, but forked from a process that has imported it
        (``program_server``)."""
        calling = program_words(module, *words, user=user, variables=variables)
        return self.run(f"{calling} </dev/null", seconds=seconds, check=check)

    def write(self, path: str, content: str | bytes, mode: str = "0644") -> None:
        data = content.encode() if isinstance(content, str) else content
        self.run(f"install -D -m {mode} /dev/stdin '{path}'", given=data)

    def read(self, path: str) -> str:
        return self.run(f"cat '{path}'").out

    def console_tail(self) -> str:
        """What the machine has last said on its serial line."""
        return self._console.read_bytes()[-3000:].decode(errors="replace") if self._console.exists() else ""

    def _ask(self, request: dict[str, object], seconds: float) -> dict[str, object]:
        number = next(self._numbers)
        self._connected().sendall(b"\n" + json.dumps({**request, "number": number}).encode() + b"\n")
        limit = time.monotonic() + seconds
        while True:
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                    if answer["number"] == number:
                        return answer
            if time.monotonic() > limit:
                raise TimeoutError(f"the emulated host does not answer: {self.console_tail()}")
            self._receive()

    def _receive(self) -> None:
        connection = self._connected()
        connection.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            chunk = connection.recv(1 << 20)
            if not chunk:
                raise ConnectionResetError(f"the emulated host is gone: {self.console_tail()}")
            self._received += chunk

    def _greet(self) -> None:
        """Wait until the agent inside answers."""
        limit = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < limit:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"QEMU ended: {(self._folder / 'qemu.log').read_text()}")
            with contextlib.suppress(TimeoutError, OSError):
                self._ask({"words": ["true"], "input": "", "seconds": 60}, 3)
                return
            time.sleep(0.2)
        raise TimeoutError(f"the emulated host did not come up: {self.console_tail()}")

    def _connected(self) -> socket.socket:
        if self._agent is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(self._folder / "agent"))
            self._agent = connection
        return self._agent

    def _disconnect(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _qmp_until(self, command: str, reached: object, seconds: float) -> None:
        limit = time.monotonic() + seconds
        told: dict[str, object] = {}
        while time.monotonic() < limit:
            with contextlib.suppress(OSError):
                told = self._qmp(command)
                if reached(told):  # type: ignore[operator]
                    return
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"QEMU ended: {(self._folder / 'qemu.log').read_text()}")
            time.sleep(0.1)
        raise TimeoutError(f"{command} still says {told}")

    def _qmp(self, command: str, arguments: dict[str, object] | None = None) -> dict[str, object]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._folder / "qmp"))
            lines = connection.makefile("rw")
            lines.readline()
            for name, values in (("qmp_capabilities", {}), (command, arguments or {})):
                lines.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                lines.flush()
                while "return" not in (told := json.loads(lines.readline())):
                    if "error" in told:
                        raise RuntimeError(f"{name}: {told['error']['desc']}")
            return told["return"]


def program_words(module: str, *words: str, user: str = "root", variables: Mapping[str, str] | None = None) -> str:
    """The words for a shell of root's that run a program as ``EmulatedHost.run_program`` does."""
    told = json.dumps(dict(variables or {}))
    return shlex.join(["python3", "-I", "-S", _PROGRAM_SERVER, "call", user, told, module, *words])


def _drive(name: str, path: Path, file_format: str, *, read_only: bool = False) -> list[str]:
    options = f"if=none,id={name},file={path},format={file_format},cache=unsafe,discard=unmap"
    return ["-drive", options + ",readonly=on" * read_only, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def save_host(image: HostImage, folder: Path, *, firecracker: Path | None = None) -> SavedHost:
    """Boot the image, put this checkout's package and tests into it, and save it. ``firecracker``: a folder with that and
    its jailer, which is to lie at ``FIRECRACKER`` then."""
    disk, lvm_disk = folder / "root.qcow2", folder / "lvm.qcow2"
    parcel, guest_files = folder / "parcel.tar", folder / "guest-files.tar"
    _overlay(disk, image.disk)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(lvm_disk), LVM_DISK_SIZE], check=True)
    packed = _pack_checkout(firecracker)
    assert len(packed) <= _PARCEL_BYTES
    parcel.write_bytes(packed)
    os.truncate(parcel, _PARCEL_BYTES)
    pack_guest_files(guest_files, own_kernel=firecracker is not None)
    host = EmulatedHost(image, folder, disk, lvm_disk, parcel, guest_files)
    try:
        host.start()
        host.run(f"mkdir -p {CHECKOUT} && tar -x -f /dev/vdc -C {CHECKOUT} --no-same-owner")
        host.run(f"echo {CHECKOUT}/src >{SITE_PACKAGES}/atelier-checkout.pth")
        host.run("systemctl is-system-running --wait || true", seconds=_BOOT_SECONDS)
        host.run_program("atelier.cli", "--version")
        host.save(folder / "state")
    finally:
        host.end()
    return SavedHost(image, disk, lvm_disk, parcel, guest_files, folder / "state")


@contextlib.contextmanager
def started_from(saved: SavedHost, folder: Path) -> Generator[EmulatedHost]:
    """A host of one's own that goes on from the saved one."""
    host = _standing_over(saved, folder)
    try:
        host.start(saved.state)
        yield host
    finally:
        host.end()
        for file in (host.disk, host.lvm_disk):
            file.unlink()


def save_further(saved: SavedHost, folder: Path, prepare: Callable[[EmulatedHost], T]) -> tuple[SavedHost, T]:
    """The saved one with what ``prepare`` makes of it, at rest again; and what that returned."""
    host = _standing_over(saved, folder)
    try:
        host.start(saved.state)
        told = prepare(host)
        host.save(folder / "state")
    finally:
        host.end()
    return replace(saved, disk=host.disk, lvm_disk=host.lvm_disk, state=folder / "state"), told


def _standing_over(saved: SavedHost, folder: Path) -> EmulatedHost:
    disk, lvm_disk = folder / "root.qcow2", folder / "lvm.qcow2"
    _overlay(disk, saved.disk)
    _overlay(lvm_disk, saved.lvm_disk)
    return EmulatedHost(saved.image, folder, disk, lvm_disk, saved.parcel, saved.guest_files)


def _overlay(path: Path, base: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(path)], check=True)


def _pack_checkout(firecracker: Path | None) -> bytes:
    """What git knows of this checkout, as it lies there now, and what is new in it; the package compiled, which takes
    minutes inside."""
    listing = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing).decode().split("\0")
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed, mode="w") as archive:
        for name in filter(None, names):
            if (REPOSITORY / name).exists():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, Path(folder) / name)
        if firecracker:
            (Path(folder) / Path(FIRECRACKER).name).mkdir()
            for program in ("firecracker", "jailer"):
                shutil.copy(firecracker / program, Path(folder) / Path(FIRECRACKER).name)
        # The bytecode of one minor version of Python is that of another machine's too.
        compiling = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", folder, f"{folder}/src"]
        subprocess.run([sys.executable, *compiling], check=True)
        # Users inside read it too.
        Path(folder).chmod(0o755)
        archive.add(folder, ".")
    return packed.getvalue()

"""The guest channel over a real virtio-serial port: a plain QEMU, a kernel, the agent's channel code, and the gateway.

What only the real port has: no session boundary, a standing hang-up while nobody is connected, reads of 4 KiB, writes
of 32 KiB, and bytes that outlive whoever wrote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.real_machines import INIT_PREPARES, NO_QEMU, REPOSITORY, get_boot_files, with_init

from atelier.config.settings import load_settings
from atelier.drivers.images.cpio import CpioArchive
from atelier.drivers.vmm.qemu_arguments import kernel_command_line
from atelier.host.tsc import cached_tsc_khz
from atelier.model.layout import RunLayout

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

SANDBOX = "channelport2"
PATIENCE_SECONDS = 120.0
BULK_BYTES = 32 * 1024 * 1024

INIT = f"""{INIT_PREPARES}
mkdir -p /opt/shared
while ! [ -b /dev/vda ]; do sleep 0.01; done
mount -t ext4 -o ro,noload /dev/vda /opt/shared
ifconfig lo 127.0.0.1 up
run() {{
    # As bin/atelier-agent has it.
    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=33554432
    /opt/shared/lib/ld-linux-x86-64.so.2 --inhibit-cache --library-path /opt/shared/lib \\
        /opt/shared/python/bin/python3.11 -I -S -X utf8 "$@"
}}
run /raw.py &
while :; do run /guest.py; echo "the guest's program ended"; done
"""

GUEST = """
import asyncio, hashlib, os, sys, time
sys.modules["ssl"] = None
sys.path.insert(0, "/source")
from atelier.guest_agent.channel import run_channel

async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()

async def digest(reader, writer):
    state = hashlib.sha256()
    while data := await reader.read(262144):
        state.update(data)
    writer.write(state.hexdigest().encode())

async def sink(reader, writer):
    left = int(await reader.readline())
    while left:
        left -= len(await reader.read(262144))
    writer.write(b"done")

async def source(reader, writer):
    left = int(await reader.readline())
    block = bytes(range(256)) * 1024
    while left:
        piece = block[:left]
        writer.write(piece)
        await writer.drain()
        left -= len(piece)

async def about(reader, writer):
    times = os.times()
    writer.write(b"%d %f %f" % (os.getpid(), times.user + times.system, time.monotonic()))

async def die(reader, writer):
    os.kill(os.getpid(), 9)

asyncio.run(run_channel(None, {1: echo, 2: source, 3: digest, 4: about, 5: die, 6: sink}))
"""

RAW = """
import os
names = "/sys/class/virtio-ports"
port = next(name for name in os.listdir(names) if open(f"{names}/{name}/name").read().strip() == "raw")
port = os.open(f"/dev/{port}", os.O_RDWR)
buffer = memoryview(bytearray(262144))
while True:
    line = b""
    while not line.endswith(b"\\n"):
        line += os.read(port, 100)
        if not line:
            import time
            time.sleep(0.05)
    verb, left = line.split()
    left = int(left)
    os.write(port, b"go")
    while left:
        wanted = buffer[:min(left, len(buffer))]
        left -= os.readv(port, [wanted]) if verb == b"put" else os.write(port, wanted)
    if verb == b"put":
        os.write(port, b"done")
"""


@dataclass
class Machine:
    folder: Path
    gateway: subprocess.Popen[bytes] | None = None
    rates: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.folder / "run")

    def start_gateway(self) -> None:
        self.layout.gateway_socket.unlink(missing_ok=True)
        self.gateway = subprocess.Popen(
            [
                *(sys.executable, "-m", "atelier.gateway", "--run-dir", str(self.layout.root)),
                *("--epoch-wait-seconds", str(PATIENCE_SECONDS)),
            ]
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.layout.gateway_socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop_gateway(self, number: int = signal.SIGTERM) -> None:
        assert self.gateway is not None
        self.gateway.send_signal(number)
        self.gateway.wait(PATIENCE_SECONDS)

    def ask(self, **request: object) -> dict:
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.layout.gateway_socket))
            control.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(control.makefile("rb").readline())

    def channel(self) -> dict:
        return self.ask(operation="list")["channels"][0]

    def connect(self, port: int) -> socket.socket:
        """As clients do: again, if the stream breaks off before it is there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE_SECONDS)
            with contextlib.suppress(OSError):
                connection.connect(str(self.layout.channel_socket(SANDBOX)))
                connection.sendall(b"CONNECT %d\n" % port)
                answer = b""
                while not answer.endswith(b"\n") and (byte := connection.recv(1)):
                    answer += byte
                if answer.startswith(b"OK "):
                    return connection
            connection.close()
            assert time.monotonic() < deadline, (self.folder / "console").read_text(errors="replace")[-2000:]
            time.sleep(0.02)

    def about(self) -> tuple[int, float, float]:
        """The guest program's pid, its CPU seconds, its clock."""
        pid, cpu, clock = receive_all(self.connect(4)).split()
        return int(pid), float(cpu), float(clock)


def _add_agent_source(archive: CpioArchive) -> None:
    """This checkout's, as it is: how the tools image packs it is no matter of this test."""
    source = REPOSITORY / "src"
    folders = [source / "atelier", source / "atelier/guest_agent", source / "atelier/guest_protocol"]
    archive.add_directory("source")
    for folder in folders:
        archive.add_directory(f"source/{folder.relative_to(source)}")
        for file in sorted(folder.glob("*.py")):
            archive.add_file(f"source/{file.relative_to(source)}", file.read_bytes())


def receive_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 18), b""))


def receive(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(1 << 18, count - len(received)))
        assert piece, f"the end after {len(received)} of {count} bytes"
        received += piece
    return bytes(received)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    boot = asyncio.run(get_boot_files())
    with tempfile.TemporaryDirectory(prefix="atl-") as path:
        folder = Path(path)
        scripts = CpioArchive()
        scripts.add_file("guest.py", GUEST.encode())
        scripts.add_file("raw.py", RAW.encode())
        _add_agent_source(scripts)
        boot = with_init(boot, INIT, folder)
        with boot.initramfs.open("ab") as file:
            file.write(scripts.finish())
        tsc_khz = cached_tsc_khz(load_settings().cache_dir / "tsc.json")
        # Plain and unconfined, always emulated: the port is what is looked at here.
        arguments = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
            *("-machine", "microvm,pit=off,pic=off", "-accel", "tcg,thread=multi,tb-size=32", "-cpu", "max"),
            *("-smp", "1", "-m", "192M", "-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)),
            *("-append", kernel_command_line("tcg", tsc_khz)),
            *("-chardev", f"file,id=console,path={folder}/console", "-serial", "chardev:console"),
            *("-device", "virtio-serial-device,max_ports=8"),
            *("-chardev", f"socket,id=guest,path={folder}/guest.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=guest,name=atelier"),
            *("-chardev", f"socket,id=raw,path={folder}/raw.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=raw,name=raw"),
            *("-drive", f"if=none,id=tools,file={boot.tools},format=raw,read-only=on,file.locking=off"),
            *("-device", "virtio-blk-device,drive=tools"),
        ]
        vmm = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        machine = Machine(folder)
        try:
            machine.start_gateway()
            attached = machine.ask(
                operation="attach", sandbox_id=SANDBOX, socket_path=str(folder / "guest.sock"), token="t"
            )
            assert attached["ok"], attached
            machine.connect(1).close()
            yield machine
        finally:
            if machine.gateway is not None and machine.gateway.poll() is None:
                machine.stop_gateway()
            vmm.kill()
            vmm.wait()


def test_bulk_both_ways_by_hash(machine: Machine):
    content = os.urandom(1 << 20) * (BULK_BYTES >> 20)
    with machine.connect(3) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 64).decode() == hashlib.sha256(content).hexdigest()
    with machine.connect(2) as connection:
        connection.sendall(b"%d\n" % BULK_BYTES)
        assert receive(connection, BULK_BYTES) == bytes(range(256)) * (BULK_BYTES // 256)
    assert machine.channel()["violations"] == 0


def test_many_streams_while_one_stalls(machine: Machine):
    with machine.connect(2) as stalled:
        stalled.sendall(b"1000000000\n")
        echoes = [machine.connect(1) for _ in range(20)]
        for number, connection in enumerate(echoes):
            connection.sendall(bytes([number]) * 10_000)
        for number, connection in enumerate(echoes):
            assert receive(connection, 10_000) == bytes([number]) * 10_000
            connection.close()


def test_a_killed_gateway_in_the_middle_of_transfers(machine: Machine):
    pid, _, _ = machine.about()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        download, upload = machine.connect(2), machine.connect(3)
        download.sendall(b"1000000000\n")
        receive(download, 3_000_000)
        upload.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            upload.sendall(bytes(8_000_000))
        machine.stop_gateway(number)
        download.close()
        upload.close()
        machine.start_gateway()
        with machine.connect(1) as connection:
            connection.sendall(b"again")
            assert receive(connection, 5) == b"again"
    assert machine.about()[0] == pid
    assert machine.channel()["violations"] == 0


def test_a_killed_guest_agent_in_the_middle_of_transfers(machine: Machine):
    for _ in range(3):
        pid, _, _ = machine.about()
        download, upload = machine.connect(2), machine.connect(3)
        download.sendall(b"1000000000\n")
        receive(download, 3_000_000)
        upload.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            upload.sendall(bytes(8_000_000))
        killer = machine.connect(5)
        began = time.monotonic()
        with machine.connect(1) as connection, contextlib.suppress(OSError):
            connection.sendall(b"again")
            receive(connection, 5)
        # The connection above may have reached the dying one; this one reaches its successor.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while machine.about()[0] == pid:
            assert time.monotonic() < deadline
        print(f"a new guest agent answered after {time.monotonic() - began:.2f} s")
        for connection in (download, upload, killer):
            connection.close()
    assert machine.channel()["violations"] == 0


def test_the_guest_does_not_spin_while_nobody_is_connected(machine: Machine):
    _, cpu_before, clock_before = machine.about()
    machine.stop_gateway()
    time.sleep(3)
    machine.start_gateway()
    _, cpu_after, clock_after = machine.about()
    share = (cpu_after - cpu_before) / (clock_after - clock_before)
    print(f"{share:.1%} of the CPU while the host's side was closed")
    assert share < 0.5


def test_throughput_against_the_raw_port(machine: Machine):
    """Prints the figures; whether they are good enough is the benchmarks' question, on a quiet machine."""
    payload = os.urandom(1 << 20) * (BULK_BYTES >> 20)

    def raw_put(connection: socket.socket) -> None:
        connection.sendall(b"put %d\n" % BULK_BYTES)
        receive(connection, 2)
        connection.sendall(payload)
        receive(connection, 4)

    def raw_get(connection: socket.socket) -> None:
        connection.sendall(b"get %d\n" % BULK_BYTES)
        receive(connection, 2 + BULK_BYTES)

    def put() -> None:
        with machine.connect(6) as connection:
            connection.sendall(b"%d\n" % BULK_BYTES)
            connection.sendall(payload)
            receive(connection, 4)

    def get() -> None:
        with machine.connect(2) as connection:
            connection.sendall(b"%d\n" % BULK_BYTES)
            receive(connection, BULK_BYTES)

    put()
    get()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE_SECONDS)
        raw.connect(str(machine.folder / "raw.sock"))
        for name, work in (
            ("channel put", put),
            ("channel get", get),
            # Afterwards: a used raw port makes the kernel wake its reader at each of the channel's interrupts.
            ("raw put", lambda: raw_put(raw)),
            ("raw get", lambda: raw_get(raw)),
        ):
            began = time.monotonic()
            work()
            print(f"{name}: {BULK_BYTES / 1e6 / (time.monotonic() - began):.0f} MB/s")

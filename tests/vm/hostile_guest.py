"""A guest agent that is out to harm, for the inside of a sandbox: ``python3 -m tests.vm.hostile_guest ATTACK...``.

As root it puts itself in the real agent's place, runs each ATTACK of ``tests.contract.hostile_peer`` on the
virtio-serial port until the host cuts it off, then serves the channel with answers that no honest agent gives (the
request says which: ``attack-NAME`` stands somewhere in it), and floods the port after it was asked for ``attack-flood``.
It says on the console where it is. The standard library, the guest protocol and the channel's guest end are all it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

from tests.contract.hostile_peer import ATTACKS

from atelier.guest_agent.channel import run_channel
from atelier.guest_protocol import GUEST_AGENT_PORT, PROTOCOL_VERSION
from atelier.guest_protocol.frames import HELLO, KNOCK, NONCE_BYTES, PADDING, Greeting, ReceiveBuffer, encode_greeting

ATTACK_SECONDS = 10.0
"""The most that one takes, should the host not mind it."""
QUIET_SECONDS = 2.0
QUIET = {"silence", "silence_in_an_epoch", "tiny_frames"}
"""Attacks that are no violation, so nobody cuts them off."""

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mpainted\x1b[0m\x9b5n\u202e"

_AGENT_LAUNCHER = "/opt/shared/bin/atelier-agent"
_ASKED = re.compile(rb"attack-([a-z-]+)")


def say(words: str) -> None:
    with open("/dev/console", "w", encoding="utf-8") as console:
        console.write(f"\nHOSTILE {words}\n")


class OutOfTime(Exception):
    pass


class Port:
    """The port, with what an attack needs of a socket. OutOfTime once ``ends_at`` is past."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self.ends_at = 0.0
        self._kept = b""
        self._poll = select.poll()

    def recv(self, bufsize: int, /) -> bytes:
        self._wait(select.POLLIN)
        return os.read(self.descriptor, bufsize)

    def recv_into(self, buffer: memoryview, /) -> int:
        if kept := self._kept:
            buffer[: len(kept)] = kept
            self._kept = b""
            return len(kept)
        self._wait(select.POLLIN)
        return os.readv(self.descriptor, [buffer])

    def sendall(self, data: bytes, /) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(select.POLLOUT)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self.descriptor, rest) :]
        self._check_time()

    def begin_anew(self) -> None:
        """Until the host has greeted us, once more if it had before; its HELLO is what is received next. (The port knows
        no sessions: what an earlier connection of the host's left may still be in it.)"""
        while True:
            # poll would not wait for the host: a side that is closed is reported without end.
            while self._events(0, 0) & select.POLLHUP:
                self._check_time()
                time.sleep(0.005)
            with contextlib.suppress(ConnectionError):
                if hello := self._knock():
                    self._kept = encode_greeting(hello)
                    return

    def _knock(self) -> Greeting | None:
        nonce = os.urandom(NONCE_BYTES)
        self.sendall(PADDING + encode_greeting(Greeting(KNOCK, PROTOCOL_VERSION, nonce)))
        buffer = ReceiveBuffer()
        again_at = time.monotonic() + 2
        while time.monotonic() < again_at:
            if not self._events(select.POLLIN, 100) & select.POLLIN:
                continue
            buffer.received(self.recv_into(buffer.space()))
            skipped = 1
            while skipped:
                greeting, skipped, _ = buffer.scan_for_greeting()
                if greeting is not None and greeting.kind == HELLO and greeting.echo == nonce:
                    return greeting
                skipped = skipped or greeting is not None
        return None

    def _wait(self, wanted: int) -> None:
        while not (events := self._events(wanted, 100)) & wanted:
            self._check_time()
            if events & select.POLLHUP:
                raise ConnectionError
        if events & select.POLLHUP:
            raise ConnectionError

    def _events(self, wanted: int, wait_ms: int) -> int:
        self._poll.register(self.descriptor, wanted)
        return dict(self._poll.poll(wait_ms)).get(self.descriptor, 0)

    def _check_time(self) -> None:
        if time.monotonic() > self.ends_at:
            raise OutOfTime


def take_the_agents_place() -> Path:
    """The real agent is killed, and what starts it anew starts something that sleeps. Returns the port's device."""
    sleeper = Path("/run/sleeper")
    sleeper.write_text("exec sleep 1000000\n")
    subprocess.run(["mount", "--bind", str(sleeper), _AGENT_LAUNCHER], check=True)
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"/opt/shared/agent/" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    names = Path("/sys/class/virtio-ports").glob("*/name")
    return Path("/dev") / next(name.parent.name for name in names if name.read_text().strip() == "atelier")


def attack(port: Port, name: str, seconds: float) -> None:
    """Until the host has hung up, or for ``seconds``."""
    began = time.monotonic()
    port.ends_at = began + seconds
    outcome = "was cut off"
    try:
        port.begin_anew()
        for piece in ATTACKS[name](port):
            port.sendall(piece)
    except ConnectionError:
        pass
    except OutOfTime:
        outcome = "was let be"
    say(f"{outcome} {name} after {time.monotonic() - began:.1f} s")


# Answers. Each is what goes out after a request, piece by piece, until the host hangs up.

_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
_ENDLESS_JSON = _JSON + b"transfer-encoding: chunked\r\n\r\n"
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: application/connect+json\r\n\r\n"
_BYTES = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
_MESSAGE_BYTES = 4 * 1024 * 1024 - 100


def whole(body: bytes) -> Iterator[bytes]:
    return iter([_JSON + b"content-length: %d\r\n\r\n" % len(body), body])


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def envelope(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"\0" + len(body).to_bytes(4, "big") + body


_STARTED = envelope({"event": {"start": {"pid": 7}}})


def climbing_archive() -> Iterator[bytes]:
    """Names and links that lead out of the folder; what an honest program would never pack."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"evil"))

        add("first")
        add("up", tarfile.SYMTYPE, "../outside")
        add("root", tarfile.SYMTYPE, "/")
        add("hard", tarfile.LNKTYPE, "../outside/precious")
        add("pipe", tarfile.FIFOTYPE)
        add("up/through-the-link")
        add("../outside/precious")
        add("/tmp/absolute")
    return iter([_BYTES + b"\r\n", packed.getvalue()])


def links_archive() -> Iterator[bytes]:
    """Only links that lead out: such are left out and named, and the rest arrives."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, target in (("up", "../outside"), ("root", "/"), ("chain", "up/../../..")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        member = tarfile.TarInfo("last")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"good"))
    body = packed.getvalue()
    return iter([_BYTES + b"content-length: %d\r\n\r\n" % len(body), body])


def endless_archive() -> Iterator[bytes]:
    member = tarfile.TarInfo("huge")
    member.size = 2**40
    return chain([_BYTES + b"\r\n", member.tobuf(tarfile.GNU_FORMAT)], repeat(bytes(65536)))


ANSWERS: dict[bytes, Callable[[], Iterator[bytes]]] = {
    b"endless-headers": lambda: chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"x: y\r\n" * 1000)),
    b"endless-status": lambda: repeat(b"HTTP/1.1 100 Continue\r\n" + b"x: y\r\n" * 1000),
    b"endless-json": lambda: chain([_ENDLESS_JSON + chunk(b'{"entries":[{}')], repeat(chunk(b",{}" * 20_000))),
    b"deep-json": lambda: whole(b'{"entry":' + b"[" * 1_000_000),
    b"closed-deep-json": lambda: whole(b'{"entry":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    b"wide-json": lambda: whole(b'{"entries":[' + b"[]," * (_MESSAGE_BYTES // 3 - 10) + b"[]]}"),
    b"endless-text": lambda: whole(b'{"entry":' + b"[" * 100 + b'"' + b'\\"' * 1_000_000),
    b"endless-number": lambda: whole(b'{"entry":{"size":' + b"9" * 1_000_000 + b"}}"),
    b"false-length": lambda: chain([_JSON + b"content-length: 999999999999999\r\n\r\n"], repeat(bytes(65536))),
    b"short-length": lambda: iter([_JSON + b"content-length: 100000\r\n\r\n{"]),
    b"endless-error": lambda: chain([b"HTTP/1.1 500 No\r\n\r\n"], repeat(b"\x1b[2J" * 10_000)),
    b"false-envelope": lambda: iter([_STREAM + b"\0\xff\xff\xff\xff" + bytes(1_000_000)]),
    b"a-million-envelopes": lambda: chain(
        [_STREAM + _STARTED], repeat(envelope({"event": {"data": {"stdout": "eA=="}}}) * 500)
    ),
    b"escaping-error": lambda: iter(
        [b"HTTP/1.1 404 No\r\n\r\n" + json.dumps({"code": "not_found", "message": ESCAPES + "x" * 10_000}).encode()]
    ),
    b"endless-file": lambda: chain([_BYTES + b"content-length: 1099511627776\r\n\r\n"], repeat(bytes(65536))),
    b"climbing-archive": climbing_archive,
    b"links-archive": links_archive,
    b"endless-archive": endless_archive,
}


def serve_answers() -> None:
    """Until ``attack-flood`` is asked for."""

    async def main() -> None:
        flood = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked = _ASKED.search(await reader.read(65536))
            if asked is None:
                # The body may come later. Who asks for no attack is not answered.
                with contextlib.suppress(TimeoutError):
                    asked = _ASKED.search(await asyncio.wait_for(reader.read(65536), 1))
            if asked is not None and asked[1] in ANSWERS:
                for piece in ANSWERS[asked[1]]():
                    writer.write(piece)
                    await writer.drain()
            elif asked is not None and asked[1] == b"flood":
                flood.set()
            writer.close()

        serving = asyncio.create_task(run_channel(None, {GUEST_AGENT_PORT: answer}))
        await flood.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(main())


def main(names: list[str]) -> None:
    device = take_the_agents_place()
    while True:
        try:
            port = Port(str(device))
            break
        except OSError:
            time.sleep(0.002)
    say(f"has the port {ESCAPES}")
    for name in names:
        attack(port, name, QUIET_SECONDS if name in QUIET else ATTACK_SECONDS)
    os.close(port.descriptor)
    say("serves")
    serve_answers()
    say("floods")
    port = Port(str(device))
    while True:
        attack(port, "random_for_ever", ATTACK_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])

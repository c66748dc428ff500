"""The fake jailer, which becomes a fake Firecracker: ``program.py FAKE-OPTIONS JAILER-OPTIONS -- FIRECRACKER-OPTIONS``.

It takes the jailer's words, refuses what that refuses, and does to the jail what that does: as root it makes ``/`` the
machine's user's, enters it and becomes that user, so that a path or a right that is wrong shows. Otherwise it only takes
paths to mean the jail's. It is one process from begin to end, so ``--id`` stands in its arguments as in Firecracker's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socketserver
import stat
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "src")]

from tests.fake_firecracker.document import ApiDocument, Breach  # noqa: E402
from tests.fake_firecracker.machine import FakeMachine, Refusal  # noqa: E402

_DEVICES = {"/dev/net/tun": (10, 200), "/dev/kvm": (10, 232), "/dev/urandom": (1, 9)}
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def _parse() -> tuple[argparse.Namespace, argparse.Namespace]:
    words = sys.argv[1:]
    at = words.index("--")
    jailer = argparse.ArgumentParser(allow_abbrev=False)
    jailer.add_argument("--fake-folder", type=Path, required=True)
    jailer.add_argument("--fake-document", type=Path, required=True)
    jailer.add_argument("--fake-version", required=True)
    jailer.add_argument("--fake-agent", default="")
    jailer.add_argument("--fake-unconfined", action="store_true")
    for name in ("--id", "--exec-file", "--uid", "--gid"):
        jailer.add_argument(name, required=True)
    jailer.add_argument("--chroot-base-dir", default="/srv/jailer")
    for name in ("--resource-limit", "--cgroup"):
        jailer.add_argument(name, action="append", default=[])
    for name in ("--cgroup-version", "--parent-cgroup", "--netns"):
        jailer.add_argument(name)
    firecracker = argparse.ArgumentParser(allow_abbrev=False)
    firecracker.add_argument("--api-sock", default="/run/firecracker.socket")
    firecracker.add_argument("--log-path")
    firecracker.add_argument("--level", choices=["Error", "Warning", "Info", "Debug", "Trace", "Off"])
    return jailer.parse_args(words[:at]), firecracker.parse_args(words[at + 1 :])


def _jail(options: argparse.Namespace) -> Path:
    """What the jailer does before it is in the jail. Source: Firecracker docs/jailer.md."""
    if not _ID.fullmatch(options.id):
        sys.exit(f"Jailer error: Invalid instance ID: {options.id}")
    executable = Path(options.exec_file).resolve()
    if "firecracker" not in executable.name:
        sys.exit("Jailer error: the name of the executable does not contain 'firecracker'")
    for limit in options.resource_limit:
        name, _, value = limit.partition("=")
        if name not in ("fsize", "no-file") or not value.isdigit():
            sys.exit(f"Jailer error: Invalid resource argument: {limit}")
    root = Path(options.chroot_base_dir).resolve() / executable.name / options.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(executable, root / executable.name)
    return root


def _enter(root: Path, options: argparse.Namespace) -> Callable[[str], Path]:
    """Go to live in the jail; returns what finds a path of its."""
    user, group = int(options.uid), int(options.gid)
    confined = os.geteuid() == 0 and not options.fake_unconfined
    for folder in ("", "dev", "dev/net", "run"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder).chmod(0o700)
        if confined:
            os.chown(root / folder, user, group)
    for name, (major, minor) in _DEVICES.items():
        if (root / name[1:]).exists():
            sys.exit(f"Jailer error: Failed to create {name} via mknod inside the jail: File exists")
        with contextlib.suppress(PermissionError):
            os.mknod(root / name[1:], stat.S_IFCHR | 0o600, os.makedev(major, minor))
    if not confined:
        return lambda path: root / path.lstrip("/")
    os.chroot(root)
    os.chdir("/")
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    return Path


class _Api(BaseHTTPRequestHandler):
    """``server`` has all that it needs."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        content = self.rfile.read(length)
        with self.server.lock:
            self.server.serve(self, self.command, self.path, json.loads(content) if content else None)

    do_GET = do_PUT = do_PATCH = _handle

    def reply(self, status: int, body: dict[str, Any] | None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Server", "Firecracker API")
        self.send_header("Connection", "keep-alive")
        if content:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, machine: FakeMachine, document: ApiDocument, folder: int) -> None:
        super().__init__(str(path), _Api)
        self.lock = threading.Lock()
        self._machine = machine
        self._document = document
        self._folder = folder

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no matter: what is written here is the guest's console."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def serve(self, request: _Api, method: str, path: str, body: Any) -> None:
        self._note("requests", {"method": method, "path": path, "body": body})
        if self._misbehave(request, f"{method} {path}"):
            return
        status: int
        try:
            self._document.check_request(method, path, body)
            answer = self._machine.handle(method, path, body)
            status = 204 if answer is None else 200
        except Breach as breach:
            self._note("breaches", {"request": str(breach)})
            status, answer = 400, {"fault_message": f"An error occurred when deserializing the json body: {breach}"}
        except Refusal as refusal:
            status, answer = 400, {"fault_message": str(refusal)}
        self._check_and_reply(request, method, path, status, answer)

    def _check_and_reply(
        self, request: _Api, method: str, path: str, status: int, answer: dict[str, Any] | None
    ) -> None:
        with contextlib.suppress(Breach):
            # What the document does not know has no answer there either.
            self._document.operation(method, path)
            try:
                self._document.check_answer(method, path, status, answer)
            except Breach as breach:
                self._note("breaches", {"answer": str(breach)})
        request.reply(status, answer)

    def _misbehave(self, request: _Api, what: str) -> bool:
        fault = self._faults().get(what)
        if fault is None:
            return False
        match fault["kind"]:
            case "answer":
                method, _, path = what.partition(" ")
                self._check_and_reply(request, method, path, fault["status"], {"fault_message": fault["message"]})
            case "nonsense":
                request.wfile.write(fault["bytes"].encode())
                request.close_connection = True
            case "close":
                request.close_connection = True
            case "hang":
                time.sleep(fault["seconds"])
                request.close_connection = True
            case "die":
                os._exit(3)
        return True

    def _faults(self) -> dict[str, Any]:
        try:
            descriptor = os.open("faults.json", os.O_RDONLY, dir_fd=self._folder)
        except FileNotFoundError:
            return {}
        with os.fdopen(descriptor) as file:
            return json.load(file)

    def _note(self, name: str, value: dict[str, Any]) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666, dir_fd=self._folder)
        with contextlib.suppress(PermissionError):
            # Machines write there under a user each.
            os.fchmod(descriptor, 0o666)
        os.write(descriptor, json.dumps(value).encode() + b"\n")
        os.close(descriptor)


def main() -> None:
    os.closerange(3, 256)
    jailer, firecracker = _parse()
    faults = jailer.fake_folder / "faults.json"
    if faults.exists() and (said := json.loads(faults.read_text()).get("jailer")):
        sys.exit(f"Jailer error: {said['message']}")
    document = ApiDocument(jailer.fake_document)
    # What tests and fake say to each other lies outside of the jail.
    folder = os.open(jailer.fake_folder, os.O_RDONLY | os.O_DIRECTORY)
    root = _jail(jailer)
    real = _enter(root, jailer)

    def link_is_up(tap: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(f"tap-{tap}", os.O_RDONLY, dir_fd=folder)
            with os.fdopen(descriptor) as file:
                return file.read() == "up"
        return False

    if firecracker.log_path:
        # Logging stands before anything else can fail.
        with real(firecracker.log_path).open("a") as log:
            log.write("fake Firecracker\n")
    machine = FakeMachine(jailer.id, jailer.fake_version, real, link_is_up, jailer.fake_agent)
    _Server(real(firecracker.api_sock), machine, document, folder).serve_forever()


if __name__ == "__main__":
    main()

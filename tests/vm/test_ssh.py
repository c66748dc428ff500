"""SSH into a real guest with the real OpenSSH clients: all that they can do, and who is kept out."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.running_manager import WITH_TEMPLATES, LocalInstallation, local_installation, wait_until

SECONDS = 240


@dataclass(frozen=True)
class Visitor:
    """A person's machine: a key, and a configuration that knows nothing else. ``box`` is the sandbox's host name."""

    installation: LocalInstallation
    folder: Path
    port: int

    @property
    def options(self) -> list[str]:
        """What ssh, scp and sftp take alike."""
        return ["-F", str(self.folder / "config")]

    def ssh(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["ssh", *self.options, *words], input=stdin, capture_output=True, timeout=SECONDS)

    def run(self, *words: str, stdin: bytes = b"") -> bytes:
        done = self.ssh(*words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def forwarding(self, *words: str) -> subprocess.Popen[bytes]:
        """An ssh that stays; its forwards stand, or it ends."""
        options = ["-o", "ExitOnForwardFailure=yes", "-N", *words]
        return subprocess.Popen(["ssh", *self.options, *options, "box"], stderr=subprocess.PIPE)


def new_visitor(installation: LocalInstallation, folder: Path) -> Visitor:
    folder.mkdir(exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    address = installation.call("GET", "/ssh")
    assert address["problem"] == ""
    (folder / "known").write_text(f"gateway {' '.join(address['host_key'].split()[:2])}\n")
    gateway = (
        f"    HostName 127.0.0.1\n    Port {address['port']}\n    HostKeyAlias gateway\n"
        f"    UserKnownHostsFile {folder}/known\n    StrictHostKeyChecking yes\n"
    )
    (folder / "config").write_text(
        f"Host *\n    IdentityFile {folder}/key\n    IdentitiesOnly yes\n    IdentityAgent none\n    LogLevel ERROR\n"
        f"    BatchMode yes\n"
        f"Host box\n    User box\n{gateway}"
        f"Host box-root\n    User box+root\n{gateway}"
        f"Host nowhere\n    User nowhere\n{gateway}"
        f"Host jump\n    User _\n{gateway}"
        f"Host box.atelier\n    User user\n    ProxyJump jump\n    StrictHostKeyChecking no\n"
        f"    UserKnownHostsFile /dev/null\n"
    )
    return Visitor(installation, folder, address["port"])


def register(visitor: Visitor) -> str:
    """Its id."""
    line = (visitor.folder / "key.pub").read_text()
    return visitor.installation.call("POST", "/ssh-keys", {"public_key": line}, expected=201)["id"]


@pytest.fixture(scope="module")
def installation() -> Iterator[LocalInstallation]:
    with local_installation(WITH_TEMPLATES) as made:
        made.create("box", environment={"GREETING": 'with "quotes" \\ and $'})
        yield made


@pytest.fixture(scope="module")
def visitor(installation: LocalInstallation, tmp_path_factory: pytest.TempPathFactory) -> Visitor:
    made = new_visitor(installation, tmp_path_factory.mktemp("visitor"))
    register(made)
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_program_with_its_outputs_and_its_end(visitor: Visitor) -> None:
    done = visitor.ssh("box", "id -un; echo wrong >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"user\n", b"wrong\n")
    assert visitor.run("box-root", "id -un") == b"root\n"
    assert visitor.run("box", 'printf %s "$GREETING"') == b'with "quotes" \\ and $'
    assert visitor.run("-o", "SetEnv=LC_PROOF=passed", "box", "echo $LC_PROOF") == b"passed\n"
    assert visitor.ssh("box", "kill -TERM $$").returncode == 255, "as ssh does when a signal ended the program"


def test_8_mb_there_and_back(visitor: Visitor) -> None:
    content = os.urandom(8_000_000)
    told = visitor.run("box", "tee big | sha256sum", stdin=content)
    assert told.split()[0].decode() == hashlib.sha256(content).hexdigest()
    assert visitor.run("box", "cat big") == content
    visitor.run("box", "rm big")


def test_a_terminal_that_changes_its_size(visitor: Visitor) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("ssh", ["ssh", *visitor.options, "box"], {**os.environ, "TERM": "vt220"})
    shown = b""

    def type_and_wait(typed: bytes, wanted: bytes) -> None:
        nonlocal shown
        shown = b""
        os.write(terminal, typed)
        wait_until(lambda: wanted in read(), SECONDS)

    def read() -> bytes:
        nonlocal shown
        while select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:
                break
        return shown

    try:
        wait_until(lambda: b"$ " in read(), SECONDS)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
        type_and_wait(b"while [ \"$(stty size)\" != '33 111' ]; do sleep 0.1; done; echo size-$((1+1))\n", b"size-2")
        type_and_wait(b"echo term-$TERM\n", b"term-vt220\r")
        type_and_wait(b"echo begun-$((1+1)); sleep 1000\n", b"begun-2")
        type_and_wait(b"\x03", b"$ ")
        type_and_wait(b"echo status-$?\n", b"status-130")
        os.write(terminal, b"exit 3\n")
        read()
    finally:
        _, status = os.waitpid(process, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 3


def test_copies(visitor: Visitor, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_bytes(os.urandom(300_000))
    for command in (
        ["scp", "-q", *visitor.options, "-r", str(tree), "box:scp"],
        ["scp", "-q", *visitor.options, "-r", "box:scp", str(tmp_path / "back")],
    ):
        subprocess.run(command, check=True, timeout=SECONDS)
    assert (tmp_path / "back/deep/file").read_bytes() == (tree / "deep/file").read_bytes()
    batch = f"put {tree}/deep/file sftp\nrename sftp sftp2\nget sftp2 {tmp_path}/again\nrm sftp2\n".encode()
    subprocess.run(["sftp", *visitor.options, "-b", "-", "box"], input=batch, check=True, timeout=SECONDS)
    assert (tmp_path / "again").read_bytes() == (tree / "deep/file").read_bytes()


def test_rsync(visitor: Visitor, tmp_path: Path) -> None:
    """With this machine's rsync on both sides, as the base image has none and these tests no network."""
    needed = subprocess.run(["ldd", "/usr/bin/rsync"], capture_output=True, text=True, check=True).stdout
    libraries = [
        word for word in needed.split() if word.startswith("/") and "/libc.so" not in word and "/ld-" not in word
    ]
    # By the API: an emulated guest takes a hundred times longer to decipher megabytes than to write them.
    with visitor.installation.manager.client() as client:
        for file in map(Path, ("/usr/bin/rsync", *libraries)):
            url = f"/api/v1/sandboxes/box/files?path=rsync-program/{file.name}"
            client.put(url, content=file.read_bytes()).raise_for_status()
    visitor.run("box", "chmod +x rsync-program/rsync")
    program = "env LD_LIBRARY_PATH=rsync-program rsync-program/rsync"
    if visitor.ssh("box", f"{program} --version").returncode != 0:
        pytest.skip("this machine's rsync does not run in the guest")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(1_000_000))
    words = ["rsync", "-a", "--rsync-path", program, "-e", f"ssh -F {visitor.folder}/config"]
    subprocess.run([*words, f"{tree}/", "box:tree"], check=True, timeout=SECONDS)
    (tree / "file").write_bytes((tree / "file").read_bytes() + b"more")
    subprocess.run([*words, f"{tree}/", "box:tree"], check=True, timeout=SECONDS)
    told = visitor.run("box", "sha256sum <tree/file").split()[0].decode()
    assert told == hashlib.sha256((tree / "file").read_bytes()).hexdigest()


def test_forwards(visitor: Visitor, tmp_path: Path) -> None:
    """-L to a server in the guest, -D to the same, -R from the guest to one here."""
    visitor.run(
        "box", "echo from the guest >page; nohup python3 -m http.server 8123 --bind 127.0.0.1 >/dev/null 2>&1 &"
    )
    local, dynamic = free_port(), free_port()
    (tmp_path / "page").write_text("from here\n")
    here = free_port()
    server = subprocess.Popen(
        ["python3", "-m", "http.server", str(here), "--bind", "127.0.0.1"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    words = ("-L", f"{local}:127.0.0.1:8123", "-D", str(dynamic), "-R", f"8124:127.0.0.1:{here}")
    forwarding = visitor.forwarding(*words)
    try:

        def fetched(*options: str) -> bytes:
            return subprocess.run(["curl", "-s", "--noproxy", "*", *options], capture_output=True).stdout

        wait_until(lambda: fetched(f"http://127.0.0.1:{local}/page") == b"from the guest\n", SECONDS)
        through = subprocess.run(
            ["curl", "-s", "--socks5-hostname", f"127.0.0.1:{dynamic}", "http://127.0.0.1:8123/page"],
            capture_output=True,
            timeout=SECONDS,
        )
        assert through.stdout == b"from the guest\n"
        wait_until(lambda: visitor.ssh("box", "curl -s http://127.0.0.1:8124/page").stdout == b"from here\n", SECONDS)
    finally:
        forwarding.terminate()
        server.terminate()
        forwarding.wait()
        server.wait()


def test_an_agent_is_forwarded_and_only_when_asked(visitor: Visitor, tmp_path: Path) -> None:
    agent_socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent_socket)], stdout=subprocess.DEVNULL)
    try:
        wait_until(agent_socket.exists)
        environment = {**os.environ, "SSH_AUTH_SOCK": str(agent_socket)}
        subprocess.run(["ssh-add", "-q", str(visitor.folder / "key")], env=environment, check=True)
        words = ["ssh", *visitor.options, "-o", f"IdentityAgent={agent_socket}"]
        seen = subprocess.run(
            [*words, "-A", "box", "ssh-add -l"], env=environment, capture_output=True, timeout=SECONDS
        )
        assert b"ED25519" in seen.stdout, seen.stderr
        unseen = subprocess.run([*words, "box", "ssh-add -l"], env=environment, capture_output=True, timeout=SECONDS)
        assert unseen.returncode != 0
    finally:
        agent.terminate()
        agent.wait()


def test_several_sessions_over_one_connection(visitor: Visitor) -> None:
    control = visitor.folder / "control"
    master = subprocess.Popen(["ssh", *visitor.options, "-M", "-S", str(control), "-N", "box"])
    try:
        wait_until(control.exists, SECONDS)
        sessions = [
            subprocess.Popen(
                ["ssh", *visitor.options, "-S", str(control), "box", f"sleep 1; echo {number}"], stdout=subprocess.PIPE
            )
            for number in range(5)
        ]
        assert [each.communicate(timeout=SECONDS)[0] for each in sessions] == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
    finally:
        master.terminate()
        master.wait()


def test_what_vs_code_does(visitor: Visitor) -> None:
    """``ssh -T -D PORT host bash`` with a script on its input, which unpacks what comes after it."""
    dynamic = free_port()
    payload = os.urandom(2_000_000)
    # One line: what comes after it is not bash's to read.
    script = f"head -c {len(payload)} >server.bin; sha256sum <server.bin; echo listeningOn==8123==\n".encode()
    out = visitor.run("-T", "-D", str(dynamic), "box", "bash", stdin=script + payload)
    assert out.split()[0].decode() == hashlib.sha256(payload).hexdigest()
    assert out.endswith(b"listeningOn==8123==\n")


def test_a_jump_ends_in_the_guest_itself(visitor: Visitor) -> None:
    assert visitor.run("box.atelier", "id -un") == b"user\n"
    elsewhere = visitor.ssh("-W", "127.0.0.1:22", "jump")
    assert elsewhere.returncode == 255
    assert visitor.ssh("jump", "true").returncode != 0, "it opens nothing but streams to sandboxes"


def test_who_is_kept_out(visitor: Visitor, installation: LocalInstallation, tmp_path: Path) -> None:
    stranger = new_visitor(installation, tmp_path / "stranger")
    refused = stranger.ssh("box", "true")
    unknown = visitor.ssh("nowhere", "true")
    assert (refused.returncode, unknown.returncode) == (255, 255)
    assert b"Permission denied (publickey)" in refused.stderr
    assert refused.stderr.replace(b"box", b"nowhere") == unknown.stderr, "nothing tells what there is"
    key_id = register(stranger)
    assert stranger.run("box", "echo in") == b"in\n"
    installation.call("DELETE", f"/ssh-keys/{key_id}", expected=204)
    assert b"Permission denied" in stranger.ssh("box", "true").stderr


def test_a_manager_that_is_restarted_cuts_nobody_off(visitor: Visitor, installation: LocalInstallation) -> None:
    session = subprocess.Popen(
        ["ssh", *visitor.options, "box", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert session.stdin is not None
    assert session.stdout is not None
    session.stdin.write(b"before\n")
    assert session.stdout.readline() == b"before\n"
    installation.kill()
    assert visitor.run("box", "echo while it is away") == b"while it is away\n"
    session.stdin.write(b"during\n")
    assert session.stdout.readline() == b"during\n"
    installation.start()
    session.stdin.write(b"after\n")
    session.stdin.close()
    assert session.stdout.read() == b"after\n"
    assert session.wait(SECONDS) == 0


def test_a_stopped_sandbox_is_started(visitor: Visitor, installation: LocalInstallation) -> None:
    installation.call("POST", "/sandboxes/box/stop?wait=true&timeout_seconds=300")
    assert visitor.run("box", "echo awake") == b"awake\n"
    assert installation.call("GET", "/sandboxes/box")["state"] == "running"

"""Root in a sandbox takes the guest agent's place and attacks the host from inside its virtual machine, over the real
virtio-serial port: it costs that sandbox only. A neighbour works on all the while, memory stays bounded, the console
and a copied folder harm nobody, and the sandbox can be destroyed under fire.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from tests.api.cli_program import Cli
from tests.footprint import MemoryWatch, ask_gateway, gateway_pid, left_of, processes_naming
from tests.real_machines import REPOSITORY
from tests.running_manager import WITH_TEMPLATES, RunningManager, running_local_manager
from tests.vm.hostile_guest import ANSWERS, QUIET

from atelier import Sandbox
from atelier.model.errors import AtelierError, NotFoundError
from atelier.model.guest import ProcessOutput

PATIENCE_SECONDS = 60.0

FRAME_ATTACKS = (
    "random_for_ever",
    "a_length_of_4_gib",
    "a_million_streams",
    "window_overrun",
    "tiny_frames",
    "silence_in_an_epoch",
    "credit_flood",
    "opens_from_the_guest",
    "epochs_without_end",
)

GATEWAY_GROWTH_MAX_BYTES = 24 * 2**20
"""It keeps one buffer of four frames per channel, and per stream a window: 256 KiB, 1 MiB once it is read from. That is
less than 10 MiB for the few streams here; a queue that a guest could fill would take hundreds within a second."""
MANAGER_GROWTH_MAX_BYTES = 96 * 2**20
"""An answer has at most 4 MiB of text and 250,000 values, four are asked for at once here, and one at a time is parsed;
what is longer is passed on piece by piece. Without the bound on values four answers took 290 MiB; what is endless would
be gigabytes by the end."""
LOGS_MAX_BYTES = 300_000


class Neighbour(threading.Thread):
    """Runs a program in an honest sandbox, and asks for health, again and again. Every call must give what it should."""

    def __init__(self, sandbox: Sandbox, manager: RunningManager) -> None:
        super().__init__(daemon=True)
        self._health_url = f"{manager.url}/health"
        self.calls = 0
        self.slowest_seconds = 0.0
        self.failures: list[str] = []
        self._sandbox = sandbox
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                written = self._sandbox.run(["echo", f"call {self.calls}"]).stdout
                if written != f"call {self.calls}\n":
                    self.failures.append(f"wrote {written!r}")
                httpx.get(self._health_url, timeout=PATIENCE_SECONDS).raise_for_status()
            except (AtelierError, httpx.HTTPError) as error:
                self.failures.append(str(error))
            self.calls += 1
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)

    def end(self) -> None:
        self._ended.set()
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive()


@pytest.fixture(scope="module")
def own_manager() -> Iterator[RunningManager]:
    with running_local_manager(WITH_TEMPLATES) as running:
        yield running
    assert processes_naming(str(running.run_dir.parent)) == []


@pytest.fixture(scope="module")
def pair(own_manager: RunningManager) -> Iterator[tuple[Sandbox, Sandbox]]:
    """(the hostile sandbox, its neighbour)."""

    def create(name: str) -> Sandbox:
        return Sandbox.create(
            name=name, memory_mib=256, api_url=own_manager.url, api_key=own_manager.key, timeout_seconds=900
        )

    with ThreadPoolExecutor(2) as pool:
        hostile, neighbour = pool.map(create, ("hostile", "neighbour"))
    with hostile, neighbour:
        yield hostile, neighbour


def bring_the_attacker(hostile: Sandbox, scratch: Path) -> None:
    """The hostile program and what it imports, and start it as root."""
    source = REPOSITORY / "src"
    for file in (
        *source.glob("atelier/guest_protocol/*.py"),
        *source.glob("atelier/guest_agent/*.py"),
        REPOSITORY / "tests/contract/hostile_peer.py",
        REPOSITORY / "tests/vm/hostile_guest.py",
    ):
        copy = scratch / file.relative_to(source if file.is_relative_to(source) else REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    hostile.files.upload_folder(scratch, "/home/user/hostile")
    program = f"python3 -m tests.vm.hostile_guest {' '.join(FRAME_ATTACKS)}"
    started = hostile.run(
        f"cd /home/user/hostile && (setsid {program} </dev/null >/dev/console 2>&1 &)", user="root", timeout_seconds=60
    )
    assert started.exit_code == 0, started.stderr


def console_says(hostile: Sandbox, words: str) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (console := hostile.read_console().decode(errors="replace")).count(words) == 0:
        assert time.monotonic() < deadline, f"{words!r} is not on the console: {console[-3000:]}"
        assert "Traceback" not in console, console[-3000:]
        time.sleep(0.2)
    return console


class Victim(threading.Thread):
    """Goes on asking the hostile sandbox, so that there are streams to attack. Its calls may fail, in words."""

    def __init__(self, hostile: Sandbox) -> None:
        super().__init__(daemon=True)
        self.calls = 0
        self._hostile = hostile
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            with suppress(AtelierError):
                self._hostile.files.stat("/")
            self.calls += 1

    def end(self) -> None:
        self._ended.set()
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive()


def ask_for(hostile: Sandbox, attack: str, scratch: Path, neighbour: Neighbour) -> None:
    """The call whose answer is the attack. What it gives is the guest's to say; what it raises is an AtelierError.
    Endless output and files are no offence: they are listened to until the neighbour has been served meanwhile."""
    path = f"/attack-{attack}"
    enough = neighbour.calls + 3
    deadline = time.monotonic() + PATIENCE_SECONDS
    if attack.endswith("envelopes"):
        with hostile.exec([path]) as program:
            for event in program:
                if isinstance(event, ProcessOutput) and neighbour.calls >= enough:
                    return
                assert time.monotonic() < deadline, "the neighbour is not served"
    elif attack.endswith("envelope"):
        hostile.run([path])
    elif attack.endswith("file"):
        with hostile.files.stream(path) as pieces:
            for _ in pieces:
                if neighbour.calls >= enough:
                    return
                assert time.monotonic() < deadline, "the neighbour is not served"
    elif attack.endswith("archive"):
        hostile.files.download_folder(path, scratch)
    elif attack == "wide-json":
        hostile.files.list(path)
    else:
        hostile.files.stat(path)


def test_a_hostile_guest_costs_its_own_sandbox_only(
    own_manager: RunningManager, pair: tuple[Sandbox, Sandbox], tmp_path: Path
) -> None:
    hostile, neighbour = pair
    bring_the_attacker(hostile, tmp_path / "attacker")
    watch = MemoryWatch(manager=own_manager.process.pid, gateway=gateway_pid(own_manager))
    working = Neighbour(neighbour, own_manager)
    working.start()
    with watch:
        console_says(hostile, "HOSTILE has the port")
        _attack_with_frames(own_manager, hostile)
        _attack_with_answers(hostile, working, tmp_path)
        _attack_the_reader_of_a_console(own_manager, hostile, tmp_path)
        _attack_the_reader_of_a_folder(own_manager, hostile, tmp_path)
        _destroy_under_fire(own_manager, hostile)
    working.end()
    print(f"{watch}; {working.calls} calls of the neighbour, the slowest {working.slowest_seconds:.2f} s")
    assert working.failures == []
    assert working.calls > 20
    assert watch.growth_bytes("gateway") < GATEWAY_GROWTH_MAX_BYTES
    assert watch.growth_bytes("manager") < MANAGER_GROWTH_MAX_BYTES
    assert httpx.get(f"{own_manager.url}/health").json()["status"] == "ok"
    logs = own_manager.log.read_text() + "".join(log.read_text() for log in own_manager.data_dir.glob("logs/*"))
    assert "Traceback" not in logs
    assert len(logs) < LOGS_MAX_BYTES


def _attack_with_frames(manager: RunningManager, hostile: Sandbox) -> None:
    victims = [Victim(hostile) for _ in range(3)]
    for victim in victims:
        victim.start()
    console = console_says(hostile, "HOSTILE serves")
    channel = next(
        channel for channel in ask_gateway(manager, "list")["channels"] if channel["sandbox_id"] == hostile.id
    )
    for attack in FRAME_ATTACKS:
        outcome = "was let be" if attack in QUIET else "was cut off"
        assert f"HOSTILE {outcome} {attack}" in console
    assert channel["violations"] >= len(set(FRAME_ATTACKS) - QUIET)
    for victim in victims:
        victim.end()
    assert sum(victim.calls for victim in victims) > 3


def _attack_with_answers(hostile: Sandbox, neighbour: Neighbour, scratch: Path) -> None:
    for attack in (name.decode() for name in ANSWERS):
        if attack in ("links-archive", "climbing-archive"):
            continue
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(ask_for, hostile, attack, scratch / f"{attack}-{number}", neighbour)
                for number in range(1 if attack.endswith("archive") else 4)
            ]
            errors = [one.exception(PATIENCE_SECONDS) for one in asked]
        print(f"{attack}: {errors[0]}")
        for error in errors:
            if error is None:
                assert attack in ("a-million-envelopes", "endless-file"), f"{attack} was taken for an answer"
                continue
            assert isinstance(error, AtelierError), repr(error)
            assert error.code != "internal", repr(error)
            assert error.message.isprintable()
            assert len(error.message) < 1000


def _attack_the_reader_of_a_console(manager: RunningManager, hostile: Sandbox, folder: Path) -> None:
    """Escapes that the guest wrote to its console do not reach the terminal of somebody who reads it."""
    assert b"\x1b]0;owned\x07" in hostile.read_console(), "over the API it comes as the guest wrote it"
    terminal = Cli(manager, folder).open_terminal("logs", "hostile")
    try:
        shown = terminal.output
        found = terminal.expect(rb"HOSTILE has the port ([^\r\n]*)")
        shown += found[0]
        assert terminal.wait() == 0
        shown += terminal.output
    finally:
        terminal.close()
    assert b"owned" in found[1], "they are shown"
    for obeyed in (b"\x1b", b"\x07", b"\x9b", "\u202e".encode()):
        assert obeyed not in shown


def _attack_the_reader_of_a_folder(manager: RunningManager, hostile: Sandbox, folder: Path) -> None:
    """Names and links in an archive that lead out of the folder that is copied to."""
    cli = Cli(manager, folder)
    (folder / "outside").mkdir()
    (folder / "outside/precious").write_text("precious")
    for attack in ("climbing-archive", "links-archive"):
        # The kind of the source is the guest's to say, too: this one says nothing of it.
        with suppress(AtelierError):
            hostile.files.download_folder(f"/attack-{attack}", folder / attack)
        refused = cli.run_program("cp", f"hostile:/attack-{attack}", f"by-cli-{attack}", status=1)
        assert refused.stderr.startswith(b"error: ")
    assert not Path("/tmp/absolute").exists()
    assert os.listdir(folder / "outside") == ["precious"]
    assert (folder / "outside/precious").read_text() == "precious"
    assert os.listdir(folder / "links-archive") == ["last"], "links that lead out are left out, the rest arrives"
    for path in folder.rglob("*"):
        assert folder.resolve() in path.resolve().parents, f"{path} leads to {path.resolve()}"


def _destroy_under_fire(manager: RunningManager, hostile: Sandbox) -> None:
    with pytest.raises(AtelierError):
        hostile.files.stat("/attack-flood")
    console_says(hostile, "HOSTILE floods")
    hostile.destroy()
    with pytest.raises(NotFoundError):
        hostile.refresh()
    assert left_of(manager, hostile.id) == []

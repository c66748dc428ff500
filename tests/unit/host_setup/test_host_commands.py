"""``atelier host`` as a program: who may use it, what needs no root, and that the CLI's help does not load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atelier.host_setup import __main__ as program

REPOSITORY = Path(__file__).resolve().parents[3]
NOBODY = 65534
COMMANDS = (
    *("init", "init --check", "doctor", "network", "storage", "firecracker", "kernel", "systemd", "caddy", "ssh"),
    *("packages", "account", "privileges", "debug-vm abcdefghijkl", "update atelier.whl", "uninstall --keep-data"),
)


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _status_as_user(words: str) -> int:
    """In a fork of this interpreter, which has read what an ordinary user may perhaps not."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if os.geteuid() == 0:
                _become_nobody()
            sys.argv = ["atelier host", *words.split()]
            status = program.main()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("words", COMMANDS)
def test_who_is_not_root_is_refused_in_words(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    status = _status_as_user(words)
    said = capfd.readouterr().err
    assert status == 1, said
    assert "error: atelier host changes the machine itself, and that is root's alone" in said
    assert f"hint: sudo atelier host {words}" in said


def test_the_installer_refuses_who_is_not_root() -> None:
    change: Callable[[], None] | None = _become_nobody if os.geteuid() == 0 else None
    with (REPOSITORY / "deploy/install.sh").open() as script:
        done = subprocess.run(["sh", "-s"], stdin=script, capture_output=True, text=True, preexec_fn=change, cwd="/")
    assert done.returncode == 1
    assert "root's alone" in done.stderr


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "atelier.cli", "host", *words], capture_output=True, text=True, timeout=120
    )


def test_the_configuration_is_checked_without_root(tmp_path: Path) -> None:
    schema = json.loads(_run("config", "--schema").stdout)
    assert schema["properties"]["network"]["properties"]["bridge_name"]["type"] == "string"
    file = tmp_path / "host.toml"
    file.write_text(_run("config", "--template").stdout)
    done = _run("config", "--check", str(file))
    assert done.returncode == 0, done.stderr
    file.write_text('[network]\nbridge_nam = "x"\n')
    done = _run("config", "--check", str(file))
    assert done.returncode == 1
    assert f"error: {file}:2: there is no setting network.bridge_nam" in done.stderr
    assert "hint: did you mean network.bridge_name?" in done.stderr


def test_unknown_commands_and_options_are_told_by_the_program_itself() -> None:
    assert _run("instal").returncode == 2
    assert _run("init", "--chek").returncode == 2
    assert "uninstall" in _run("--help").stdout


def test_the_list_of_commands_loads_nothing_of_it() -> None:
    check = "import atelier.cli.__main__, sys; print([m for m in sys.modules if m.startswith('atelier.host_setup')])"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

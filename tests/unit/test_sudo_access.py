"""The sudoers file and the helper program that ``atelier host init`` writes: exact, and what sudo itself takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.real_machines import missing_programs

from atelier.host.privilege import GROUPS
from atelier.host_setup.sudo_access import check_roots_own, program_text, sudoers_text
from atelier.model.errors import HostError, InvalidRequestError

NO_VISUDO = missing_programs("visudo")


def test_each_group_has_an_entry_with_its_one_argument_and_no_wildcard() -> None:
    text = sudoers_text("atelier", Path("/usr/local/sbin/atelier-privileged"))
    entries = [line for line in text.splitlines() if line.startswith("atelier ")]
    assert [entry.rpartition(" ")[2] for entry in entries] == list(GROUPS)
    assert all("NOPASSWD: /usr/local/sbin/atelier-privileged " in entry for entry in entries)
    assert not any(sign in text for sign in "*?[\\^")


@pytest.mark.skipif(bool(NO_VISUDO), reason=NO_VISUDO)
def test_visudo_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "sudoers"
    path.write_text(sudoers_text("atelier"))
    path.chmod(0o440)
    done = subprocess.run(["visudo", "-c", "-s", "-f", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("user", ["", "ALL", "%admin", "a b", "a,b", "#0", "+group", "a=b", "x" * 33, "a\nb"])
def test_a_user_that_sudoers_would_read_as_something_else_is_refused(user: str) -> None:
    with pytest.raises(InvalidRequestError):
        sudoers_text(user)


@pytest.mark.parametrize("program", ["relative", "/a/*", "/a b", "/a,/b", "/a:b", "/a=b", "/a\\b", "/a\n/b", "/"])
def test_a_path_that_sudoers_would_read_as_something_else_is_refused(program: str) -> None:
    with pytest.raises(InvalidRequestError):
        sudoers_text("atelier", Path(program))


def test_the_program_is_isolated_from_the_asking_sides_python() -> None:
    assert program_text(Path("/opt/atelier/bin/python")).splitlines()[0] == "#!/opt/atelier/bin/python -I"


@pytest.mark.skipif(os.geteuid() != 0, reason="files of root's take root")
def test_a_program_that_others_could_change_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("")
    program.chmod(0o755)
    check_roots_own(program)
    program.chmod(0o775)
    with pytest.raises(HostError) as writable:
        check_roots_own(program)
    assert writable.value.code == "program_not_roots"
    program.chmod(0o755)
    os.chown(tmp_path, 12345, 0)
    with pytest.raises(HostError) as folder:
        check_roots_own(program)
    assert str(tmp_path) in folder.value.message
    os.chown(tmp_path, 0, 0)

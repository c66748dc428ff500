"""Every command of ``atelier``, as a program, against a manager in mock mode."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager, wait_until

from .cli_program import Cli


@pytest.fixture
def cli(manager: RunningManager, api: httpx.Client, tmp_path: Path) -> Cli:
    del api  # destroys what a test leaves
    return Cli(manager, tmp_path)


@pytest.fixture
def box(cli: Cli, api: httpx.Client) -> str:
    answer = api.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "box"})
    assert answer.status_code == 201, answer.text
    return "box"


def as_json(done: subprocess.CompletedProcess[bytes]) -> dict:
    return json.loads(done.stdout)


# -- sandboxes ----------------------------------------------------------------------------------------------------


def test_create_prints_a_name_that_works(cli: Cli) -> None:
    name = cli.run_program("create").stdout.decode().strip()
    assert as_json(cli.run_program("get", name, "--json"))["state"] == "running"
    assert cli.run_program("rm", name).stdout.decode().strip() == name


def test_create_passes_every_wish_on(cli: Cli) -> None:
    done = cli.run(
        "create", "--name", "wishes", "--cpus", "2", "--memory", "1G", "--disk", "8G", "--image", "base",
        "--env", "A=b=c", "--label", "team=web", "--label", "x=", "--json",
    )  # fmt: skip
    found = as_json(done)
    assert (found["vcpu_count"], found["memory_mib"], found["disk_mib"]) == (2, 1024, 8192)
    assert found["labels"] == {"team": "web", "x": ""}
    shown = cli.run("get", "wishes").stdout.decode()
    assert "1 GiB" in shown and "team=web" in shown
    cli.run("rm", found["id"])


def test_create_without_waiting_returns_at_once(cli: Cli) -> None:
    name = cli.run("create", "--no-wait").stdout.decode().strip()
    deadline = time.monotonic() + 60
    while as_json(cli.run("get", name, "--json"))["state"] != "running":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--image", "no-such-image"], "no-such-image"),
        (["--name", "a/b"], "a/b"),
        (["--name", "x" * 300], "40"),
        (["--cpus", "0"], "vcpu_count"),
        (["--cpus", "9999"], "vcpu_count"),
        (["--memory", "999999999"], "memory_mib"),
        (["--disk", "1M"], "disk_mib"),
        (["--env", "1X=y"], "environment"),
    ],
)
def test_bad_wishes_are_refused_with_a_hint(cli: Cli, options: list[str], word: str) -> None:
    done = cli.invoke("create", *options, status=1)
    assert done.stderr.startswith("error: ")
    assert "\nhint: " in done.stderr
    assert word in done.stderr
    assert done.stdout == ""


def test_a_name_is_given_once(cli: Cli, box: str) -> None:
    done = cli.run("create", "--name", box, status=1)
    assert b"box" in done.stderr
    assert json.loads(cli.run("create", "--name", box, "--json", status=1).stderr)["code"]


def test_ls_lists_and_filters(cli: Cli) -> None:
    assert b"no sandboxes" in cli.run("ls").stdout
    assert as_json(cli.run("ls", "--json")) == []
    cli.run("create", "--name", "one", "--label", "team=web")
    cli.run("create", "--name", "two")
    lines = cli.run("ls").stdout.decode().splitlines()
    assert lines[0].split()[:3] == ["NAME", "ID", "STATE"]
    assert {line.split()[0] for line in lines[1:]} == {"one", "two"}
    assert cli.run("ls", "-q", "--label", "team=web").stdout == b"one\n"
    assert cli.run("ls", "-q", "--state", "failed").stdout == b""
    assert [each["name"] for each in as_json(cli.run("ls", "--state", "running", "--json"))] == ["two", "one"]
    cli.run("ls", "--state", "nonsense", status=1)


def test_get_shows_figures(cli: Cli, box: str) -> None:
    found = as_json(cli.run("get", "--metrics", "--json", box))
    assert found["sandbox"]["name"] == box
    assert found["metrics"]["cpu_count"] >= 1
    assert b"memory used" in cli.run("get", "--metrics", box).stdout
    missing = cli.run("get", "absent", status=1)
    assert missing.stderr.startswith(b"error: ") and b"absent" in missing.stderr


def test_rm_takes_several_and_goes_on_after_a_failure(cli: Cli) -> None:
    for name in ("a1", "a2", "a3", "a4"):
        cli.run("create", "--name", name)
    done = cli.run("rm", "a1", "absent", "a2", status=1)
    assert set(done.stdout.split()) == {b"a1", b"a2"}
    assert b"absent" in done.stderr
    assert cli.run("rm", "--force", "absent").returncode == 0
    cli.run("rm", "--all", status=2)
    assert len(as_json(cli.run("ls", "--json"))) == 2
    assert set(as_json(cli.run("rm", "--all", "--yes", "--json"))["removed"]) == {"a3", "a4"}
    assert as_json(cli.run("ls", "--json")) == []
    cli.run("rm", "--all", "--yes")


def test_rm_all_asks_on_a_terminal(cli: Cli, box: str) -> None:
    session = cli.open_terminal("rm", "--all")
    try:
        session.expect(rb"Destroy all 1 sandboxes.*\[y/N\]")
        session.type(b"n\n")
        assert session.wait() == 130
    finally:
        session.close()
    assert cli.run("ls", "-q").stdout == b"box\n"


# -- exec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [(["true"], 0), (["false"], 1), (["exit", "42"], 42), (["exit", "255"], 255), (["frobnicate"], 127)],
)
def test_exec_ends_as_the_program_does(cli: Cli, box: str, command: list[str], status: int) -> None:
    cli.invoke("exec", "-n", box, *command, status=status)
    cli.invoke("exec", "-n", box, "--", *command, status=status)


def test_exec_keeps_the_streams_apart_and_the_programs_options(cli: Cli, box: str) -> None:
    done = cli.run("exec", box, "echo", "-n", "--json", "grüße")
    assert (done.stdout, done.stderr) == ("--json grüße".encode(), b"")
    done = cli.run("exec", box, "cat", "absent", status=1)
    assert done.stdout == b"" and b"absent" in done.stderr
    assert cli.run("exec", box, "echo", b"\xff", status=None).returncode in (0, 125)


def test_exec_passes_piped_input_on(cli: Cli, box: str) -> None:
    data = os.urandom(3_000_000)
    assert cli.run("exec", box, "cat", input=data).stdout == data
    assert cli.run("exec", box, "cat", input=b"").stdout == b""
    assert cli.run("exec", "-n", box, "cat", input=b"unread").stdout == b""
    (cli.folder / "file").write_bytes(data)
    with (cli.folder / "file").open("rb") as file:
        process = cli.start("exec", box, "cat", stdin=file)
        assert process.communicate(timeout=120)[0] == data
    # A program that reads nothing of it ends all the same.
    assert cli.run("exec", box, "echo", "done", input=data).stdout == b"done\n"


def test_exec_ends_although_its_stdin_stays_open(cli: Cli, box: str) -> None:
    process = cli.start("exec", box, "echo", "x", stdin=subprocess.PIPE)
    assert process.wait(120) == 0
    assert process.stdout.read() == b"x\n"
    process.stdin.close()


def test_exec_as_json_speaks_the_apis_form(cli: Cli, box: str) -> None:
    events = [json.loads(line) for line in cli.run("exec", "--json", box, "exit", "3", status=3).stdout.splitlines()]
    assert [event["type"] for event in events] == ["started", "ended"]
    assert events[-1]["exit_code"] == 3


def test_exec_says_when_it_failed_itself(cli: Cli, manager: RunningManager) -> None:
    done = cli.run("exec", "absent", "true", status=125)
    assert done.stderr.startswith(b"error: ") and b"absent" in done.stderr
    wrong = subprocess.run(
        [*cli_program(), "exec", "x", "true"], env={**cli.environment, "ATELIER_API_URL": manager.url, "ATELIER_API_KEY": "wrong"},
        capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert wrong.returncode == 125
    assert b"ATELIER_API_KEY" in wrong.stderr


def cli_program() -> list[str]:
    from .cli_program import PROGRAM

    return PROGRAM


def test_exec_ends_a_program_by_its_time_limit(cli: Cli, box: str) -> None:
    done = cli.run("exec", "--timeout", "0.3", box, "sleep", "600", status=137)
    assert b"time limit" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exec_passes_signals_on(cli: Cli, box: str, api: httpx.Client, number: signal.Signals) -> None:
    process = cli.start("exec", box, "cat", stdin=subprocess.PIPE)
    process.stdin.write(b"begun")
    process.stdin.flush()
    assert process.stdout.read(5) == b"begun", "the program is known to run"
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert api.get(f"/api/v1/sandboxes/{box}/processes").json()["items"] == []


def wait_for_process(api: httpx.Client, box: str) -> int:
    deadline = time.monotonic() + 60
    while not (found := api.get(f"/api/v1/sandboxes/{box}/processes").json()["items"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found[0]["pid"]


def test_exec_whose_reader_goes_away_ends_the_program(cli: Cli, box: str, api: httpx.Client) -> None:
    process = cli.start("exec", box, "cat", stdin=subprocess.PIPE)
    process.stdin.write(b"x" * 100)
    process.stdin.flush()
    assert process.stdout.read(100) == b"x" * 100
    process.stdout.close()
    process.stdin.write(b"y" * 100)
    process.stdin.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    assert api.get(f"/api/v1/sandboxes/{box}/processes").json()["items"] == []


# -- terminals ----------------------------------------------------------------------------------------------------


def test_shell_is_a_terminal_and_gives_the_users_own_back(cli: Cli, box: str, api: httpx.Client) -> None:
    session = cli.open_terminal("shell", box, "cat")
    try:
        session.wait_raw()
        session.type("grüezi\r".encode())
        session.expect("grüezi\r\ngrüezi\r\n".encode())
        session.resize(132, 50)
        session.type(b"\x04")
        assert session.wait() == 0
        import termios

        assert termios.tcgetattr(session.slave) == session.before
    finally:
        session.close()


def test_ctrl_c_goes_to_the_program_in_the_terminal(cli: Cli, box: str) -> None:
    session = cli.open_terminal("exec", "-t", box, "cat")
    try:
        session.wait_raw()
        session.type(b"x\r")
        session.expect(b"x\r\nx\r\n")
        session.type(b"\x03")
        assert session.wait() == 130
        assert not session.is_raw()
    finally:
        session.close()


def test_a_shell_that_is_not_there_leaves_the_terminal_alone(cli: Cli) -> None:
    session = cli.open_terminal("shell", "absent")
    try:
        assert session.wait() == 125
        assert b"error: " in session.output and b"absent" in session.output
        assert not session.is_raw()
    finally:
        session.close()


def test_leaving_a_shell_and_coming_back(cli: Cli, box: str, api: httpx.Client) -> None:
    session = cli.open_terminal("shell", box, "cat")
    try:
        session.wait_raw()
        session.type(b"kept\r")
        session.expect(b"kept\r\nkept\r\n")
        session.type(b"\x1d\x1d\x1d")
        pid = int(session.expect(rb"process (\d+) still runs")[1])
        assert session.wait() == 0
        assert not session.is_raw()
    finally:
        session.close()
    assert wait_for_process(api, box) == pid
    session = cli.open_terminal("shell", "--attach", str(pid), box)
    try:
        session.expect(b"kept\r\n")
        session.type(b"more\r")
        session.expect(b"more\r\nmore\r\n")
        session.type(b"\x04")
        assert session.wait() == 0
    finally:
        session.close()


def test_a_closed_window_hangs_the_program_up(cli: Cli, box: str, api: httpx.Client) -> None:
    session = cli.open_terminal("shell", box, "cat")
    try:
        session.wait_raw()
        session.type(b"begun\r")
        session.expect(b"begun\r\nbegun\r\n")
        session.process.send_signal(signal.SIGHUP)
        assert session.wait() == 129
        assert not session.is_raw()
    finally:
        session.close()
    assert api.get(f"/api/v1/sandboxes/{box}/processes").json()["items"] == []


def test_a_terminal_that_lives_on(cli: Cli, box: str, api: httpx.Client) -> None:
    assert cli.run("terminals", box).stdout.startswith(b"no terminals; ")
    session = cli.open_terminal("shell", "--session", "work", box, "cat", columns=100, rows=30)
    try:
        identity = session.expect(rb"\[atelier: terminal ([0-9a-f]{12}) 'work' with cat; Ctrl-\] three times")[
            1
        ].decode()
        session.wait_raw()
        session.type(b"kept\r")
        session.expect(b"kept\r\nkept\r\n")
        (listed,) = as_json(cli.run("terminals", box, "--json"))
        assert (listed["id"], listed["title"], listed["columns"], listed["rows"]) == (identity, "work", 100, 30)
        assert (listed["viewers"], listed["command"], listed["exit_code"]) == (1, ["cat"], None)
        session.resize(90, 20)
        assert wait_until(lambda: as_json(cli.run("terminals", box, "--json"))[0]["columns"] == 90)
        session.type(b"\x1d\x1d\x1d")
        session.expect(f"atelier shell --session {identity} box".encode())
        assert session.wait() == 0
        assert not session.is_raw()
    finally:
        session.close()
    shown = cli.run("terminals", box).stdout.decode().splitlines()[1].split()
    assert (shown[0], shown[1], shown[2], shown[3], shown[6]) == (identity, "work", "90x20", "0", "runs")
    for name in ("work", identity):
        session = cli.open_terminal("shell", "--session", name, box)
        try:
            session.expect(b"kept\r\nkept\r\n")
            session.type(f"by {name}\r".encode())
            session.expect(f"by {name}\r\nby {name}\r\n".encode())
            session.process.send_signal(signal.SIGHUP)  # the end of the user's own terminal
            assert session.wait() == 129
        finally:
            session.close()
    session = cli.open_terminal("shell", "--session", "work", box)
    try:
        session.expect(f"by {identity}\r\n".encode())
        session.type(b"\x04")
        assert session.wait() == 0
    finally:
        session.close()
    assert as_json(cli.run("terminals", box, "--json"))[0]["exit_code"] == 0


def test_terminals_are_closed_by_title_or_id(cli: Cli, box: str, api: httpx.Client) -> None:
    made = [
        api.post(f"/api/v1/sandboxes/{box}/terminals", json={"command": ["cat"], "title": title}).json()["id"]
        for title in ("one", "two", "two")
    ]
    assert cli.run("terminals", "-q", box).stdout.decode().split() == made
    ambiguous = cli.run("terminal-close", box, "one", "two", "absent", status=1)
    assert ambiguous.stdout.decode().split() == [made[0]]
    assert made[1].encode() in ambiguous.stderr and made[2].encode() in ambiguous.stderr
    assert b"no terminal absent" in ambiguous.stderr and b"atelier terminals box" in ambiguous.stderr
    assert as_json(cli.run("terminal-close", box, *made[1:], "--json")) == {"closed": made[1:], "failed": []}
    assert as_json(cli.run("terminals", box, "--json")) == []
    for wrong in (("--session", " ", box), ("--session", "x", "--attach", "1", box)):
        assert cli.run("shell", *wrong, status=2).stderr
    session = cli.open_terminal("shell", "--session", "0123456789ab", box)
    try:
        assert session.wait() == 125
        assert b"no terminal 0123456789ab" in session.output
    finally:
        session.close()


def test_a_title_obeys_nothing_in_the_users_terminal(cli: Cli, box: str, api: httpx.Client) -> None:
    hostile = ["printf", "\x1b]2;a\u202eb\x9b31m\x07"]
    api.post(f"/api/v1/sandboxes/{box}/terminals", json={"command": hostile})
    shown = cli.run("terminals", box).stdout
    assert b"\x1b" not in shown
    assert "\u202e".encode() not in shown
    assert b"\\x1b]2;a" in shown, "its command is shown, and harmless"


# -- files --------------------------------------------------------------------------------------------------------


def test_cp_a_file_there_and_back(cli: Cli, box: str) -> None:
    data = os.urandom(2_000_000)
    (cli.folder / "data").write_bytes(data)
    cli.run("cp", "data", "box:copy")
    cli.run("cp", "data", "box:")
    cli.run("cp", "data", "box:/tmp/")
    for name in ("copy", "/home/user/data", "/tmp/data"):
        cli.run("cp", f"box:{name}", "back")
        assert (cli.folder / "back").read_bytes() == data
    (cli.folder / "into").mkdir()
    cli.run("cp", "box:copy", "into")
    assert (cli.folder / "into" / "copy").read_bytes() == data
    found = as_json(cli.run("cp", "--json", "box:copy", "again"))
    assert (found["files"], found["bytes"], found["skipped"]) == (1, len(data), [])


def test_cp_by_standard_streams(cli: Cli, box: str) -> None:
    cli.run("cp", "-", "box:hello.txt", input=b"hello")
    assert cli.run("cp", "box:hello.txt", "-").stdout == b"hello"
    assert cli.run("exec", box, "cat", "hello.txt").stdout == b"hello"
    assert b"no name" in cli.run("cp", "-", "box:", input=b"x", status=1).stderr


def make_tree(root: Path) -> None:
    (root / "sub/empty").mkdir(parents=True)
    (root / "sub/file").write_bytes(b"x" * 100_000)
    (root / "link").symlink_to("sub/file")
    Path(os.fsdecode(bytes(root) + b"/\xff\xfe name")).write_bytes(b"binary name")


def tree_of(root: Path) -> dict[bytes, object]:
    found: dict[bytes, object] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in (*folders, *files):
            path = Path(os.fsdecode(os.path.join(folder, name)))
            content: object = "folder"
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[os.path.relpath(bytes(path), os.fsencode(root))] = content
    return found


def test_cp_a_folder_there_and_back(cli: Cli, box: str) -> None:
    make_tree(cli.folder / "tree")
    cli.run("cp", "tree", "box:new")  # there is no `new`: it becomes that
    cli.run("cp", "box:new", "back")
    assert tree_of(cli.folder / "back") == tree_of(cli.folder / "tree")
    cli.run("cp", "tree", "box:")  # the home folder exists: into it
    cli.run("cp", "tree/.", "box:new")  # the content, into what is there
    (cli.folder / "into").mkdir()
    cli.run("cp", "box:tree", "into")
    assert tree_of(cli.folder / "into/tree") == tree_of(cli.folder / "tree")
    cli.run("cp", "box:tree/.", "into")
    assert (cli.folder / "into/sub/file").exists()
    archive = cli.run("cp", "box:tree", "-").stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        assert "sub/file" in {name.removeprefix("./") for name in members.getnames()}


def test_cp_leaves_out_what_leads_outside_and_says_so(cli: Cli, box: str) -> None:
    (cli.folder / "tree").mkdir()
    (cli.folder / "tree/evil").symlink_to("/etc/passwd")
    (cli.folder / "tree/good").write_text("good")
    cli.run("cp", "tree", "box:tree")
    done = cli.run("cp", "box:tree", "back", status=1)
    assert os.listdir(cli.folder / "back") == ["good"]
    assert b"left out: evil" in done.stderr
    found = as_json(cli.run("cp", "--json", "box:tree", "back2", status=1))
    assert found["skipped_count"] == 1


def test_cp_is_bounded(cli: Cli, box: str) -> None:
    make_tree(cli.folder / "tree")
    cli.run("cp", "tree", "box:tree")
    assert b"--max-bytes" in cli.run("cp", "--max-bytes", "1K", "box:tree", "a", status=1).stderr
    assert b"entries" in cli.run("cp", "--max-entries", "2", "box:tree", "b", status=1).stderr


@pytest.mark.parametrize(
    ("source", "destination"),
    [("absent", "box:x"), ("box:absent", "x"), ("nobody:x", "x"), ("x", "nobody:x"), ("box:hello", "absent/x")],
)
def test_cp_names_what_is_missing(cli: Cli, box: str, source: str, destination: str) -> None:
    (cli.folder / "x").write_text("x")
    cli.invoke("cp", "x", "box:hello", status=0)
    done = cli.invoke("cp", source, destination, status=1)
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert sorted(os.listdir(cli.folder)) == ["x"]


# -- the rest -----------------------------------------------------------------------------------------------------


def test_logs_show_the_console(cli: Cli, box: str) -> None:
    raw = cli.run("logs", box).stdout
    assert as_json(cli.run("logs", "--json", box))["console"] == raw.decode("utf-8", "replace")
    assert cli.run("logs", "--bytes", "5", box).stdout == raw[-5:]
    cli.run("logs", "absent", status=1)


def test_logs_end_with_their_sandbox(cli: Cli, box: str) -> None:
    process = cli.start("logs", "--follow", box)
    first = process.stdout.read(1)
    assert process.poll() is None
    cli.run("rm", box)
    assert process.wait(60) == 0
    assert first + process.stdout.read()


def test_images_are_listed_and_built(cli: Cli) -> None:
    steps = [json.loads(line) for line in cli.run("image", "build", "base", "--json").stdout.splitlines()]
    assert steps[-1]["type"] == "built"
    assert cli.run("image", "build").stdout.decode().startswith(steps[-1]["image"]["id"])
    assert "base" in {each["name"] for each in as_json(cli.run("image", "ls", "--json"))["items"]}
    assert b"base" in cli.run("image", "ls").stdout
    assert b"error: " in cli.run("image", "build", "no-such-image", status=1).stderr


def test_events_tell_of_a_sandbox_from_its_beginning(cli: Cli, manager: RunningManager) -> None:
    process = cli.start("events", "--json", "--limit", "3")
    deadline = time.monotonic() + 60
    while process.poll() is None:  # it follows from now on, whenever that is
        assert time.monotonic() < deadline
        cli.run("create", "--name", "told")
        cli.run("rm", "told")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in output.splitlines()]
    assert len(events) == 3
    assert all(event["kind"] for event in events)
    again = cli.run("events", "--after", str(events[0]["id"]), "--limit", "2", "--json").stdout
    assert [json.loads(line)["id"] for line in again.splitlines()] == [event["id"] for event in events[1:]]


def test_version_names_both_sides(cli: Cli, manager: RunningManager) -> None:
    found = as_json(cli.run("version", "--json"))
    assert found["manager"]["mode"] == "mock"
    assert found["client"] == found["manager"]["version"]
    assert manager.url.encode() in cli.run("version").stdout


def test_doctor_needs_no_manager(cli: Cli) -> None:
    assert as_json(cli.run("doctor", "--mode", "mock", "--json"))["mode"] == "mock"
    assert b"mode mock" in cli.run("doctor", "--mode", "mock").stdout


def test_up_refuses_a_second_manager_in_words(cli: Cli, manager: RunningManager) -> None:
    done = cli.run("up", "--mode", "mock", "--listen", "127.0.0.1:0", "--data-dir", str(manager.data_dir), status=1)
    assert b"error: " in done.stderr and b"hint: " in done.stderr


def test_names_are_completed(cli: Cli, box: str) -> None:
    import sys

    words = {"_ATELIER_COMPLETE": "bash_complete", "COMP_WORDS": "atelier get b", "COMP_CWORD": "2"}
    done = subprocess.run(
        [Path(sys.executable).with_name("atelier")], env={**cli.environment, **words}, capture_output=True, timeout=60
    )
    assert done.stdout.split() == [b"plain,box"]


def test_a_pipe_that_closes_early_is_no_crash(cli: Cli, box: str) -> None:
    process = cli.start("ls", "--json")
    process.stdout.close()
    process.wait(60)
    assert b"Traceback" not in process.stderr.read()

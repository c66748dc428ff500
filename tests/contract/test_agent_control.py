"""The agent as a whole on loopback: status, ``/init``, the token, who may reach the control services, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from agent_fixture import SOURCE, RunningAgent, running_agent


def test_health_and_metrics(agent: RunningAgent) -> None:
    assert httpx.get(f"{agent.url}/health").status_code == 204
    metrics = httpx.get(f"{agent.url}/metrics").json()
    assert metrics["cpu_count"] == os.cpu_count()
    assert 0 <= metrics["cpu_used_pct"] <= 100
    assert 0 < metrics["mem_used"] < metrics["mem_total"]
    assert 0 < metrics["disk_used"] <= metrics["disk_total"]
    assert metrics["uptime_seconds"] > 0


def test_a_listener_has_no_control_services(agent: RunningAgent) -> None:
    assert httpx.post(f"{agent.url}/init", json={}).status_code == 404
    assert httpx.post(f"{agent.url}/atelier.v1.Control/Shutdown", json={}).status_code == 404
    assert httpx.post(f"{agent.url}/atelier.v1.Control/SetClock", json={}).status_code == 404


def test_init_sets_token_environment_user_and_folder(tmp_path: Path) -> None:
    with running_agent("--development") as agent:
        message = {
            "accessToken": "secret",
            "envVars": {"GREETING": "hello", "PATH": "/usr/bin:/bin"},
            "defaultUser": "root",
            "defaultWorkdir": str(tmp_path),
            "hostname": "must-not-be-set-here",
            "hostTimeNs": "1",
        }
        assert httpx.post(f"{agent.url}/init", json={"envVars": 1}).status_code == 400
        assert httpx.post(f"{agent.url}/init", json=message).status_code == 204
        assert os.uname().nodename != "must-not-be-set-here"
        assert httpx.post(f"{agent.url}/init", json={}).status_code == 401
        assert httpx.get(f"{agent.url}/metrics").status_code == 401
        assert httpx.get(f"{agent.url}/health").status_code == 204
        agent.config = type(agent.config)(
            debug=True,
            http_version="1.1",
            sandbox_url=agent.url,
            extra_sandbox_headers={"X-Access-Token": "secret"},
        )
        result = agent.commands.run("echo $GREETING; pwd -P")
        assert result.stdout.splitlines() == ["hello", str(tmp_path.resolve())]
        for message in ({"offsetNs": "x"}, {"offsetNs": 1}, {"offsetNs": "9" * 20}, {"offsetNs": "--1"}):
            wrong = httpx.post(
                f"{agent.url}/atelier.v1.Control/SetClock", json=message, headers={"X-Access-Token": "secret"}
            )
            assert wrong.json()["code"] == "invalid_argument"
        for message in ({}, {"offsetNs": str(-3600 * 10**9)}, {"offsetNs": str(3600 * 10**9)}):
            clock = httpx.post(
                f"{agent.url}/atelier.v1.Control/SetClock", json=message, headers={"X-Access-Token": "secret"}
            )
            assert abs(int(clock.json()["timeNs"]) - time.time_ns()) < 60 * 10**9, "told, and nothing set here"
        refused = httpx.post(f"{agent.url}/atelier.v1.Control/Shutdown", json={}, headers={"X-Access-Token": "secret"})
        assert refused.json()["code"] == "failed_precondition"


def test_a_killed_agent_leaves_quiet_processes_alive(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with running_agent() as agent:
        handle = agent.commands.run(f"while [ ! -e {mark} ]; do sleep 0.1; done; touch {mark}.seen", background=True)
        agent.process.send_signal(signal.SIGKILL)
        agent.process.wait(10)
        assert Path(f"/proc/{handle.pid}").exists()
    mark.touch()
    end = time.monotonic() + 20
    while not mark.with_name("mark.seen").exists():
        assert time.monotonic() < end, "the process did not outlive its agent"
        time.sleep(0.02)


@pytest.mark.parametrize("options", [["--what"], ["--listen"], ["--listen", "0.0.0.0:1"], ["--listen", "127.0.0.1:x"]])
def test_wrong_options_are_refused_in_words(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "atelier.guest_agent", *options],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("guest agent: ")


def test_the_agent_imports_neither_tls_nor_argparse() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import atelier.guest_agent.__main__ as m; m.main(['--help']); "
        "import atelier.guest_agent.process, atelier.guest_agent.status, atelier.guest_agent.control; "
        "print([n for n in ('_ssl', '_hashlib', 'argparse', 'dataclasses', 'ctypes', 'pwd', 'urllib.request') "
        "if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(SOURCE)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

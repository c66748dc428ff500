"""The network holder as the host's service runs it: an ordinary user with the capability NET_ADMIN, in the host's own
namespace, with nothing of root's besides."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atelier.host_setup.units import NETWORK_CAPABILITIES
from atelier.model.layout import RunLayout

NOBODY = 65534
INSTALLATION = "test"


def _why_not() -> str:
    if os.geteuid() != 0:
        return "takes root, to become a user with one capability"
    if missing := [each for each in ("unshare", "setpriv", "ip", "nft") if shutil.which(each) is None]:
        return f"needs {', '.join(missing)}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "no network namespace can be made here"
    return ""


def _ask(path: Path, operation: str, **fields: object) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.sendall(json.dumps({"operation": operation, **fields}).encode() + b"\n")
        return json.loads(connection.makefile().readline())


def test_a_user_with_the_services_capabilities_holds_the_hosts_bridge(tmp_path: Path) -> None:
    if reason := _why_not():
        pytest.skip(reason)
    # What pytest makes is closed to others.
    folder = Path("/tmp") / f"atelier-capability-{os.getpid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    run = RunLayout(folder)
    # This checkout may lie in a folder that is closed to others: that is read by a right of the test's, not of the service's.
    capabilities = ",".join(
        ["-all", *(f"+{each.removeprefix('CAP_').lower()}" for each in NETWORK_CAPABILITIES), "+dac_read_search"]
    )
    holder = [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={capabilities}"),
        *(f"--ambient-caps={capabilities}", f"--bounding-set={capabilities}", "--no-new-privs"),
        *(sys.executable, "-P", "-m", "atelier.network_holder", "--run-dir", str(folder), "--home", "host"),
        *("--plan-file", str(folder / "plan.json"), "--installation", INSTALLATION, "--bridge-name", "sandbr"),
    ]
    script = 'echo 1 >/proc/sys/net/ipv4/ip_forward && ip link set lo up && exec "$@"'
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script, "sh", *holder], stdout=log, stderr=log, cwd="/"
        )
    try:
        deadline = time.monotonic() + 60
        while not run.network_socket.exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert _ask(run.network_socket, "ping")["ok"] is True
        inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Uid:\t{NOBODY}\t{NOBODY}" in status
        assert "sandbr" in subprocess.check_output([*inside, "ip", "-br", "link"], text=True)
        assert f"atelier_{INSTALLATION}" in subprocess.check_output([*inside, "nft", "list", "tables"], text=True)
        assert _ask(run.network_socket, "close")["ok"] is True
        process.wait(30)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder)

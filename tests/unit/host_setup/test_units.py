"""The host's services: what systemd says of the units, and that nothing in the manager's keeps sudo from root."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atelier.host_setup.units import (
    NETWORK_CAPABILITIES,
    POOL_UNIT,
    SERVICES,
    UNITS,
    deploy_folder,
    render,
)

VALUES = {
    "USER": "root",
    "HOME": "/var/lib/atelier",
    "PYTHON": sys.executable,
    "CONFIG": "/etc/atelier/atelier.toml",
    "DATA_DIR": "/var/lib/atelier/data",
    "NETWORK_CAPABILITIES": " ".join(NETWORK_CAPABILITIES),
    "LOOP_FILE": "/var/lib/pool.img",
    "VOLUME_GROUP": "trial",
    "LOSETUP": shutil.which("losetup", path="/usr/sbin:/sbin") or "/bin/true",
    "VGCHANGE": shutil.which("vgchange", path="/usr/sbin:/sbin") or "/bin/true",
}

# Source: systemd.exec(5): for a service that has a User= and no CAP_SYS_ADMIN these set NoNewPrivileges...
_IMPLY_NO_NEW_PRIVILEGES = frozenset(
    [
        "NoNewPrivileges",
        "DynamicUser",
        "SystemCallFilter",
        "SystemCallArchitectures",
        "SystemCallLog",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "RestrictFileSystems",
        "PrivateDevices",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectClock",
        "ProtectHostname",
        "MemoryDenyWriteExecute",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "LockPersonality",
    ]
)
# ...these give it mounts of its own, in which what root makes for it is not seen or cannot be made...
_IMPLY_MOUNTS = frozenset(
    [
        "PrivateTmp",
        "PrivateMounts",
        "ProtectSystem",
        "ProtectHome",
        "ProtectControlGroups",
        "ProtectProc",
        "ProcSubset",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "TemporaryFileSystem",
        "BindPaths",
        "BindReadOnlyPaths",
        "RootDirectory",
        "RootImage",
        "MountImages",
        "ExtensionImages",
        "MountAPIVFS",
        "LogNamespace",
        "PrivateUsers",
        "PrivateNetwork",
        "PrivateIPC",
    ]
)
# ...and these take from root's program what it is started for.
_TAKE_RIGHTS = frozenset(["CapabilityBoundingSet", "AmbientCapabilities", "SecureBits", "DevicePolicy", "DeviceAllow"])


def _assignments(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in render(deploy_folder() / "systemd" / name, VALUES).decode().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_nothing_in_the_managers_unit_keeps_sudo_from_root() -> None:
    set_there = set(_assignments("atelier-manager.service"))
    assert set_there & (_IMPLY_NO_NEW_PRIVILEGES | _IMPLY_MOUNTS | _TAKE_RIGHTS) == set()


def test_what_needs_no_root_has_none() -> None:
    for name, capabilities in (
        ("atelier-gateway.service", "CAP_NET_BIND_SERVICE"),
        ("atelier-network.service", " ".join(NETWORK_CAPABILITIES)),
    ):
        unit = _assignments(name)
        assert unit["NoNewPrivileges"] == ["yes"], name
        assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == [capabilities], name
        assert unit["ProtectSystem"] == ["strict"], name


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_watched_started_again_and_kept_apart(name: str) -> None:
    unit = _assignments(name)
    assert unit["Type"] == ["notify"]
    assert int(unit["WatchdogSec"][0]) >= 30
    assert unit["Restart"][0] in ("always", "on-failure")
    assert unit["RuntimeDirectoryPreserve"] == ["yes"], "sockets of the others lie there, too"
    assert unit["WantedBy"] == ["multi-user.target"]


def test_the_manager_starts_last_and_leaves_machines_running() -> None:
    unit = _assignments("atelier-manager.service")
    assert {"atelier-network.service", "atelier-gateway.service"} <= set(unit["After"][0].split())
    assert unit["KillMode"] == ["process"]


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name in (*UNITS, POOL_UNIT):
        (tmp_path / name).write_bytes(render(deploy_folder() / "systemd" / name, VALUES))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in (*UNITS, POOL_UNIT))],
        capture_output=True,
        text=True,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    told = [line for line in done.stderr.splitlines() if "atelier-" in line]
    assert (done.returncode, told) == (0, []), done.stderr


def test_a_template_without_its_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unit").write_text("User=@NOBODY@\n")
    with pytest.raises(KeyError):
        render(tmp_path / "unit", VALUES)

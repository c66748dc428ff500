"""What the checks of the network say on machines that have what it takes, and on machines that lack a piece."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.network_lab import Home, NetworkLab, network_lab, why_no_lab

_CHECK = (
    "import json; from atelier.host.checks.network import check_bridge_network;"
    "print(json.dumps([[each.status, each.message, each.remedy] for each in check_bridge_network()]))"
)


@pytest.fixture(params=list(Home))
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkLab]:
    home: Home = request.param
    if missing := why_no_lab(home):
        pytest.skip(missing)
    tmp_path.chmod(0o755)
    with network_lab(tmp_path, home) as made:
        yield made


of_user = pytest.mark.parametrize("lab", [Home.USER], indirect=True)
of_root = pytest.mark.parametrize("lab", [Home.ROOT], indirect=True)


def check(lab: NetworkLab, **variables: str) -> list[list[str]]:
    words = [*lab.as_owner(), "env", *(f"{name}={value}" for name, value in variables.items())]
    return json.loads(lab.in_host(*words, sys.executable, "-c", _CHECK))


def test_all_is_there_and_nothing_stays(lab: NetworkLab) -> None:
    before = lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset"), lab.in_host("ip", "netns")
    ((status, message, remedy),) = check(lab)
    assert (status, remedy) == ("ok", ""), message
    assert (
        lab.in_host("ip", "-br", "link"),
        lab.in_host("nft", "list", "ruleset"),
        lab.in_host("ip", "netns"),
    ) == before


@of_user
def test_a_tun_device_for_root_alone(lab: NetworkLab) -> None:
    lab.in_host("chmod", "600", "/dev/net/tun")
    ((status, message, remedy),) = check(lab)
    assert status == "failed"
    assert "/dev/net/tun" in message
    assert "chmod 0666 /dev/net/tun" in remedy


@of_root
def test_no_forwarding(lab: NetworkLab) -> None:
    lab.set_forwarding(False)
    ((status, _, remedy),) = check(lab)
    assert status == "failed"
    assert "sysctl -w net.ipv4.ip_forward=1" in remedy


def test_namespaces_that_are_forbidden(lab: NetworkLab, tmp_path: Path) -> None:
    """As the kernel's word comes through."""
    programs = _programs(tmp_path, {"unshare": "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"})
    ((status, message, remedy),) = check(lab, PATH=f"{programs}:{os.environ['PATH']}")
    assert status == "failed"
    assert "Operation not permitted" in message
    assert "namespaces" in message
    assert ("as an ordinary user" in remedy) == (lab.home is not Home.USER)


def test_a_kernel_without_a_bridge(lab: NetworkLab, tmp_path: Path) -> None:
    ip = shutil.which("ip")
    refusing = f'case "$*" in *bridge*) echo "Error: Unknown device type." >&2; exit 2;; esac; exec {ip} "$@"'
    programs = _programs(tmp_path, {"ip": refusing})
    ((status, message, remedy),) = check(lab, PATH=f"{programs}:{os.environ['PATH']}")
    assert status == "failed"
    assert message.endswith("failed at its bridge: Error: Unknown device type.")
    assert remedy == "as root: modprobe bridge"


@of_user
def test_without_pasta(lab: NetworkLab, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("ip", "nsenter", "unshare", "sh"):
        (programs / name).symlink_to(str(shutil.which(name)))
    programs.chmod(0o755)
    ((status, message, remedy),) = check(lab, PATH=str(programs))
    assert (status, message, remedy) == ("failed", "pasta is not installed", "apt-get install passt")


def _programs(folder: Path, scripts: Mapping[str, str]) -> Path:
    programs = folder / "programs"
    programs.mkdir(mode=0o755)
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return programs

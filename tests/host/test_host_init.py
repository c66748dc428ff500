"""``atelier host`` on a bare Debian: a host is made, lives through a reboot, tells what is missing, and is taken back."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost

HOST = f"{PYTHON} -P -m atelier.cli host"
CONFIG = f"""
[storage]
volume_group = "sandboxes"
[network]
bridgeName = "sandbr0"
[host]
storage_device = "{LVM_DISK}"
"""
SERVICES = ("atelier-network", "atelier-gateway", "atelier-manager")
# What a package manager, services of others and the clock write by themselves is nobody's change.
_STATE = r"""
dpkg-query -W -f '${Package} ${db:Status-Status}\n'
ip -brief link | awk '{print $1}'
nft list ruleset
sysctl net.ipv4.ip_forward
cat /etc/passwd /etc/group /etc/subuid
vgs --noheadings; lvs --noheadings; wipefs /dev/vdb
systemctl list-unit-files --no-legend | grep -i atelier | grep -v test-agent || true
find /etc /usr/local /opt/atelier /var/lib/atelier /run/atelier* -not -path '/etc/lvm/archive*' -not -path '/etc/lvm/backup*' \
    -not -path '/etc/lvm/devices*' -not -name '*.pyc' -not -name __pycache__ -not -name 'passwd-' -not -name 'group-' \
    -not -name 'subuid-' -not -name 'subgid-' -not -name 'shadow*' -not -name 'gshadow*' -not -name '.pwd.lock' \
    -not -name 'ld.so.cache' -type f -printf '%p %m %u:%g %s\n' 2>/dev/null | sort || true
"""


def _package(name: str) -> bytes:
    """A Debian package with nothing in it: the machine has no archive at hand."""

    def member(file: str, content: bytes) -> bytes:
        head = f"{file:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    def packed(files: dict[str, bytes]) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return data.getvalue()

    control = _control(name).encode()
    parts = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", packed({"./control": control})),
        ("data.tar.gz", packed({})),
    )
    return b"!<arch>\n" + b"".join(member(file, content) for file, content in parts)


def _control(name: str) -> str:
    return (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: stands for the one of the archive\n"
    )


@pytest.fixture(scope="module")
def host(shared_host: EmulatedHost) -> EmulatedHost:
    index = ""
    for name in ("mmdebstrap", "uidmap"):
        content = _package(name)
        shared_host.write(f"/srv/archive/{name}.deb", content)
        sha256 = hashlib.sha256(content).hexdigest()
        index += f"{_control(name)}Filename: ./{name}.deb\nSize: {len(content)}\nSHA256: {sha256}\n\n"
    shared_host.write("/srv/archive/Packages", index)
    shared_host.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/archive ./\n")
    shared_host.write("/root/host.toml", CONFIG)
    return shared_host


def test_a_host_is_made_lives_and_is_taken_back(host: EmulatedHost) -> None:
    before = host.run(_STATE).out
    shown = host.run(f"{HOST} init --config /root/host.toml --check", seconds=600)
    assert "make the volume group sandboxes on /dev/vdb" in shown.err
    assert host.run(_STATE).out == before, "--check changes nothing"

    host.run(f"{HOST} init --config /root/host.toml --yes", seconds=1500)
    _expect_running(host)
    again = host.run(f"{HOST} init --yes", seconds=600)
    assert "nothing is to be changed" in again.err
    found = host.run(f"{HOST} doctor", seconds=600, check=False)
    assert "FAIL" not in found.out.replace("FAIL  network: there is no", ""), found.out
    listed = host.run(f"cd / && {PYTHON} -P -m atelier.cli ls --json", user="atelier", seconds=300)
    assert listed.out.strip() == "[]"

    host.reboot()
    host.run("systemctl is-system-running --wait || true", seconds=1500)
    _expect_running(host)

    host.run("mv /etc/sudoers.d/atelier /root/entry")
    found = host.run(f"{HOST} doctor", seconds=600, check=False)
    assert found.status == 1
    assert "atelier may not start /usr/local/sbin/atelier-privileged" in found.out
    host.run("mv /root/entry /etc/sudoers.d/atelier")

    done = host.run(f"{HOST} uninstall --remove-data --packages --yes", seconds=1500)
    assert "kept:" not in done.err, done.err
    assert host.run(_STATE).out == before


def _expect_running(host: EmulatedHost) -> None:
    for name in SERVICES:
        state = host.run(f"systemctl is-active {name}", check=False).out.strip()
        assert state == "active", host.run(f"journalctl -u {name} -n 40 --no-pager").out
        pid = host.run(f"systemctl show --property=MainPID --value {name}").out.strip()
        status = host.read(f"/proc/{pid}/status")
        assert "\nUid:\t0" not in status, f"{name} is not root's"
        if name == "atelier-manager":
            assert "NoNewPrivs:\t0" in status
    host.run("sudo -n -l -- /usr/local/sbin/atelier-privileged storage", user="atelier")
    assert "sandbr0" in host.run("ip -brief link").out

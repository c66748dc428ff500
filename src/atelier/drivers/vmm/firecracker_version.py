"""Which Firecracker is installed, and what it can do. Called by the Firecracker driver and by whoever chooses a driver.

Source: Firecracker CHANGELOG.md.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from atelier.host import command
from atelier.model.errors import CommandError, MissingProgramError, VmmError

_SAID = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_ELF = b"\x7fELF"
_ARCHITECTURES = {62: "x86_64", 183: "aarch64"}
"""By the number in an ELF header. Source: elf(5), e_machine."""


@dataclass(frozen=True, slots=True, order=True)
class FirecrackerVersion:
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def keeps_clock(self) -> bool:
        """Whether a restored guest's clock can be set on by the time that passed (``clock_realtime``)."""
        return self >= FirecrackerVersion(1, 16, 0)


MINIMUM = FirecrackerVersion(1, 12, 0)
"""The first with ``network_overrides``: without them a saved machine could be restored with its parent's TAP only."""


def parse_version(said: str) -> FirecrackerVersion:
    """Of ``Firecracker v1.16.1`` or ``1.16.1``. Raises ValueError."""
    found = _SAID.search(said)
    if found is None:
        raise ValueError(f"no version in {said[:200]!r}")
    return FirecrackerVersion(*(int(number) for number in found.groups()))


async def read_version(executable: Path) -> FirecrackerVersion:
    """Of an executable that can be used here.

    Raises MissingProgramError, VmmError (``firecracker_too_old``, ``firecracker_wrong_architecture``,
    ``firecracker_unusable``).
    """
    _check_architecture(executable)
    try:
        said = (await command.run([str(executable), "--version"], timeout_seconds=10)).stdout.decode(errors="replace")
        version = parse_version(said.partition("\n")[0])
    except (OSError, ValueError, CommandError) as error:
        raise VmmError(
            f"{executable} does not say its version: {error}",
            code="firecracker_unusable",
            hint="take the firecracker of a release, and make it executable",
        ) from error
    if version < MINIMUM:
        raise VmmError(
            f"{executable} is Firecracker {version}; {MINIMUM} or newer is needed",
            code="firecracker_too_old",
            hint="install a newer release, or name one with ATELIER_FIRECRACKER",
        )
    return version


def check_kernel(kernel: Path) -> None:
    """Raises VmmError (``kernel_not_elf``): Firecracker boots no bzImage. Source: Firecracker docs/kernel-policy.md."""
    try:
        with kernel.open("rb") as file:
            begin = file.read(len(_ELF))
    except OSError as error:
        raise VmmError(f"the guest kernel {kernel} cannot be read: {error.strerror}", hint="build it again") from error
    if begin != _ELF:
        raise VmmError(
            f"the guest kernel {kernel} is no ELF image, which is what Firecracker boots",
            code="kernel_not_elf",
            hint="build Atelier's own kernel, whose vmlinux is one",
        )


def _check_architecture(executable: Path) -> None:
    try:
        with executable.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise MissingProgramError(
            f"there is no Firecracker at {executable}: {error.strerror}", hint="install it, or set ATELIER_FIRECRACKER"
        ) from error
    if header[:4] != _ELF:
        # A script, as tests have, runs anywhere.
        return
    architecture = _ARCHITECTURES.get(int.from_bytes(header[18:20], "little"), "another machine")
    if architecture != platform.machine():
        raise VmmError(
            f"{executable} is for {architecture}, this host is {platform.machine()}",
            code="firecracker_wrong_architecture",
            hint=f"take the release for {platform.machine()}",
        )

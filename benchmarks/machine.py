"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def describe(accelerator: str | None) -> dict[str, object]:
    """``accelerator`` is None where no guest was booted."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpu_count": os.cpu_count(),
        "memory_mib": int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "qemu": _qemu_version(),
        "accelerator": accelerator,
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _qemu_version() -> str:
    try:
        answer = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    except OSError:
        return ""
    return answer.stdout.splitlines()[0].removeprefix("QEMU emulator version ")

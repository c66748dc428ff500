"""What lives in the fake machine: a guest that counts, in its memory and on its disk, and says so on its console."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

_OFFSET = 8000
_DIGITS = 8
_PAUSE_SECONDS = 0.05


class CountingGuest:
    """Says on stdout what ``tests.saved_machines.SIGN`` reads. ``disk``: an open file of its root disk; ``link_is_up``
    asks its card."""

    def __init__(self, disk: int, link_is_up: Callable[[], bool], memory: dict[str, str] | None = None) -> None:
        self.disk = disk
        self.sectors = os.lseek(disk, 0, os.SEEK_END) // 512
        self._link_is_up = link_is_up
        self.memory = memory or _new_memory()
        self._runs = threading.Event()
        self._step = threading.Lock()
        threading.Thread(target=self._live, daemon=True).start()

    def resume(self) -> None:
        self._runs.set()

    def pause(self) -> None:
        """Between two of its steps, never within one."""
        self._runs.clear()
        with self._step:
            pass

    def changed_disk(self, disk: int) -> None:
        with self._step:
            os.close(self.disk)
            self.disk = disk
            self.sectors = os.lseek(disk, 0, os.SEEK_END) // 512

    def _live(self) -> None:
        while True:
            self._runs.wait()
            with self._step:
                if self._runs.is_set():
                    self._count()
            threading.Event().wait(_PAUSE_SECONDS)

    def _count(self) -> None:
        count = int(self.memory["count"]) + 1
        self.memory["count"] = str(count)
        was = os.pread(self.disk, _DIGITS, _OFFSET).strip(b"\0 ") or b"0"
        os.pwrite(self.disk, f"{count:{_DIGITS}}".encode(), _OFFSET)
        whole = "whole" if _sum(self.memory["random"]) == self.memory["sum"] else "BROKEN"
        link = int(self._link_is_up())
        sign = f"COUNT {count} disk {int(was)} of {self.sectors} memory {whole} link {link}\r\n"
        os.write(1, sign.encode())


def _new_memory() -> dict[str, str]:
    random = os.urandom(1024).hex()
    return {"count": "0", "random": random, "sum": _sum(random)}


def _sum(random: str) -> str:
    return hashlib.sha256(random.encode()).hexdigest()

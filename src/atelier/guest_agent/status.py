"""``/health`` (204), ``/metrics`` and ``/envs``, in E2B's shapes: how the guest is doing. Registered by ``program``.

Reads /proc and the root file system; changes nothing. Sizes are bytes.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final

from atelier.guest_agent.http import Request, Response, Router, json_response
from atelier.guest_agent.state import AgentState

_HEALTHY: Final = Response(204)
_MIN_INTERVAL_TICKS: Final = 10
"""Shorter intervals say nothing about the CPU: the kernel counts in 10 ms ticks."""


class Meter:
    """``cpu_used_pct`` is of all CPUs together, 0 to 100, since the last time it was asked for."""

    def __init__(self) -> None:
        self._busy_ticks = 0
        self._all_ticks = 0
        self._percent = 0.0

    def read(self) -> dict[str, Any]:
        memory = _memory_kib()
        total = memory.get("MemTotal", 0)
        available = memory.get("MemAvailable", memory.get("MemFree", 0))
        disk = os.statvfs("/")
        return {
            "ts": int(time.time()),
            "cpu_count": os.cpu_count() or 1,
            "cpu_used_pct": self._cpu_percent(),
            "mem_total": total * 1024,
            "mem_used": max(0, total - available) * 1024,
            "mem_cache": memory.get("Cached", 0) * 1024,
            "disk_total": disk.f_blocks * disk.f_frsize,
            "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
            "uptime_seconds": round(time.clock_gettime(time.CLOCK_BOOTTIME), 2),
        }

    def _cpu_percent(self) -> float:
        with open("/proc/stat", "rb") as lines:
            # user nice system idle iowait irq softirq steal; guest time is part of user. Source: proc(5).
            ticks = [int(word) for word in lines.readline().split()[1:9]]
        all_ticks = sum(ticks)
        busy_ticks = all_ticks - ticks[3] - ticks[4]
        passed = all_ticks - self._all_ticks
        if passed >= _MIN_INTERVAL_TICKS:
            self._percent = round(min(100.0, max(0.0, 100 * (busy_ticks - self._busy_ticks) / passed)), 2)
            self._busy_ticks, self._all_ticks = busy_ticks, all_ticks
        return self._percent


def _memory_kib() -> dict[str, int]:
    sizes: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdigit():
                sizes[name] = int(words[0])
    return sizes


def register(router: Router, state: AgentState) -> None:
    meter = Meter()

    async def health(request: Request) -> Response:
        return _HEALTHY

    async def metrics(request: Request) -> Response:
        return json_response(meter.read())

    async def environment(request: Request) -> Response:
        return json_response(state.environment)

    router.add("GET", "/health", health, is_public=True, is_still=True)
    router.add("GET", "/metrics", metrics, is_still=True)
    router.add("GET", "/envs", environment)

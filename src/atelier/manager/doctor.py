"""``atelier doctor``: says what of this machine fits Atelier and what does not, with the remedy. Changes nothing."""

from __future__ import annotations

import dataclasses
import json
import sys

from atelier.config.settings import ServerMode, Settings
from atelier.host.checks.local import CheckResult, CheckStatus, check_machine

_MARKS = {CheckStatus.OK: "ok", CheckStatus.WARNING: "warn", CheckStatus.FAILED: "FAIL"}


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print the findings; the exit status is 1 if a check failed, else 0."""
    results: list[CheckResult] = []
    if settings.mode is not ServerMode.MOCK:
        address = (settings.listen.host, settings.listen.port)
        results = check_machine(settings.data_dir, settings.cache_dir, settings.run_dir, address)
    if as_json:
        document = {"mode": settings.mode, "checks": [dataclasses.asdict(result) for result in results]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(f"mode {settings.mode}\n")
        for result in results:
            sys.stdout.write(f"  {_MARKS[result.status]:4}  {result.name}: {result.message}\n")
            if result.remedy:
                sys.stdout.write(f"        -> {result.remedy}\n")
    return 1 if any(result.status is CheckStatus.FAILED for result in results) else 0

"""``atelier doctor``: says what of this machine fits Atelier and what does not, with the remedy. Changes nothing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from atelier.config.production import CompanionChoice
from atelier.config.settings import ServerMode, Settings
from atelier.db.closed_files import read_stuck_sandboxes
from atelier.host.checks.edge import check_edge
from atelier.host.checks.local import CheckResult, CheckStatus, check_machine
from atelier.host.checks.ssh import check_ssh
from atelier.manager.network_choice import explain_network
from atelier.model.errors import AtelierError
from atelier.model.layout import DataLayout

_MARKS = {CheckStatus.OK: "ok", CheckStatus.WARNING: "warn", CheckStatus.FAILED: "FAIL"}


def check_sandboxes(database: Path) -> list[CheckResult]:
    """Whether work on a sandbox is stuck; nothing to say where there is no database yet."""
    if not database.exists():
        return []
    try:
        stuck = read_stuck_sandboxes(database)
    except AtelierError as error:
        return [CheckResult("database", CheckStatus.FAILED, error.message, error.hint)]
    if not stuck:
        return [CheckResult("sandboxes", CheckStatus.OK, "nothing is stuck")]
    return [CheckResult(f"sandbox {each.name}", CheckStatus.FAILED, each.message, each.hint) for each in stuck]


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print the findings; the exit status is 1 if a check failed, else 0."""
    results: list[CheckResult] = []
    if settings.mode is not ServerMode.MOCK:
        address = (settings.listen.host, settings.listen.port)
        results = check_machine(settings.data_dir, settings.cache_dir, settings.run_dir, address)
        if settings.production.companions is CompanionChoice.KEPT:
            results += explain_network(settings.network)
        is_public = settings.public_url.startswith("https:")
        ssh = settings.ssh_listen
        results.append(check_ssh((ssh.host, ssh.port) if ssh else None, is_reached_from_elsewhere=is_public))
        if is_public:
            results += check_edge(settings.public_url, settings.previews.domain, settings.previews.port)
    results += check_sandboxes(DataLayout(settings.data_dir).database)
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

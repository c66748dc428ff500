"""Templates with real guests: an installation boots its first sandbox and restores the second from the template that it
has made meanwhile; another installation with the same cache boots none; and no two guests are alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.footprint import left_of
from tests.running_manager import (
    WITH_TEMPLATES,
    RunningManager,
    cache_with_own_templates,
    running_local_manager,
    wait_for_template,
    wait_until,
)
from tests.vm.test_pause_and_fork import WAIT_SECONDS, WHO, check_clock, create, rows, run

from atelier import Sandbox, Snapshot

URANDOM = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '"


def timed(make: Callable[[], Sandbox], what: str) -> Sandbox:
    """Told, not asserted."""
    began = time.monotonic()
    made = make()
    print(f"{what}: {time.monotonic() - began:.2f} s")
    return made


def booted(box: Sandbox) -> bool:
    return b"atelier: initramfs" in box.read_console()


def templates(manager: RunningManager) -> list[tuple[Any, ...]]:
    return rows(manager, "SELECT id, sandbox_id FROM snapshots WHERE purpose = 'template' AND state = 'ready'")


def test_a_fresh_installation_restores_what_another_has_made(tmp_path: Path) -> None:
    cache = cache_with_own_templates(tmp_path)
    variables = {**WITH_TEMPLATES, "ATELIER_CACHE_DIR": str(cache)}
    with running_local_manager(variables) as maker:
        with timed(lambda: create(maker, name="cold"), "booted") as cold:
            assert booted(cold)
            template, internal = wait_for_template(maker)
            assert left_of(maker, internal) == [], "of the sandbox that it was made of"
            assert [each.name for each in Sandbox.list(api_url=maker.url, api_key=maker.key)] == ["cold"]
            assert Snapshot.list(api_url=maker.url, api_key=maker.key) == []
            wait_until(lambda: list(cache.glob("templates/*/template.json")), WAIT_SECONDS)
        (made,) = templates(maker)
        assert made[0] == template
        with (
            timed(lambda: create(maker, name="own"), "restored from its own template") as own,
            running_local_manager(variables) as adopter,
            timed(lambda: create(adopter, name="other"), "restored from another's, which it adopted") as other,
        ):
            assert not booted(own)
            assert any(template in str(path) for path in maker.data_dir.rglob("*"))
            assert not booted(other), "it did not boot"
            (adopted,) = templates(adopter)
            assert adopted[0] != made[0]
            assert adopted[1] == made[1], "of the sandbox that the other installation has saved"
            assert rows(adopter, "SELECT count(*) FROM sandboxes") == [(1,)], "it makes none of its own"
            assert run(other, "echo written >here && cat here") == "written\n"
            for each in (own, other):
                check_clock(each)
            mine, others = ([*run(each, WHO).split(), run(each, URANDOM).strip()] for each in (own, other))
            names = ("hostname", "machine-id", "MAC", "generation", "host key", "urandom")
            for name, one, another in zip(names, mine, others, strict=True):
                assert one != another or name == "MAC", name

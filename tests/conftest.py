"""What every test run shares: the order of the folders, what runs beside what, and the refusal of skips where all must
run.

With several workers (scripts/test), the tests of one file stay together, and those that boot real guests stay in four
groups: they are the longest, and more guests at a time would be late for everything on few processors. Two of the groups
begin at once, beside the fast tests, and the others among them, so that no worker is left alone with one in the end.

Tests skip when a probe says that the machine cannot do what they need. With ``ATELIER_REQUIRE_ALL=1`` (scripts/test
sets it in CI) such a skip counts as a failure, since there it means that a test silently stopped running. A skip that
is right everywhere, whatever the machine, begins with ``not applicable:``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Generator
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

FOLDER_ORDER = ("architecture", "unit", "contract", "lifecycle", "api", "e2e", "host", "vm")
"""Fast ones first, real guests last, so that a slip is told in seconds."""

_GUESTS = FOLDER_ORDER[-1]

_GROUPS = {
    "one guest that they share": re.compile(r"\blocal_manager\b|\bsandbox: Sandbox\b"),  # tests/vm/conftest.py
    "bridge": re.compile(r"^class BridgedManager\b", re.MULTILINE),
    "guests of managers": re.compile(r"^from tests\.(running_manager|kill_under_load|soak) ", re.MULTILINE),
    "guests of drivers": re.compile(""),
}
"""The groups of files in tests/vm: a file is of the first of which its text has the sign."""
_GROUP_BEFORE = {"bridge": "contract", "guests of drivers": "lifecycle"}
"""The folder before whose tests a group stands where there are several workers; the others stand before all."""

ALWAYS_RIGHT = "not applicable:"


def _requires_all() -> bool:
    return os.environ.get("ATELIER_REQUIRE_ALL", "") == "1"


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath / "tests").parts[0]


@cache
def _group(file: Path) -> str:
    text = file.read_text()
    return next(group for group, sign in _GROUPS.items() if sign.search(text))


def _place(item: pytest.Item) -> float:
    folder = _folder(item)
    if folder == _GUESTS and "PYTEST_XDIST_WORKER" in os.environ:
        later = _GROUP_BEFORE.get(_group(item.path))
        return -1 if later is None else FOLDER_ORDER.index(later) - 0.5
    return FOLDER_ORDER.index(folder) if folder in FOLDER_ORDER else len(FOLDER_ORDER)


class _Shares(LoadScopeScheduling):
    """A file's tests stay on one worker, and so do those of each group of files with real guests."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _group(self.config.rootpath / file) if file.startswith(f"tests/{_GUESTS}/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Shares(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not _requires_all():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if ALWAYS_RIGHT not in reason:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which ATELIER_REQUIRE_ALL=1 forbids: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself whole (``importorskip``) makes no test report."""
    report = yield
    _refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went: seconds per folder, set-up of fixtures (images, guests) included."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                parts = report.nodeid.split("/")
                folder = parts[1] if len(parts) > 2 else parts[0]
                seconds[folder] += report.duration
                tests[folder] += report.when == "call"
    if seconds:
        terminalreporter.section("time per folder")
        for folder, spent in seconds.most_common():
            terminalreporter.write_line(f"{spent:8.1f} s  {tests[folder]:5d} tests  {folder}")

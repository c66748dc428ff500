"""Runs ``any_request`` by a pytest of its own: what Schemathesis makes of the document when it is collected costs some ten
processor seconds, which each of several workers would pay for all of its tests.

    scripts/test tests/api/any_request.py -k path    some of them alone
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.api.described_api import DOCUMENT
from tests.real_machines import REPOSITORY

_METHODS = {"get", "put", "post", "patch", "delete"}
_NOT_FOR_IT = ("PYTEST_XDIST", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")


def test_any_request(tmp_path: Path) -> None:
    words = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "pytest"), "tests/api/any_request.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_IT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-30_000:] + done.stderr[-5000:]
    paths = json.loads(DOCUMENT.read_text())["paths"].values()
    operations = sum(len(_METHODS & path.keys()) for path in paths)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) == operations, done.stdout[-2000:]

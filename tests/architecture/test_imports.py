"""The rules of who may import what that import-linter cannot express. The floors themselves stand in pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.architecture.source_files import PACKAGE, Import, imports_of, modules

MAY_IMPORT_CONCRETE_DRIVERS = ("atelier.manager.wiring", "atelier.gateway", "atelier.host_setup")
STANDARD_LIBRARY_ONLY = ("atelier.guest_agent", "atelier.guest_protocol")
FIRST_PARTY_ROOMS_OF_THE_GUEST = ("atelier.guest_agent", "atelier.guest_protocol")


def is_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def concrete_driver_violation(found: Import) -> bool:
    """Whether a module outside of the drivers' own kind names anything of a driver kind but its interface."""
    if is_in(found.module, MAY_IMPORT_CONCRETE_DRIVERS):
        return False
    for name in found.names:
        parts = name.split(".")
        if parts[:2] != ["atelier", "drivers"] or len(parts) < 4:
            continue
        kind = ".".join(parts[:3])
        if parts[3] != "interface" and not is_in(found.module, (kind,)) and (PACKAGE / "/".join(parts[1:3])).is_dir():
            return True
    return False


def guest_violation(found: Import) -> bool:
    """Whether a module of the guest imports more than the standard library and the guest's own rooms."""
    if not is_in(found.module, STANDARD_LIBRARY_ONLY):
        return False
    name = found.names[0]
    if name.split(".")[0] == "atelier":
        # `from atelier import __version__` and `from atelier import guest_protocol` name the package itself.
        longest = found.names[-1]
        return not (is_in(longest, FIRST_PARTY_ROOMS_OF_THE_GUEST) or longest == "atelier.__version__")
    return name.split(".")[0] not in sys.stdlib_module_names


def model_violation(found: Import) -> bool:
    """Whether a module of the model imports more than the standard library and the model."""
    if not is_in(found.module, ("atelier.model",)):
        return False
    top = found.names[0].split(".")[0]
    return not is_in(found.names[0], ("atelier.model",)) if top == "atelier" else top not in sys.stdlib_module_names


RULES = {
    "only manager.wiring, the gateway and host_setup name a concrete driver": concrete_driver_violation,
    "guest agent and guest protocol use the standard library and each other alone": guest_violation,
    "the model uses the standard library alone": model_violation,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(" ", "-"))
def test_no_module_breaks_the_rule(rule: str) -> None:
    broken = [
        f"{found.module} line {found.line} imports {found.names[-1]}"
        for path in modules()
        for found in imports_of(path)
        if RULES[rule](found)
    ]
    assert not broken, f"{rule}:\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "module", "statement"),
    [
        ("only manager.wiring, the gateway and host_setup name a concrete driver", "services/x.py", "import atelier.drivers.vmm.fake"),
        ("only manager.wiring, the gateway and host_setup name a concrete driver", "cli/x.py", "from atelier.drivers.vmm import fake"),
        ("only manager.wiring, the gateway and host_setup name a concrete driver", "manager/x.py", "def f():\n from atelier.drivers.images.debian import D"),
        ("guest agent and guest protocol use the standard library and each other alone", "guest_agent/x.py", "import httpx"),
        ("guest agent and guest protocol use the standard library and each other alone", "guest_agent/x.py", "from atelier.model import errors"),
        ("guest agent and guest protocol use the standard library and each other alone", "guest_protocol/x.py", "from ..host import files"),
        ("the model uses the standard library alone", "model/x.py", "import pydantic"),
        ("the model uses the standard library alone", "model/x.py", "from atelier import schemas"),
    ],
)  # fmt: skip
def test_the_rule_can_be_broken(rule: str, module: str, statement: str, tmp_path: Path) -> None:
    package = tmp_path / "atelier"
    path = package / module
    path.parent.mkdir(parents=True)
    path.write_text(statement + "\n")
    assert any(RULES[rule](found) for found in imports_of(path, package))


def test_allowed_imports_pass(tmp_path: Path) -> None:
    package = tmp_path / "atelier"
    for module, statement in {
        "manager/wiring.py": "from atelier.drivers.vmm.fake import FakeVmm",
        "lifecycle/x.py": "from atelier.drivers.vmm.interface import VmmDriver\nimport atelier.drivers.vmm.interface",
        "drivers/vmm/x.py": "from atelier.drivers.vmm.fake import FakeVmm\nfrom atelier.drivers.faults import Faults",
        "guest_agent/x.py": "import asyncio\nfrom atelier.guest_protocol import frames\nfrom . import y",
    }.items():
        path = package / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(statement + "\n")
        broken = [rule for rule, check in RULES.items() for found in imports_of(path, package) if check(found)]
        assert not broken, (module, broken)

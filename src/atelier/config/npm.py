"""Where npm packages come from: what npm itself is set to on this machine. Read by ``settings``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_GLOBAL_NPMRC = Path("/etc/npmrc")
_VARIABLE = re.compile(r"\$\{([^}]+)\}")


def find_npm_registry(variables: Mapping[str, str], home: Path) -> str:
    """``npm_config_registry``, else ``registry`` in ``~/.npmrc``, then ``/etc/npmrc``; without a slash at its end. Empty
    where none says it: npm itself has to be asked. Nothing else of these files is looked at."""
    given = variables.get("npm_config_registry") or variables.get("NPM_CONFIG_REGISTRY") or ""
    for path in (home / ".npmrc", _GLOBAL_NPMRC):
        given = given or _registry_in(path, variables)
    return given.rstrip("/")


def _registry_in(path: Path, variables: Mapping[str, str]) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition("=")
        if name.strip() == "registry":
            value = value.strip().strip("\"'")
            # As npm does: what is not set stays as it is written.
            return _VARIABLE.sub(lambda found: variables.get(found[1], found[0]), value)
    return ""

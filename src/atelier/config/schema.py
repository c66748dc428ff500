"""The configuration file's JSON schema, and its template: both made of ``keys``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atelier.config.keys import KEYS, SECTIONS, Key, KeyKind

_HEADING = """\
# Atelier's configuration. What is not set here has its usual value; a variable ATELIER_... wins over its key.
# Made of the list of keys by `atelier host config --template`; `atelier host config --check FILE` tells mistakes.
"""


def config_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of the file's content."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Atelier's configuration file",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            section: {
                "type": "object",
                "description": description,
                "additionalProperties": False,
                "properties": {key.name: _property(key) for key in KEYS if key.section == section},
            }
            for section, description in SECTIONS.items()
        },
    }


def _property(key: Key) -> dict[str, Any]:
    found: dict[str, Any] = {"type": key.kind.value, "description": key.description}
    if key.kind is KeyKind.STRINGS:
        found["items"] = {"type": "string"}
    if key.choices:
        found["enum"] = list(key.choices)
    if key.variable:
        found["x-variable"] = key.variable
    return found


def config_template(values: Mapping[str, str] | None = None) -> str:
    """A documented file, with ``values`` (key to TOML) set and all else commented out."""
    chosen = values or {}
    parts = [_HEADING]
    for section, description in SECTIONS.items():
        parts.append(f"\n# {description}\n[{section}]\n")
        for key in (each for each in KEYS if each.section == section):
            about = key.description
            if key.choices:
                about += f" One of: {', '.join(key.choices)}."
            if key.variable:
                about += f" ({key.variable})"
            line = f"{key.name} = {chosen[key.path]}" if key.path in chosen else f"# {key.name} = {key.example}"
            parts.append(f"# {about}\n{line}\n")
    return "".join(parts)

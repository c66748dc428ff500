"""The configuration file: TOML, found by ``ATELIER_CONFIG``, else ``/etc/atelier/atelier.toml``.

Says of each value what variable it stands for and on which line; a key that is none is named, with the nearest that is one.
Read by ``settings`` and ``host``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from atelier.config.errors import InvalidSettingError
from atelier.config.keys import BY_PATH, SECTIONS, Key, KeyKind, to_snake_case
from atelier.model.errors import InvalidRequestError

DEFAULT_PATH = Path("/etc/atelier/atelier.toml")
_SECTION = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_.\-\"' ]+?)\s*=")

Value = str | int | float | bool | list[str]


@dataclass(frozen=True, slots=True)
class FileValue:
    """``line`` is 0 where it could not be found out."""

    key: Key
    value: Value
    line: int

    @property
    def text(self) -> str:
        """As its variable would bear it."""
        return ",".join(self.value) if isinstance(self.value, list) else str(self.value)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """``path`` is None where there is no file."""

    path: Path | None = None
    values: Mapping[str, FileValue] = field(default_factory=dict[str, FileValue])
    """By key: ``network.bridge_name``."""

    def variables(self) -> dict[str, str]:
        return {each.key.variable: each.text for each in self.values.values() if each.key.variable}

    def place(self, variable: str) -> str:
        """Where the file sets it, as ``FILE:LINE: section.key``; empty if it does not."""
        found = [path for path, each in self.values.items() if each.key.variable == variable]
        return self.place_of(found[0]) if found else ""

    def place_of(self, path: str) -> str:
        """``FILE:LINE: section.key``."""
        return f"{_place(self.path, self.values[path].line)}: {path}"

    def get(self, path: str) -> Value | None:
        found = self.values.get(path)
        return None if found is None else found.value


def find_config_file(variables: Mapping[str, str]) -> ConfigFile:
    """``ATELIER_CONFIG`` empty: no file. One that was not asked for and is not there, or is another user's secret, is none.

    Raises InvalidRequestError as ``read_config_file``.
    """
    given = variables.get("ATELIER_CONFIG")
    if given is not None:
        return read_config_file(Path(given)) if given else ConfigFile()
    try:
        text = DEFAULT_PATH.read_text()
    except OSError:
        return ConfigFile()
    except ValueError as error:
        raise _no_text(DEFAULT_PATH) from error
    return parse_config(text, DEFAULT_PATH)


def find_data_dir(variables: Mapping[str, str] | None = None) -> str:
    """Where clients of a host's own manager find its key; empty: nobody has said. Raises as ``find_config_file``."""
    own = os.environ if variables is None else variables
    return own.get("ATELIER_DATA_DIR") or str(find_config_file(own).get("server.data_dir") or "")


def read_config_file(path: Path) -> ConfigFile:
    """Raises InvalidRequestError (``config_unreadable``, ``config_invalid``), InvalidSettingError."""
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidRequestError(
            f"the configuration file {path} cannot be read: {error.strerror}",
            code="config_unreadable",
            hint="name one that can with ATELIER_CONFIG, or none with ATELIER_CONFIG=",
        ) from error
    except ValueError as error:
        raise _no_text(path) from error
    return parse_config(text, path)


def parse_config(text: str, path: Path | None = None) -> ConfigFile:
    """Raises InvalidRequestError (``config_invalid``: no TOML, ``unknown_setting``), InvalidSettingError (a value of the
    wrong kind)."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequestError(
            f"{path or 'the configuration'} is no TOML: {error}",
            code="config_invalid",
            hint="a line is KEY = VALUE below a [section], and words stand in quotes",
        ) from error
    lines = _lines(text)
    values: dict[str, FileValue] = {}
    for written, value in _leaves(document):
        line = lines.get(written, 0)
        key = _key(written, path, line)
        if key.path in values:
            raise InvalidRequestError(
                f"{_place(path, line)}: {key.path} is set twice, in two spellings",
                code="config_invalid",
                hint=f"keep {key.path}",
            )
        values[key.path] = FileValue(key, _checked(key, value, _place(path, line)), line)
    return ConfigFile(path, values)


def _key(written: str, path: Path | None, line: int) -> Key:
    name = to_snake_case(written)
    if found := BY_PATH.get(name):
        return found
    section, _, rest = name.partition(".")
    if not rest and section not in SECTIONS:
        by_name = [each for each in BY_PATH if each.endswith(f".{name}")]
        nearest = by_name or difflib.get_close_matches(name, [*SECTIONS, *BY_PATH], 1, 0.5)
    else:
        nearest = difflib.get_close_matches(name, list(BY_PATH), 1, 0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the sections are {', '.join(SECTIONS)}"
    raise InvalidRequestError(
        f"{_place(path, line)}: there is no setting {written}",
        code="unknown_setting",
        hint=f"{hint} `atelier host config --template` prints them all",
    )


def _checked(key: Key, value: object, place: str) -> Value:
    said = str(value)
    message = f"{place}: {key.path} is {value!r}"
    if not _fits(key.kind, value):
        hint = f"it wants {_WANTED[key.kind]}, as {key.path} = {key.example}"
        raise InvalidSettingError(key.variable, said, message=message, hint=hint)
    if key.choices and said not in key.choices:
        nearest = difflib.get_close_matches(said, key.choices, 1)
        meant = f"did you mean {nearest[0]}? " if nearest else ""
        hint = f"{meant}it may be: {', '.join(key.choices)}"
        raise InvalidSettingError(key.variable, said, message=message, hint=hint)
    return cast("Value", value)


def _fits(kind: KeyKind, value: object) -> bool:
    match kind:
        case KeyKind.STRING:
            return isinstance(value, str)
        case KeyKind.BOOLEAN:
            return isinstance(value, bool)
        case KeyKind.INTEGER:
            return isinstance(value, int) and not isinstance(value, bool)
        case KeyKind.NUMBER:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case KeyKind.STRINGS:
            return isinstance(value, list) and all(isinstance(each, str) for each in cast("list[object]", value))


_WANTED = {
    KeyKind.STRING: "a word in quotes",
    KeyKind.BOOLEAN: "true or false",
    KeyKind.INTEGER: "a whole number",
    KeyKind.NUMBER: "a number",
    KeyKind.STRINGS: "a list of words in quotes",
}


def _leaves(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of everything that is no table; and tables that are empty, unless they are sections."""
    for name, value in table.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(cast("dict[str, object]", value), f"{path}.")
        elif not isinstance(value, dict) or to_snake_case(path) not in SECTIONS:
            yield path, cast("object", value)


def _lines(text: str) -> dict[str, int]:
    """Where each key is written. An approximation that is right for files as people write them: TOML's parser does not
    tell."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _SECTION.fullmatch(line):
            section = _unquoted(header[1])
            found.setdefault(section, number)
            section += "."
        elif assignment := _ASSIGNMENT.match(line):
            found.setdefault(section + _unquoted(assignment[1]), number)
    return found


def _unquoted(written: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in written.split("."))


def _place(path: Path | None, line: int) -> str:
    return f"{path or 'the configuration'}:{line}" if line else str(path or "the configuration")


def _no_text(path: Path) -> InvalidRequestError:
    return InvalidRequestError(
        f"the configuration file {path} is no text in UTF-8", code="config_invalid", hint="write it anew"
    )

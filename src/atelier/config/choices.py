"""Settings that are one word of a few."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from atelier.config.errors import InvalidSettingError

E = TypeVar("E", bound=StrEnum)


def choose(kind: type[E], variables: Mapping[str, str], variable: str, default: E, given: str = "") -> E:
    """``given`` (an option) wins over the variable. Raises InvalidSettingError."""
    value = given or variables.get(variable, default)
    try:
        return kind(value)
    except ValueError:
        raise InvalidSettingError(variable, value, hint=f"it may be: {', '.join(sorted(kind))}") from None

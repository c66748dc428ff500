"""How logical volumes of an installation are called, and what the tags on them say.

``at-<installation>-<kind>-<id>``: so whoever lists a volume group knows whose a volume is, and nothing that is called
otherwise is ever touched. Used by the storage driver and by the root side that makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from atelier.model.ids import ID_ALPHABET, INSTALLATION_ID_LENGTH, SANDBOX_ID_LENGTH

_INSTALLATION = re.compile(rf"[{ID_ALPHABET}]{{{INSTALLATION_ID_LENGTH}}}")
_SUBJECT = re.compile(rf"[{ID_ALPHABET}]{{{SANDBOX_ID_LENGTH}}}")
_BASE = re.compile(r"[0-9a-f]{16}")
# Source: lvm(8): letters, digits and +_.- in the names of volume groups; ours are fewer.
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")

SIZE_TAG = "atelier.size="
"""Bytes that a volume is to have at least: it is grown to them when its making was broken off before that."""
FREEZING_TAG = "atelier.freezing="
"""On a volume: the snapshot that it is being frozen for."""
CHECKSUM_TAG = "atelier.sha256="
"""On a snapshot: it is made, and this is what is in it."""


class LvmKind(StrEnum):
    VOLUME = "volume"
    SNAPSHOT = "disk"
    """LVM keeps names that begin with ``snapshot`` to itself, and people read this one beside those."""
    BASE = "base"
    UNFINISHED_BASE = "fresh"
    UNFINISHED_SNAPSHOT = "import"


def is_installation_id(text: str) -> bool:
    return _INSTALLATION.fullmatch(text) is not None


def is_group_name(text: str) -> bool:
    """Whether LVM would take it as the name of a volume group or a pool."""
    return _GROUP.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class LvmName:
    """One logical volume of an installation. Raises ValueError for an id that is none of its kind."""

    installation_id: str
    kind: LvmKind
    id: str

    def __post_init__(self) -> None:
        pattern = _BASE if self.kind in (LvmKind.BASE, LvmKind.UNFINISHED_BASE) else _SUBJECT
        if not is_installation_id(self.installation_id) or not pattern.fullmatch(self.id):
            raise ValueError(f"{self.id!r} is no id of a {self.kind}")

    def __str__(self) -> str:
        return f"at-{self.installation_id}-{self.kind}-{self.id}"

    @classmethod
    def parse(cls, text: str) -> LvmName | None:
        """None for what is not called so."""
        parts = text.split("-")
        if len(parts) != 4 or parts[0] != "at":
            return None
        try:
            return cls(parts[1], LvmKind(parts[2]), parts[3])
        except ValueError:
            return None


def is_known_tag(text: str) -> bool:
    """Whether it is one of those above, with what may stand in it."""
    name, _, value = text.partition("=")
    match f"{name}=":
        case t if t == SIZE_TAG:
            return re.fullmatch(r"[1-9][0-9]{0,15}", value) is not None
        case t if t == FREEZING_TAG:
            return _SUBJECT.fullmatch(value) is not None
        case t if t == CHECKSUM_TAG:
            return re.fullmatch(r"[0-9a-f]{64}", value) is not None
        case _:
            return False

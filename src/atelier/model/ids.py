"""Ids and names: how they are made and what a valid one looks like.

A sandbox id, as a snapshot id, is 12 characters of ``[a-z2-7]`` (60 random bits); an installation id is 4 of the same, made once per
data folder, and stands in the name of every host resource. A name is a DNS label of at most 40 characters.
"""

from __future__ import annotations

import re
import secrets

from atelier.model.errors import InvalidRequestError

ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
SANDBOX_ID_LENGTH = 12
INSTALLATION_ID_LENGTH = 4
NAME_MAX_LENGTH = 40

_SANDBOX_ID = re.compile(rf"[{ID_ALPHABET}]{{{SANDBOX_ID_LENGTH}}}")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")

_ADJECTIVES = (
    "amber", "brisk", "calm", "clever", "crisp", "deep", "eager", "fair", "gentle", "golden", "green", "keen",
    "light", "lively", "lucid", "mellow", "noble", "plain", "proud", "quick", "quiet", "rapid", "silver", "steady",
    "still", "sunny", "swift", "tidy", "vivid", "warm", "wise", "young",
)  # fmt: skip
_NOUNS = (
    "anvil", "atlas", "bench", "birch", "brook", "canvas", "cedar", "chisel", "cliff", "coral", "dune", "easel",
    "ember", "fern", "field", "finch", "forge", "harbor", "heron", "kiln", "lantern", "loom", "maple", "meadow",
    "otter", "pebble", "quill", "river", "sparrow", "studio", "willow", "wren",
)  # fmt: skip


def new_id(length: int) -> str:
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(length))


def new_sandbox_id() -> str:
    return new_id(SANDBOX_ID_LENGTH)


def new_installation_id() -> str:
    return new_id(INSTALLATION_ID_LENGTH)


def new_sandbox_name() -> str:
    """A readable name, like ``quiet-heron-k3fa``; unique enough that a collision is a retry, not a design."""
    return f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{new_id(4)}"


def is_sandbox_id(text: str) -> bool:
    return _SANDBOX_ID.fullmatch(text) is not None


def is_snapshot_id(text: str) -> bool:
    return _SANDBOX_ID.fullmatch(text) is not None


def validate_name(name: str) -> str:
    """Return ``name`` if it is a DNS label of at most 40 characters that cannot be taken for an id.

    Raises InvalidRequestError with the reason.
    """
    if not name or len(name) > NAME_MAX_LENGTH:
        raise InvalidRequestError(
            f"a name has 1 to {NAME_MAX_LENGTH} characters, this one has {len(name)}",
            code="invalid_name",
            hint="choose a shorter name, or leave it out and one is generated",
        )
    if _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"{name!r} is not a valid name",
            code="invalid_name",
            hint="use lower-case letters, digits and inner hyphens only (a DNS label)",
        )
    if is_sandbox_id(name):
        raise InvalidRequestError(
            f"{name!r} has the form of a sandbox id", code="invalid_name", hint="add a hyphen or change its length"
        )
    return name

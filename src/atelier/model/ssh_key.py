"""Public keys that people show over SSH: what one looks like, and which are good enough."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime

from atelier.model.errors import InvalidRequestError

MAX_LINE_LENGTH = 16_000
_RSA_MIN_BITS = 2048
_RSA_MAX_BITS = 16384
_MAX_COMMENT_LENGTH = 200
_WORD = re.compile(r"[a-z0-9@.-]{1,64}")

# The lengths of what follows the type, where they are fixed. Source: RFC 8709, RFC 5656; OpenSSH PROTOCOL.u2f.
_SIZED_FIELDS: dict[str, tuple[int | None, ...]] = {
    "ssh-ed25519": (32,),
    "ecdsa-sha2-nistp256": (8, 65),
    "ecdsa-sha2-nistp384": (8, 97),
    "ecdsa-sha2-nistp521": (8, 133),
    "sk-ssh-ed25519@openssh.com": (32, None),
    "sk-ecdsa-sha2-nistp256@openssh.com": (8, 65, None),
}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """``blob``: base64, as it stands in a ``.pub`` file."""

    type: str
    blob: str
    comment: str

    @property
    def line(self) -> str:
        return f"{self.type} {self.blob}"

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` shows it."""
        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class SshKey:
    """A key that a user has registered. ``name`` is for people."""

    id: str
    user_id: str
    name: str
    key: PublicKey
    created_at: datetime


@dataclass(frozen=True, slots=True)
class SshAddress:
    """Where SSH is served. ``host_key``: the public key's line. ``problem``: why it is not, in words, else empty; port 0
    where it is turned off or not served."""

    host: str
    port: int
    host_key: str
    problem: str = ""


def parse_public_key(text: str) -> PublicKey:
    """The one line of a ``.pub`` file. Raises InvalidRequestError (``invalid_ssh_key``, ``ssh_key_is_private``,
    ``ssh_key_too_weak``)."""
    if "PRIVATE KEY" in text:
        raise InvalidRequestError(
            "this is a private key, which nobody else should ever see",
            code="ssh_key_is_private",
            hint="give the file beside it that ends in .pub; if the private key went over a network, make a new pair",
        )
    line = text.strip()
    words = line.split(maxsplit=2)
    if len(line) > MAX_LINE_LENGTH or len(words) < 2 or "\n" in line or not _WORD.fullmatch(words[0]):
        raise _no_key("it is not one line of the form TYPE BASE64 COMMENT")
    kind, blob, comment = words[0], words[1], words[2] if len(words) > 2 else ""
    if kind == "ssh-dss":
        raise _too_weak("DSA keys are refused")
    if "-cert-v01@" in kind:
        raise _no_key("it is a certificate; give the key itself")
    if not comment.isprintable() or len(comment) > _MAX_COMMENT_LENGTH:
        raise _no_key(f"its comment is longer than {_MAX_COMMENT_LENGTH} characters, or holds control characters")
    try:
        raw = base64.b64decode(blob, validate=True)
        name, *fields = _fields(raw)
    except (binascii.Error, ValueError):
        raise _no_key("its second word is no key in base64; it may have been cut off") from None
    if name != kind.encode():
        raise _no_key("its first word is not the type that its content has")
    if kind == "ssh-rsa":
        _check_rsa(fields)
    elif (sizes := _SIZED_FIELDS.get(kind)) is None:
        raise _no_key(f"the type {kind} is not known")
    elif len(fields) != len(sizes) or any(
        size is not None and len(field) != size for field, size in zip(fields, sizes, strict=True)
    ):
        raise _no_key("its content has not the length that its type has; it may have been cut off")
    return PublicKey(kind, base64.b64encode(raw).decode(), comment)


def _fields(raw: bytes) -> list[bytes]:
    """Strings with their lengths before them (RFC 4251). Raises ValueError."""
    fields: list[bytes] = []
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4])
        if end > len(raw) or at + 4 > len(raw):
            raise ValueError("cut off")
        fields.append(raw[at + 4 : end])
        at = end
    if not fields:
        raise ValueError("empty")
    return fields


def _check_rsa(fields: list[bytes]) -> None:
    if len(fields) != 2:
        raise _no_key("an RSA key has an exponent and a modulus")
    bits = int.from_bytes(fields[1]).bit_length()
    if bits < _RSA_MIN_BITS:
        raise _too_weak(f"an RSA key of {bits} bits is too short: it takes {_RSA_MIN_BITS}")
    if bits > _RSA_MAX_BITS:
        raise _no_key(f"an RSA key has at most {_RSA_MAX_BITS} bits")


def _no_key(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"this is no public key for SSH: {reason}",
        code="invalid_ssh_key",
        hint="give the content of a file as ~/.ssh/id_ed25519.pub",
    )


def _too_weak(reason: str) -> InvalidRequestError:
    return InvalidRequestError(reason, code="ssh_key_too_weak", hint="make another one: ssh-keygen -t ed25519")

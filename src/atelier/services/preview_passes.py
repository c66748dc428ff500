"""What opens a preview: passes, which are signed and kept by the visitor's browser, and codes, which are good once.

Used by ``previews`` and ``preview_entry``. Nothing of a pass is kept here: that its user may still enter, or its link
is still good, is asked at each use.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from atelier.services.authentication import hash_secret

_CODE_LIFETIME = timedelta(seconds=60)
_CODES_AT_MOST = 1000
_PASS_MAX_LENGTH = 1000

Kind = Literal["cookie", "link"]


@dataclass(frozen=True, slots=True)
class Pass:
    """For one port of one sandbox, until ``until`` (seconds of the epoch). ``key_id`` or ``session_id``: by which its
    holder was known; neither: it came of a link of that ``generation``."""

    sandbox_id: str
    port: int
    until: int
    key_id: str = ""
    session_id: str = ""
    generation: int = 0

    @property
    def is_by_link(self) -> bool:
        return not (self.key_id or self.session_id)


class PreviewPasses:
    """``key``: secret, the same for as long as passes are to be good."""

    def __init__(self, key: bytes, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._key = key
        self._now = now
        self._codes: dict[str, tuple[Pass, datetime]] = {}

    def now(self) -> datetime:
        return self._now()

    def sign(self, kind: Kind, granted: Pass) -> str:
        """Letters, digits, ``-``, ``_`` and one dot."""
        payload = _encode(json.dumps(list(asdict(granted).values()), separators=(",", ":")).encode())
        return f"{payload}.{self._signature(kind, payload)}"

    def read(self, kind: Kind, text: str) -> Pass | None:
        """None: it was not made here, was changed, or is over."""
        payload, _, signature = text.partition(".")
        if len(text) > _PASS_MAX_LENGTH or not hmac.compare_digest(
            signature.encode(), self._signature(kind, payload).encode()
        ):
            return None
        found = Pass(*json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))
        return found if found.until > self._now().timestamp() else None

    def _signature(self, kind: Kind, payload: str) -> str:
        return _encode(hmac.digest(self._key, f"{kind} {payload}".encode(), hashlib.sha256))

    def make_code(self, granted: Pass) -> str:
        """For the way from the manager to the preview: good for a minute, once, while this manager runs."""
        now = self._now()
        self._codes = {code: each for code, each in self._codes.items() if each[1] > now}
        while len(self._codes) >= _CODES_AT_MOST:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(32)
        self._codes[hash_secret(code)] = (granted, now + _CODE_LIFETIME)
        return code

    def use_code(self, code: str) -> Pass | None:
        granted, until = self._codes.pop(hash_secret(code), (None, None))
        return granted if until is not None and until > self._now() else None


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

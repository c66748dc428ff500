"""The plain pages that are shown in the place of a preview, and the same as JSON for programs.

Made by the manager, which knows why somebody may not enter, and by the gateway, which finds a port closed. No script;
all that is not ours is escaped.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from atelier.model.preview import START_PATH

_STYLE: Final = """body { font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto 0; max-width: 30rem; padding: 0 1rem;
color: #222; background: #fafafa; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; }
button { font: inherit; padding: .5rem 1.2rem; border: 1px solid #999; border-radius: .4rem; background: #fff;
color: inherit; cursor: pointer; }
code { color: #666; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } button { background: #2b2b2b; } }"""

PAGE_HEADERS: Final = (
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    ),
    # Not "no-referrer": browsers would then send "Origin: null" with our own form.
    ("referrer-policy", "same-origin"),
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
)


@dataclass(frozen=True, slots=True)
class PreviewPage:
    """``title`` and ``text`` are for people, ``code`` is stable. ``hint``: what to do about it; may be empty.
    ``start_next``: the path that a button to start the sandbox comes back to; None: no button. ``again_seconds``: when it
    is worth coming again, which a browser then does by itself."""

    status: int
    code: str
    title: str
    text: str
    hint: str = ""
    start_next: str | None = None
    again_seconds: int | None = None

    def render(self, accept: str) -> tuple[list[tuple[str, str]], bytes]:
        """(headers with the length, body), as JSON for who asks for that and not for HTML."""
        wanted = accept.lower()
        if "json" in wanted and "text/html" not in wanted:
            kind, body = "application/json", self._json()
        else:
            kind, body = "text/html; charset=utf-8", self._html()
        headers = [("content-type", kind), ("content-length", str(len(body))), *PAGE_HEADERS]
        if self.again_seconds is not None:
            headers.append(("retry-after", str(self.again_seconds)))
        return headers, body

    def _json(self) -> bytes:
        return json.dumps({"code": self.code, "message": f"{self.title}: {self.text}", "hint": self.hint}).encode()

    def _html(self) -> bytes:
        title, text, hint = (html.escape(each) for each in (self.title, self.text, self.hint))
        again = "" if self.again_seconds is None else f'<meta http-equiv="refresh" content="{self.again_seconds}">'
        button = ""
        if self.start_next is not None:
            button = (
                f'<form method="post" action="{START_PATH}?next={quote(self.start_next)}">'
                "<button>Start it</button></form>"
            )
        return (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}\n'
            f"<title>{title}</title>\n<style>\n{_STYLE}\n</style></head>\n"
            f"<body><h1>{title}</h1>\n<p>{text}</p>\n<p>{hint}</p>\n{button}\n"
            f"<p><code>{html.escape(self.code)}</code></p>\n</body></html>\n"
        ).encode(errors="replace")

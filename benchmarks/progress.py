"""What a run says while it goes on: on stderr, so that the figures stand alone on stdout."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()

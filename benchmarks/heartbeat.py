"""How long a guest stood still, as seen from outside: a program in it writes to the serial line every few milliseconds, and
the host watches the file that the line ends in. The guest's own clock may stand still with it, and so tells nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Generator
from pathlib import Path

BEATING = (
    "/bin/sh",
    "-c",
    'setsid python3 -c \'import os, time\nline = os.open("/dev/ttyS0", os.O_WRONLY)\nwhile True:\n'
    '    os.write(line, b".")\n    time.sleep(0.003)\' </dev/null >/dev/null 2>&1 &',
)
"""To be run once in the guest, as root."""
_LOOK_SECONDS = 0.001
_START_SECONDS = 60.0


class Gap:
    seconds = 0.0


@contextlib.contextmanager
def longest_gap(console: Path) -> Generator[Gap]:
    """The longest time without a beat while the block runs; to be read after its end. Raises TimeoutError if none comes."""
    gap, ended, begun = Gap(), threading.Event(), threading.Event()
    file = os.open(console, os.O_RDONLY)

    def watch() -> None:
        size, last = os.fstat(file).st_size, 0.0
        while not ended.is_set():
            time.sleep(_LOOK_SECONDS)
            now, grown = time.perf_counter(), os.fstat(file).st_size
            if grown > size:
                if last:
                    gap.seconds = max(gap.seconds, now - last)
                size, last = grown, now
                begun.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        if not begun.wait(_START_SECONDS):
            raise TimeoutError(f"no beat reaches {console}")
        yield gap
    finally:
        ended.set()
        watcher.join()
        os.close(file)

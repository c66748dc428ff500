"""Carries frames from one TAP's descriptor to another's, as a VMM does without an accelerator in the kernel; as a script:
``tap_relay.py SOURCE TARGET``. It ends with the process that started it.
"""

import ctypes
import os
import signal
import sys

FRAME_MAX_BYTES = 10 + 65536 + 64
_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    source, target = int(sys.argv[1]), int(sys.argv[2])
    while True:
        os.write(target, os.read(source, FRAME_MAX_BYTES))


main()

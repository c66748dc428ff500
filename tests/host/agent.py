"""Runs inside the emulated host, as root: carries out the commands that ``emulated_host`` sends over a virtio-serial port.

A line of JSON each way. The port has no sessions: whatever does not parse is skipped, and an answer bears its request's
number. Standard library only; started by a systemd unit of the image.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time

PORT = "/dev/virtio-ports/atelier.test"


def carry_out(request: dict[str, object]) -> dict[str, object]:
    words = [str(word) for word in request["words"]]  # type: ignore[union-attr]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/root",
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
        },
    )
    late = False
    try:
        out, err = process.communicate(base64.b64decode(str(request["input"])), float(str(request["seconds"])))
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return {
        "number": request["number"],
        "status": process.returncode,
        "late": late,
        "out": base64.b64encode(out).decode(),
        "err": base64.b64encode(err).decode(),
    }


def main() -> None:
    while True:
        try:
            port = os.open(PORT, os.O_RDWR)
            break
        except FileNotFoundError:  # udev has not named it yet
            time.sleep(0.1)
    received = b""
    while True:
        chunk = os.read(port, 65536)
        if not chunk:  # nobody is there on the other side
            time.sleep(0.05)
            continue
        *lines, received = (received + chunk).split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
                answer = carry_out(request)
            except (ValueError, KeyError, TypeError):
                continue
            except OSError as error:
                refusal = base64.b64encode(str(error).encode()).decode()
                answer = {"number": request["number"], "status": 127, "late": False, "out": "", "err": refusal}
            whole = b"\n" + json.dumps(answer).encode() + b"\n"
            while whole:
                whole = whole[os.write(port, whole) :]


if __name__ == "__main__":
    main()

"""``python -m benchmarks [NAME ...]``: measures the named figures, or all, and prints them as JSON on the last line.

Exit status: 0 when all judged figures hold, 1 when one does not, 2 for an unknown name. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks import machine
from benchmarks.figure import Figure
from benchmarks.progress import say
from benchmarks.stage import Stage

FIGURES = (
    "cli_help",
    "manager_rss_500_mock",
    "create_rate_mock",
    "list_p99_1000_mock",
    "recovery_100",
    "leaks_after_kill",
    "edge_requests",
    "edge_websocket_drops",
    "slot_setup",
    "slot_delete_50",
    "volume_create",
    "network_throughput",
    # While nothing else runs in the guest's place.
    "create_cold",
    "create_template",
    "create_warm",
    "resume",
    "fork_20",
    "fork_pss",
    "snapshot_stop",
    "manager_rss_1",
    "exec_roundtrip",
    "request_roundtrip",
    "upload",
    "download",
    "ssh_relay",
    "ssh_splice",
    "ssh_key_echo",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(FIGURES)}")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"no such figure: {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    figures: list[Figure] = []
    folder = Path(tempfile.mkdtemp(prefix="atelier-bench."))
    # VMMs run under users of their own when this is root, and pass through here.
    folder.chmod(0o711)
    try:
        with contextlib.ExitStack() as stack:
            stage = Stage(folder, stack)
            for name in [name for name in FIGURES if name in names or not names]:
                say(name)
                for figure in import_module(f"benchmarks.{name}").measure(stage):
                    say(json.dumps(figure.to_json()))
                    figures.append(figure)
            accelerator = stage.ingredients.accelerator if "ingredients" in vars(stage) else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps({"machine": machine.describe(accelerator), "figures": [figure.to_json() for figure in figures]}),
        flush=True,
    )
    return 1 if any(figure.holds is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())

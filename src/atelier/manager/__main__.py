"""``python -m atelier.manager``, which ``atelier up`` executes: starts, serves, and leaves nothing behind.

Exit status: 0 after an orderly end, 1 when the manager could not start (the reason and the remedy stand on stderr),
2 for wrong options.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence

import uvloop

import atelier
from atelier.config.settings import Settings, load_settings
from atelier.manager.backup_commands import run_backup, run_restore
from atelier.manager.doctor import run_doctor
from atelier.manager.installation import Installation
from atelier.manager.server import Server
from atelier.model.errors import AtelierError
from atelier.telemetry import logs

logger = logging.getLogger("atelier.manager")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        settings = load_settings(mode=options.mode, data_dir=options.data_dir, listen=options.listen)
        if options.doctor:
            return run_doctor(settings, as_json=options.json)
        if options.backup:
            return run_backup(
                settings, options.backup, with_disks=options.with_disks, force=options.force, as_json=options.json
            )
        if options.restore:
            return run_restore(settings, options.restore, as_json=options.json)
        logs.configure(settings.log_level, "json" if options.log_format == "json" else "line")
        return uvloop.run(_serve(settings))
    except AtelierError as error:
        if options.json:
            document = {"code": error.code, "message": error.message, "hint": error.hint}
            sys.stderr.write(json.dumps(document, ensure_ascii=False) + "\n")
            return 1
        sys.stderr.write(f"error: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return 1


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        installation = await stack.enter_async_context(Installation.open(settings))
        server = Server(installation.application, installation.socket)
        installation.announce()
        serving = asyncio.create_task(server.serve())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # A second Ctrl-C ends the manager at once; the next start unwinds what this one leaves.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        _say("stopping: no new requests")
        await server.shut_down(serving)
        destroyed = await installation.destroy_sandboxes()
        for name in destroyed:
            _say(f"destroyed sandbox {name}")
        _say(f"stopped; {len(destroyed)} sandboxes were running and are destroyed, nothing is left behind")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"atelier: {line}\n")
    sys.stderr.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="atelier up", description="Run the manager of this machine.")
    parser.add_argument("--listen", default="", metavar="ADDRESS:PORT", help="default: 127.0.0.1:7420; port 0: any")
    parser.add_argument("--data-dir", default="", metavar="DIR", help="default: ~/.local/share/atelier")
    parser.add_argument("--mode", default="", metavar="MODE", help="local (real virtual machines) or mock")
    parser.add_argument("--log-format", choices=["line", "json"], default="line")
    parser.add_argument("--doctor", action="store_true", help="check this machine instead, and change nothing")
    parser.add_argument("--backup", default="", metavar="FILE", help="write a backup instead: see `atelier backup`")
    parser.add_argument("--with-disks", action="store_true", help="with --backup: disks of sandboxes that do not run")
    parser.add_argument("--force", action="store_true", help="with --backup: replace FILE")
    parser.add_argument("--restore", default="", metavar="FILE", help="bring a backup back: see `atelier restore`")
    parser.add_argument("--json", action="store_true", help="with these: print JSON")
    parser.add_argument("--version", action="version", version=f"atelier {atelier.__version__}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

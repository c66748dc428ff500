"""``python -m atelier.manager``, which ``atelier up`` executes: starts, serves, and ends in order.

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
from atelier.host.service_notices import stay_alive, tell_service_manager
from atelier.manager.backup_commands import run_backup, run_restore
from atelier.manager.doctor import run_doctor
from atelier.manager.installation import Installation, prepare_installation
from atelier.manager.server import Server
from atelier.model.errors import AtelierError
from atelier.services.host import SandboxesAtEnd
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
        if options.prepare:
            sys.stdout.write(f"{asyncio.run(prepare_installation(settings))}\n")
            return 0
        if options.down:
            return uvloop.run(_end_sandboxes(settings, options.down, as_json=options.json))
        return uvloop.run(_serve(settings, options.on_exit))
    except AtelierError as error:
        if options.json:
            document = {"code": error.code, "message": error.message, "hint": error.hint}
            sys.stderr.write(json.dumps(document, ensure_ascii=False) + "\n")
            return 1
        sys.stderr.write(f"error: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return 1


async def _serve(settings: Settings, on_exit: SandboxesAtEnd) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        installation = await stack.enter_async_context(Installation.open(settings))
        server = Server(installation.application, installation.socket)
        installation.announce(on_exit)
        tell_service_manager("READY=1")
        living = asyncio.create_task(stay_alive())
        stack.callback(living.cancel)
        serving = asyncio.create_task(server.serve())
        stopping = [asyncio.create_task(event.wait()) for event in (stop, installation.end_asked)]
        await asyncio.wait({serving, *stopping}, return_when=asyncio.FIRST_COMPLETED)
        for waiting in stopping:
            waiting.cancel()
        tell_service_manager("STOPPING=1")
        # A second Ctrl-C ends the manager at once; the next start goes on with what this one leaves.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        _say("stopping: no new requests; what is under way may end (Ctrl-C again ends at once, the next start goes on)")
        await server.shut_down(serving)
        # Who ended it over the API has said what becomes of the sandboxes, and that is done.
        what: SandboxesAtEnd = "keep" if installation.end_asked.is_set() else on_exit
        _say_goodbye(what, *await installation.end_sandboxes(what))
    return 0


async def _end_sandboxes(settings: Settings, what: SandboxesAtEnd, *, as_json: bool) -> int:
    """Without serving anybody: what ``atelier down`` does where no manager runs. 1 if a sandbox goes on running."""
    async with Installation.open(settings, serves=False) as installation:
        changed, running = await installation.end_sandboxes(what)
    if as_json:
        done = "destroyed" if what == "destroy" else "stopped"
        sys.stdout.write(json.dumps({done: changed, "running": running}, indent=2) + "\n")
    else:
        _say_goodbye(what, changed, running)
    return 1 if running else 0


def _say_goodbye(what: SandboxesAtEnd, changed: list[str], running: list[str]) -> None:
    done = "destroyed" if what == "destroy" else "stopped"
    for name in changed:
        _say(f"{done} sandbox {name}")
    for name in running:
        _say(f"sandbox {name} goes on running")
    if running:
        _say("ended; what goes on is found by the next atelier up, and stopped by atelier down")
    else:
        _say("ended; nothing goes on running")


def _say(line: str) -> None:
    sys.stderr.write(f"atelier: {line}\n")
    sys.stderr.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="atelier up", description="Run the manager of this machine.")
    parser.add_argument("--listen", default="", metavar="ADDRESS:PORT", help="default: 127.0.0.1:7420; port 0: any")
    parser.add_argument("--data-dir", default="", metavar="DIR", help="default: ~/.local/share/atelier")
    parser.add_argument("--mode", default="", metavar="MODE", help="local (real virtual machines) or mock")
    parser.add_argument(
        "--on-exit",
        choices=["keep", "stop", "destroy"],
        default="keep",
        help="what becomes of the sandboxes when the manager is told to end (default: they go on)",
    )
    parser.add_argument(
        "--down", choices=["stop", "destroy"], help="end the sandboxes of a manager that does not run, and serve nobody"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="have the data folder and its database, print the installation's id"
    )
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

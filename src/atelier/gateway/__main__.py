"""``python -m atelier.gateway --run-dir DIR``: the data plane's process. Started by the manager, outlives it.

Wires ``control`` to its socket, and stays until SIGTERM or SIGINT. One gateway per run directory: a second one says so
and exits with status 1. It needs no manager to start, and can be restarted at any time: the guests' processes live on,
clients connect again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Literal

from atelier.gateway.attachments import LOCK_NAME
from atelier.gateway.control import ChannelSet
from atelier.gateway.preview_server import PreviewServer
from atelier.gateway.ssh_server import SshServer
from atelier.host.files import ensure_private_folder, lock_folder
from atelier.host.line_server import LineServer
from atelier.host.service_notices import stay_alive, tell_service_manager
from atelier.model.errors import AlreadyRunningError, AtelierError
from atelier.model.layout import RunLayout
from atelier.telemetry.logs import configure

log = logging.getLogger("atelier.gateway")


def main(arguments: list[str] | None = None) -> int:
    """Run the gateway until it is told to stop; returns the exit status."""
    options = _parse(arguments)
    configure(options.log_level, options.log_format)
    os.umask(0o077)
    _raise_descriptor_limit()
    layout = RunLayout(options.run_dir.absolute())
    try:
        ensure_private_folder(layout.channels)
        with lock_folder(layout.channels / LOCK_NAME):
            _run(layout, options.epoch_wait_seconds)
    except AlreadyRunningError:
        log.error("another gateway already serves %s", layout.root)
        return 1
    except AtelierError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        log.error("cannot serve %s: %s", layout.root, error)
        return 1
    return 0


class _Options(argparse.Namespace):
    run_dir: Path
    epoch_wait_seconds: float
    log_level: str
    log_format: Literal["line", "json"]


def _parse(arguments: list[str] | None) -> _Options:
    parser = argparse.ArgumentParser(prog="python -m atelier.gateway", description="Atelier's data plane.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run directory: sockets lie here")
    parser.add_argument(
        "--epoch-wait-seconds", type=float, default=5.0, help="how long a client waits for a guest that is not there"
    )
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], default="INFO")
    parser.add_argument("--log-format", choices=["line", "json"], default="line")
    return parser.parse_args(arguments, namespace=_Options())


def _run(layout: RunLayout, epoch_wait_seconds: float) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(layout, epoch_wait_seconds))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(layout, epoch_wait_seconds))


async def _serve(layout: RunLayout, epoch_wait_seconds: float) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ssh = SshServer(layout)
    previews = PreviewServer(layout)
    channels = ChannelSet(layout, ssh, previews, epoch_wait_seconds=epoch_wait_seconds)
    control = LineServer(layout.gateway_socket, channels.answer)
    living = asyncio.create_task(stay_alive())
    try:
        await channels.open()
        await control.open()
        log.info("the gateway serves %s", layout.root)
        tell_service_manager("READY=1")
        await stop.wait()
        tell_service_manager("STOPPING=1")
    finally:
        living.cancel()
        await control.close()
        await ssh.close()
        await previews.close()
        await channels.close()
    log.info("the gateway has stopped")


def _raise_descriptor_limit() -> None:
    """Each client takes a descriptor; the usual soft limit of 1024 is two busy sandboxes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())

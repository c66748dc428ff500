"""``python -m atelier.network_holder``: holds the network of an installation. Started by the manager, outlives it.

Opens the home, serves ``control``'s socket and the DNS server that guests ask, and sees to it that the rules stand: at
once when somebody changes rules in one of the two namespaces, and every few seconds. SIGTERM ends the process and leaves
the home as it is, for the next holder; the operation ``close`` ends both. One holder per run directory.
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

from atelier.host.files import lock_folder
from atelier.host.nameservers import RESOLV_CONF, NameserverFile
from atelier.host.service_notices import stay_alive, tell_service_manager
from atelier.model.errors import AlreadyRunningError, AtelierError
from atelier.model.layout import RunLayout
from atelier.network_holder.control import NetworkControl
from atelier.network_holder.dns_server import DnsServer, ListeningSockets
from atelier.network_holder.dns_upstream import DNS_PORT, Upstream
from atelier.network_holder.grounds import Ground, open_ground
from atelier.network_holder.home import NetworkHome
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.resolver import Resolver
from atelier.telemetry.logs import configure

_logger = logging.getLogger("atelier.network_holder")

_CHECK_SECONDS = 5.0
_SETTLE_SECONDS = 0.02
"""Who replaces rules deletes them first: looked at when the transaction's messages are through."""


class _Options(argparse.Namespace):
    run_dir: Path
    plan_file: Path
    installation: str
    bridge_name: str
    resolv_conf: Path
    home: Literal["private", "host"]
    keeper_log: Path | None
    log_level: str
    log_format: Literal["line", "json"]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    configure(options.log_level, options.log_format)
    os.umask(0o077)
    layout = RunLayout(options.run_dir.absolute())
    # Each of the guests' questions that is under way takes a socket or a few.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        names = NetworkNames(options.installation, options.bridge_name)
        with lock_folder(layout.network_lock):
            keeper_log = options.keeper_log or layout.root / "network-keeper.log"
            ground = open_ground(layout, names, keeper_log, in_host=options.home == "host")
            try:
                asyncio.run(_hold(layout, options, names, ground))
            finally:
                ground.uplink.close()
    except AlreadyRunningError:
        _logger.error("another network holder already serves %s", layout.root)
        return 1
    except AtelierError as error:
        _logger.error("%s", error)
        return 1
    except OSError as error:
        _logger.error("cannot serve %s: %s", layout.root, error)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> _Options:
    parser = argparse.ArgumentParser(prog="python -m atelier.network_holder", description="Atelier's network.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run directory: the socket lies here")
    parser.add_argument("--plan-file", type=Path, required=True, help="where the choice of addresses is kept")
    parser.add_argument("--installation", required=True, help="the installation's id")
    parser.add_argument("--bridge-name", default="br0")
    parser.add_argument(
        "--resolv-conf", type=Path, default=RESOLV_CONF, help="names the nameservers that sandboxes' questions go to"
    )
    parser.add_argument(
        "--home", choices=["private", "host"], default="private", help="a namespace of its own, or the host's"
    )
    parser.add_argument(
        "--keeper-log", type=Path, help="where an ordinary user's keeper writes (default: into the run directory)"
    )
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], default="INFO")
    parser.add_argument("--log-format", choices=["line", "json"], default="line")
    return parser.parse_args(arguments, namespace=_Options())


async def _hold(layout: RunLayout, options: _Options, names: NetworkNames, ground: Ground) -> None:
    loop = asyncio.get_running_loop()
    home = NetworkHome(names, ground.place, ground.uplink, options.plan_file, layout.network_policies)
    control = NetworkControl(home, layout.network_socket)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, control.end.set)
    await home.open()
    upstream = Upstream(NameserverFile(options.resolv_conf).current, ground.make_socket)
    # In the home's namespace, where the process is by now.
    names_server = DnsServer(Resolver(home.slots, upstream), ListeningSockets(home.plan.gateway, DNS_PORT))
    changed = asyncio.Event()
    watches = (*ground.uplink.watches, home.side.watch)
    for watch in watches:
        loop.add_reader(watch.fileno(), lambda watch=watch: changed.set() if watch.drain() else None)
    for problem in home.problems():
        _logger.warning("%s", problem)
    _logger.info("the network of %s stands: %s", names.installation_id, home.plan.subnet)
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(control.serve()),
        asyncio.create_task(names_server.serve()),
        asyncio.create_task(_keep(control, changed)),
        asyncio.create_task(control.end.wait()),
        asyncio.create_task(ground.uplink.wait_lost()),
    ]
    living = asyncio.create_task(stay_alive())
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for watch in watches:
            loop.remove_reader(watch.fileno())
        tell_service_manager("STOPPING=1")
        for task in (*tasks, living):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        home.close()
    _logger.info("the network holder has stopped")


async def _keep(control: NetworkControl, changed: asyncio.Event) -> None:
    """A check that fails is told, and tried again: the rules it could not put back may be mended by then."""
    while not control.end.is_set():
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await changed.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
        except TimeoutError:
            pass
        changed.clear()
        try:
            await control.check()
        except (AtelierError, OSError) as error:
            _logger.error("the rules of the sandboxes' network cannot be checked: %s", error)
            await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main())

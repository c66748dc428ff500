"""One installation, opened: folders, lock, database, token, drivers, gateway, recovery; and closed in reverse.

Opened by the manager's program; everything it acquires ends with its context, also when opening fails half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from atelier.api.application import create_application
from atelier.api.authentication import Application
from atelier.config.addresses import ListenAddress
from atelier.config.settings import Settings
from atelier.db.closed_files import read_installation_id
from atelier.db.engine import Database
from atelier.db.installation import load_installation, load_preview_key
from atelier.host.files import ensure_private_folder, lock_folder, write_atomically
from atelier.lifecycle.fleet import SandboxFleet
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.manager.gateway_questions import GatewayQuestions
from atelier.manager.kept_process import KeptProcess
from atelier.manager.preview_server import PreviewServing
from atelier.manager.ssh_service import SshService
from atelier.manager.wiring import assemble, build_lifecycle, choose_drivers
from atelier.model.errors import AtelierError, HostError, PortInUseError
from atelier.model.layout import DataLayout, RunLayout
from atelier.services.accounts import new_key
from atelier.services.host import SandboxesAtEnd

logger = logging.getLogger(__name__)

_CONSOLE_TRIM_SECONDS = 10.0
_RECONCILE_SECONDS = 30.0
_TIME_LIMIT_SECONDS = 5.0
_NETWORK_POLICY_SECONDS = 1.0
_CLOCK_SECONDS = 60.0
_FULL_DISK_SECONDS = 10.0
_EVENT_TRIM_SECONDS = 60.0
_ACCOUNT_TRIM_SECONDS = 600.0
_WARM_POOL_SECONDS = 10.0
_SERVING_SECONDS = 3.0
_SNAPSHOT_CHECK_SECONDS = 60.0
_SNAPSHOT_CHECK_AFTER_SECONDS = 300.0
"""After a start there is better use for the disk."""
_DRAIN_SECONDS = 30.0
_AT_END: dict[SandboxesAtEnd, str] = {
    "keep": "ends it; sandboxes go on (atelier down stops them too)",
    "stop": "stops the sandboxes and ends it",
    "destroy": "destroys the sandboxes and ends it",
}
_ANY_PORT = ListenAddress("127.0.0.1", 0)


@dataclass(frozen=True, slots=True)
class Installation:
    settings: Settings
    address: ListenAddress
    data: DataLayout
    application: Application
    socket: socket.socket
    lifecycle: SandboxLifecycle
    fleet: SandboxFleet
    end_asked: asyncio.Event
    """Set when a client has asked for the manager's end."""
    first_link: str | None
    """Secret of a link that was made just now, and that nobody can be shown again."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(settings: Settings, *, serves: bool = True) -> AsyncGenerator[Installation]:
        """Without ``serves`` nobody will be listened to: whoever holds the port does not matter, and the token file is
        left alone. Raises AlreadyRunningError, PortInUseError, HostError, and what drivers raise when they are opened.
        """
        data, run = DataLayout(settings.data_dir), RunLayout(settings.run_dir)
        async with contextlib.AsyncExitStack() as stack:
            _make_data_folders(data)
            settings.cache_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(data.lock_file))
            listening = stack.enter_context(_bind(settings.listen if serves else _ANY_PORT))
            host, port = listening.getsockname()[:2]
            address = ListenAddress(host, port)
            public_url = settings.public_url or address.url
            _make_run_folders(run)
            token = _ensure_token(data, address) if serves else ""

            database = Database(data.database)
            database.open()
            stack.callback(database.close)
            ids = await load_installation(database)
            drivers = await choose_drivers(settings, data, run, ids)
            stack.push_async_callback(drivers.close)
            lifecycle = build_lifecycle(drivers, database, data, run, ids)
            if drivers.network_holder is not None:
                drivers.network_holder.on_started_anew = lifecycle.network_policies.doubt_all
            fleet = SandboxFleet(lifecycle, database, drivers.vmm, drivers.guests, run)
            # The network first, and last to go: a machine's card has to lead somewhere for as long as it runs.
            companions = [each for each in (drivers.network_holder, drivers.gateway) if each is not None]
            stack.push_async_callback(_close_run_folders, run, fleet, companions)
            for companion in companions:
                await companion.open()
            stack.push_async_callback(lifecycle.close)
            end_asked = asyncio.Event()
            preview_key = await load_preview_key(database)
            services = assemble(drivers, database, lifecycle, fleet, settings, preview_key, end_asked.set)
            services.preview_entry.manager_url = public_url
            stack.push_async_callback(services.images.close)
            stack.push_async_callback(services.authenticator.close)
            stack.push_async_callback(services.audit.close)
            first_link = None
            if serves:
                await services.accounts.ensure_local_admin(token)
                first_link = await services.sign_in.make_first_link()
            await lifecycle.recover()
            if drivers.gateway is not None and serves:
                ssh = SshService(services.ssh_keys, services.ssh_entry, data, run, settings.ssh_listen)
                ssh.open()
                previews = PreviewServing(services.previews, services.preview_entry, run, settings.previews)
                kept = (ssh.keep, previews.keep)
                # First, since it makes known which hosts are previews': a gateway of before asks as soon as it can.
                for keep in kept:
                    await keep()
                questions = GatewayQuestions(run, {"ssh": ssh.answer, "preview": previews.answer})
                await questions.open()
                stack.push_async_callback(questions.close)
                for keep in kept:
                    stack.push_async_callback(
                        _cancel, asyncio.create_task(_every(_SERVING_SECONDS, keep, after=_SERVING_SECONDS))
                    )
            for seconds, work in (
                (_CONSOLE_TRIM_SECONDS, fleet.trim_consoles),
                (_RECONCILE_SECONDS, lifecycle.reconcile),
                (_RECONCILE_SECONDS, lifecycle.snapshots.drop_unneeded),
                (_TIME_LIMIT_SECONDS, lifecycle.time_limits.enforce),
                (_NETWORK_POLICY_SECONDS, lifecycle.network_policies.enforce_pending),
                (_CLOCK_SECONDS, fleet.keep_clocks),
                (_FULL_DISK_SECONDS, fleet.resume_after_full_disk),
                (_EVENT_TRIM_SECONDS, services.events.trim),
                (_ACCOUNT_TRIM_SECONDS, services.accounts.trim),
                (_ACCOUNT_TRIM_SECONDS, services.audit.trim),
                (_ACCOUNT_TRIM_SECONDS, services.previews.trim),
                (_ACCOUNT_TRIM_SECONDS, services.idempotency.trim),
                (_WARM_POOL_SECONDS, lifecycle.warm_pools.keep),
            ):
                stack.push_async_callback(_cancel, asyncio.create_task(_every(seconds, work)))
            checking = _every(
                _SNAPSHOT_CHECK_SECONDS, lifecycle.snapshot_checks.check_next, after=_SNAPSHOT_CHECK_AFTER_SECONDS
            )
            stack.push_async_callback(_cancel, asyncio.create_task(checking))
            application = create_application(services, public_url, frozenset({address.host}))
            yield Installation(settings, address, data, application, listening, lifecycle, fleet, end_asked, first_link)

    def announce(self, on_exit: SandboxesAtEnd) -> None:
        """Tell the person at the terminal where everything is."""
        sys.stderr.write(
            f"atelier: ready at {self.address.url} (mode {self.settings.mode})\n"
            f"atelier: API documentation at {self.address.url}/docs\n"
            f"atelier: the key is in {self.data.token_file}; clients on this machine find it there\n"
            f"atelier: Ctrl-C {_AT_END[on_exit]}\n"
        )
        if self.first_link is not None:
            address = f"{self.settings.public_url or self.address.url}/sign-in/first-run?secret={self.first_link}"
            sys.stderr.write(
                f"atelier: to be its admin in a browser, open this within 24 hours:\natelier:   {address}\n"
            )
        sys.stderr.flush()

    async def end_sandboxes(self, what: SandboxesAtEnd) -> tuple[list[str], list[str]]:
        """Let what is under way end, and the sandboxes as ``what`` says; (names of those that were stopped or
        destroyed, names of those that go on)."""
        changed: list[str] = []
        if what == "destroy":
            changed = await self.fleet.destroy_all()
        elif what == "stop":
            changed = await self.fleet.stop_all()
        await self.fleet.drain(_DRAIN_SECONDS)
        return changed, self.fleet.list_running_names()


async def prepare_installation(settings: Settings) -> str:
    """The installation's id; its data folder and database are made if they are not there. No manager may run meanwhile,
    unless all of it is there. Raises AlreadyRunningError, HostError."""
    data = DataLayout(settings.data_dir)
    if (known := read_installation_id(data.database)) is not None:
        return known
    _make_data_folders(data)
    with lock_folder(data.lock_file):
        database = Database(data.database)
        database.open()
        try:
            return (await load_installation(database)).installation_id
        finally:
            database.close()


def _make_data_folders(data: DataLayout) -> None:
    for folder in (data.root, data.volumes, data.consoles, data.logs):
        ensure_private_folder(folder)


def _bind(address: ListenAddress) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.host, address.port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"{address} is in use by another program",
                hint="choose another with --listen or ATELIER_LISTEN, or end the program that holds it",
            ) from error
        raise HostError(
            f"cannot listen on {address}: {error.strerror}", hint="give an address of this machine with --listen"
        ) from error
    return listening


def _make_run_folders(run: RunLayout) -> None:
    # Closed to everybody else, VMMs under users of their own too: they inherit their sockets.
    for folder in (run.root, run.sandboxes, run.channels):
        ensure_private_folder(folder)


async def _close_run_folders(run: RunLayout, fleet: SandboxFleet, companions: Sequence[KeptProcess]) -> None:
    """While machines go on so do gateway and network, which the next manager finds. Otherwise nothing stays behind."""
    if fleet.list_running_names():
        for companion in companions:
            await companion.release()
        return
    for companion in reversed(companions):
        await companion.close()
    # The sockets of services are theirs.
    if not any(companion.is_service for companion in companions):
        _remove_run_folders(run)


def _remove_run_folders(run: RunLayout) -> None:
    """Remove what is empty by now; what a failed unwinding left stays for the next start to find."""
    for file in (run.gateway_socket, run.network_socket, *run.root.glob("*.lock"), *run.channels.glob("*.lock")):
        file.unlink(missing_ok=True)
    for folder in (run.sandboxes, run.channels, run.root, run.root.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _ensure_token(data: DataLayout, address: ListenAddress) -> str:
    """The local key, made at the first start; the file says where this manager listens now."""
    token = ""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        token = str(json.loads(data.token_file.read_text())["api_key"])
    token = token or new_key()
    write_atomically(data.token_file, json.dumps({"api_url": address.url, "api_key": token}).encode() + b"\n")
    return token


async def _every(seconds: float, work: Callable[[], Awaitable[object]], *, after: float = 0.0) -> None:
    """A background loop; the work is done ``after`` seconds, and then every so often. Its failing is told, and does not
    end it."""
    await asyncio.sleep(after)
    while True:
        try:
            await work()
        except AtelierError as error:
            logger.warning("a background task failed: %s", error)
        except Exception:
            logger.exception("a background task met a defect")
        await asyncio.sleep(seconds)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

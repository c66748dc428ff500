"""The guest agent's program: options, services, and where requests come from.

Called by ``__main__``. In a guest it opens the guest channel and serves the streams to port 49983. With
``--listen 127.0.0.1:PORT`` or ``unix:/path`` (tests, development) it serves there instead; control services
(``/init``, quiesce, shutdown) are then offered with ``--development`` only. The file services are imported after the channel is
open, and that of terminals with them: boot and restore do not ask for them first.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Final

from atelier.guest_agent.http import Router
from atelier.guest_agent.http_server import HttpServer
from atelier.guest_agent.state import DEFAULT_USER, AgentState
from atelier.guest_protocol import GUEST_AGENT_PORT, GUEST_SSH_PORT

USAGE: Final = """usage: python -m atelier.guest_agent [options]

  --channel PATH        the virtio-serial device, "vsock", or unix:/path (default: find the port named "atelier", or a vsock)
  --listen ADDRESS      serve on 127.0.0.1:PORT or unix:/path instead of the channel; port 0: a free one, printed
  --development         offer the control services to --listen too
  --no-system           keep off clock, hostname, machine-id and host keys
  --default-user NAME   whom requests act as that name no user (default: user)
  --token TOKEN         the access token (default: none, until the channel or /init brings one)
"""
_LOAD_REST_SECONDS: Final = 1.0
_VALUE_OPTIONS: Final = {
    "--channel": "channel",
    "--listen": "listen",
    "--default-user": "default_user",
    "--token": "token",
}


class Options:
    """The command line. ``channel`` None: find the port by its name."""

    def __init__(self) -> None:
        self.channel: str | None = None
        self.listen: str | None = None
        self.is_development = False
        self.touches_system = True
        self.default_user = DEFAULT_USER
        self.token = ""


def parse_options(arguments: list[str]) -> Options:
    """Raises ValueError for what it does not know. (argparse alone takes longer to import than the agent to start.)"""
    options = Options()
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name == "--development":
            options.is_development = True
        elif name == "--no-system":
            options.touches_system = False
        elif name not in _VALUE_OPTIONS:
            raise ValueError(f"unknown option {name}")
        elif not rest:
            raise ValueError(f"{name} needs a value")
        else:
            setattr(options, _VALUE_OPTIONS[name], rest.pop(0))
    return options


def build_router(state: AgentState, *, with_control: bool) -> Router:
    """All services; those for files, ports and terminals are added on demand."""
    from atelier.guest_agent import process, status

    router = Router()
    status.register(router, state)
    process.register(router, state)
    if with_control:
        from atelier.guest_agent import control

        control.register(router, state)
    router.register_later(lambda: _register_rest(router, state))
    return router


def _register_rest(router: Router, state: AgentState) -> None:
    from atelier.guest_agent import archive, files, filesystem, ports, terminal, watch

    filesystem.register(router, state)
    watch.register(router, state)
    files.register(router, state)
    archive.register(router, state)
    ports.register(router)
    terminal.register(router, state)


async def serve(options: Options) -> None:
    """Serve until cancelled. Raises OSError, ValueError if the place to serve at cannot be used."""
    state = AgentState(token=options.token, default_user=options.default_user, touches_system=options.touches_system)
    router = build_router(state, with_control=options.listen is None or options.is_development)
    server = HttpServer(router, state.authorize, state.gate)
    asyncio.get_running_loop().call_later(_LOAD_REST_SECONDS, router.load_rest)
    if options.listen is None:
        from atelier.guest_agent.channel import run_channel
        from atelier.guest_agent.freezer import MARK_PATH

        if os.path.exists(MARK_PATH):
            # The agent before this one has ended while the guest stood still.
            state.gate.close()

        async def connect_ssh() -> socket.socket:
            from atelier.guest_agent import ssh

            return await ssh.connect(state)

        connectors = {GUEST_SSH_PORT: connect_ssh}
        await run_channel(options.channel, {GUEST_AGENT_PORT: server.serve}, state.set_token, connectors)
        return
    if options.listen.startswith("unix:"):
        listener = await asyncio.start_unix_server(server.serve, options.listen.removeprefix("unix:"))
        address = options.listen
    else:
        host, _, port = options.listen.rpartition(":")
        if host not in ("127.0.0.1", "[::1]") or not port.isdecimal():
            raise ValueError("--listen takes 127.0.0.1:PORT, [::1]:PORT or unix:/path")
        listener = await asyncio.start_server(server.serve, host.strip("[]"), int(port))
        address = f"{host}:{listener.sockets[0].getsockname()[1]}"
    print(f"listening on {address}", flush=True)
    async with listener:
        await listener.serve_forever()


def run(arguments: list[str]) -> int:
    """The program; returns the exit status."""
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    try:
        options = parse_options(arguments)
    except ValueError as error:
        print(f"guest agent: {error}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    # Programs get their descriptors 0 to 2 from pipes with higher numbers: none of the agent's own may lie there.
    while (descriptor := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)
    os.chdir("/")
    os.umask(0o022)
    try:
        asyncio.run(serve(options))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"guest agent: {error}", file=sys.stderr)
        return 1
    return 0

"""The agent's file services in this process, on a unix socket, with users of the test's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from atelier.guest_agent import archive, files, filesystem, watch
from atelier.guest_agent.direct_reader import DirectReader
from atelier.guest_agent.http import Router
from atelier.guest_agent.http_server import HttpServer
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.users import UserDirectory

GUEST_UID = 54321
"""A number that nobody on the machine has: the kernel needs no name for it."""
TOKEN = "sesame"


def write_users(folder: Path, home: Path) -> UserDirectory:
    passwd, group = folder / "passwd", folder / "group"
    me = f"me:x:{os.getuid()}:{os.getgid()}::{home}:/bin/sh\n" if os.getuid() else ""
    passwd.write_text(f"root:x:0:0::{home}:/bin/sh\nuser:x:{GUEST_UID}:{GUEST_UID}::{home}:/bin/sh\n{me}")
    group.write_text(f"root:x:0:\nuser:x:{GUEST_UID}:\nstaff:x:{GUEST_UID + 1}:user\n")
    return UserDirectory(str(passwd), str(group))


@asynccontextmanager
async def file_services(
    folder: Path, home: Path, *, default_user: str, token: str = "", direct: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    state = AgentState(default_user=default_user, touches_system=False, users=write_users(folder, home), token=token)
    router = Router()
    for service in (filesystem, watch, files, archive):
        service.register(router, state)
    path = str(folder / "agent.sock")
    serve = HttpServer(router, state.authorize).serve
    loop = asyncio.get_running_loop()

    def protocol() -> asyncio.StreamReaderProtocol:
        reader = DirectReader(limit=256 * 1024, loop=loop) if direct else asyncio.StreamReader(limit=65536, loop=loop)
        return asyncio.StreamReaderProtocol(reader, serve, loop=loop)

    server = await loop.create_unix_server(protocol, path)
    headers = {"x-access-token": token} if token else {}
    transport = httpx.AsyncHTTPTransport(uds=path)
    async with server, httpx.AsyncClient(transport=transport, base_url="http://guest", headers=headers) as client:
        yield client


async def call(client: httpx.AsyncClient, procedure: str, user: str = "", **message: object) -> httpx.Response:
    auth = (user, "") if user else None
    return await client.post(f"/filesystem.Filesystem/{procedure}", json=message, auth=auth)

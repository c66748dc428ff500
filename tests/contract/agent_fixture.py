"""A guest agent as a process of its own on the host's loopback, and E2B's own in-VM clients for it.

Used by the contract tests of the agent's services. The agent runs as it does in a guest (``-I -S``, so that only the
standard library is there), but keeps off the host's clock, name and machine-id.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from e2b.api.client_sync import get_envd_api
from e2b.connection_config import ConnectionConfig
from e2b.sandbox_sync.commands.command import Commands
from e2b.sandbox_sync.commands.pty import Pty
from e2b.sandbox_sync.filesystem.filesystem import Filesystem
from packaging.version import Version

SOURCE = Path(__file__).parents[2] / "src"
ENVD_VERSION = Version("0.6.4")
"""What E2B's client shall take the agent for: its newest features (octet-stream uploads, metadata, entry infos)."""

_START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from atelier.guest_agent.__main__ import main
sys.exit(main())
"""


@dataclass
class RunningAgent:
    """A live agent. ``url`` has no slash at its end."""

    process: subprocess.Popen[str]
    url: str
    port: int
    config: ConnectionConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = ConnectionConfig(debug=True, http_version="1.1", sandbox_url=self.url)

    @property
    def envd_api(self) -> httpx.Client:
        return get_envd_api(self.config, self.url)

    @property
    def commands(self) -> Commands:
        return Commands(self.url, self.config, ENVD_VERSION, self.envd_api)

    @property
    def pty(self) -> Pty:
        return Pty(self.url, self.config, ENVD_VERSION, self.envd_api)

    @property
    def files(self) -> Filesystem:
        return Filesystem(self.url, ENVD_VERSION, self.config, self.envd_api)


@contextmanager
def running_agent(*options: str, default_user: str = "root") -> Iterator[RunningAgent]:
    """Start an agent on a free loopback port; it is ended on leaving. ``options`` are further command line words."""
    process = subprocess.Popen(
        [
            sys.executable, "-I", "-S", "-c", _START, str(SOURCE),
            "--listen", "127.0.0.1:0", "--no-system", "--default-user", default_user, *options,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), f"the agent did not start: {line!r}"
        port = int(line.rpartition(":")[2])
        yield RunningAgent(process, f"http://127.0.0.1:{port}", port)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

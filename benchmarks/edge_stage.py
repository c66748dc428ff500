"""The whole way of a preview but the guest: the real Caddy with the shipped configuration, manager, gateway; and the same
Caddy with a static upstream beside it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from tests import caddy as front
from tests.preview_stage import PreviewStage, preview_stage
from tests.running_manager import wait_until

_STATIC = """{{
	admin off
	auto_https disable_redirects
}}
https://*.{domain}:{port} {{
	tls {certificate} {key}
	reverse_proxy 127.0.0.1:{upstream}
}}
"""


@dataclass(frozen=True)
class EdgeStage:
    """``host`` is a preview's, public; ``port`` and ``static_port``: those of the two Caddies."""

    stage: PreviewStage
    caddy: front.Caddy
    host: str
    static_port: int


@contextlib.contextmanager
def edge_stage(folder: Path) -> Generator[EdgeStage]:
    if front.NO_CADDY:
        raise RuntimeError(front.NO_CADDY)
    folder.mkdir()
    caddy = front.prepare(folder)
    static_port, upstream_port = front.free_port(), front.free_port()
    with (
        preview_stage(folder, **caddy.variables(), ATELIER_REQUESTS_PER_SECOND="0") as stage,
        front.running(caddy, folder, stage.manager.url),
        contextlib.ExitStack() as stack,
    ):
        sandbox = stage.call("POST", "/sandboxes?wait=true", {"name": "box"}, 201)["id"]
        stage.share(sandbox, 8000)
        channel = str(stage.run.channel_socket(sandbox))
        upstream = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.edge_upstream", str(upstream_port), channel],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(upstream.terminate)
        assert upstream.stdout is not None
        if upstream.stdout.readline() != "ready\n":
            raise RuntimeError("the upstream did not start")
        config = folder / "Static"
        certificate = caddy.certificate
        config.write_text(
            _STATIC.format(
                domain=front.SANDBOX_DOMAIN,
                port=static_port,
                certificate=certificate,
                key=certificate.with_suffix(".key"),
                upstream=upstream_port,
            )
        )
        static = stack.enter_context(
            subprocess.Popen(
                ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        stack.callback(static.terminate)
        beside = replace(caddy, port=static_port)
        host = f"8000-{sandbox}.{front.SANDBOX_DOMAIN}"

        def listens() -> bool:
            with contextlib.suppress(OSError):
                beside.connect(host).close()
                return True
            return False

        wait_until(listens, 30)
        yield EdgeStage(stage, caddy, host, static_port)

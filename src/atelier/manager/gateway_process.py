"""The gateway, as the manager keeps it: replaced by one of the manager's own version, guests' processes live on and
clients connect again.
"""

from __future__ import annotations

from pathlib import Path

from atelier.manager.kept_process import KeptProcess, OwnProcess


class GatewayProcess(KeptProcess):
    """``socket_path``: the gateway's control socket; ``log_path``: where its log goes."""

    def __init__(self, run_dir: Path, socket_path: Path, log_path: Path, *, service: str = "") -> None:
        arguments = ("-m", "atelier.gateway", "--run-dir", str(run_dir))
        starter = OwnProcess("gateway", arguments, log_path)
        super().__init__("gateway", "gateway_failed", starter, socket_path, log_path, service)

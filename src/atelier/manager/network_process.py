"""The network holder, as the manager keeps it: its process may be replaced at any time, the network itself stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from atelier.host.checks.local import CheckResult, CheckStatus
from atelier.manager.kept_process import KeptProcess, OwnProcess, Starter
from atelier.model.errors import AtelierError, HostError
from atelier.model.layout import DataLayout, RunLayout

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0


def own_holder(data: DataLayout, run: RunLayout, installation_id: str, *, home: str, bridge_name: str) -> Starter:
    """The network holder as a process of the manager's user. ``home``: where the bridge is to be, ``private`` or ``host``."""
    arguments = (
        *("-m", "atelier.network_holder", "--run-dir", str(run.root)),
        *("--plan-file", str(data.network_plan), "--installation", installation_id),
        *("--home", home, "--bridge-name", bridge_name),
        *("--keeper-log", str(data.logs / "network-keeper.log")),
    )
    return OwnProcess("network holder", arguments, data.logs / "network.log")


class NetworkHolderProcess(KeptProcess):
    """``check``: what the network needs of this machine, asked before anything is started."""

    def __init__(
        self,
        starter: Starter,
        socket_path: Path,
        log_path: Path,
        check: Callable[[], list[CheckResult]],
        service: str = "",
    ) -> None:
        self._check = check
        self._control = socket_path
        super().__init__("network holder", "network_holder_failed", starter, socket_path, log_path, service)

    async def open(self) -> None:
        """Raises HostError (``network_not_possible``) with what is missing and how to get it."""
        missing = [result for result in self._check() if result.status is CheckStatus.FAILED]
        if missing:
            raise HostError(
                "ATELIER_NETWORK is bridge, and this machine has not got what it takes: "
                + "; ".join(result.message for result in missing),
                code="network_not_possible",
                hint="; ".join(result.remedy for result in missing) + "; or ATELIER_NETWORK=closed",
            )
        await super().open()

    async def close(self) -> None:
        """End the network too, which is then needed by nobody; a service keeps it."""
        await self.release()
        if self._service:
            return
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._control)
                try:
                    writer.write(b'{"operation": "close"}\n')
                    await reader.readline()
                finally:
                    writer.close()
        await super().close()


class FormerNetworkHolder(NetworkHolderProcess):
    """Kept for machines that were started when the network was another: without it they have no network, which is told
    and keeps nobody from starting."""

    async def open(self) -> None:
        try:
            await super().open()
        except AtelierError as error:
            logger.warning("the network of sandboxes that were started with one cannot be kept: %s", error)

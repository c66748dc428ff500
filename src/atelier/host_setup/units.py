"""Templates below ``deploy/``, filled in: the host's services, and Caddy's."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from atelier.model.errors import HostError

UNITS = ("atelier-vm.slice", "atelier-network.service", "atelier-gateway.service", "atelier-manager.service")
POOL_UNIT = "atelier-pool.service"
SERVICES = ("atelier-network.service", "atelier-gateway.service", "atelier-manager.service")
"""In the order in which they start."""

NETWORK_CAPABILITIES = ("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_NET_BIND_SERVICE")
"""Links and rules; packet sockets; the port that names are asked at."""

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z_]*)@")


def deploy_folder() -> Path:
    """The checkout's, or where the wheel installed it. Raises HostError (``deploy_missing``)."""
    checkout = Path(__file__).resolve().parents[3] / "deploy"
    installed = Path(sys.prefix) / "share" / "atelier" / "deploy"
    found = next((each for each in (checkout, installed) if (each / "systemd").is_dir()), None)
    if found is None:
        raise HostError(
            f"the templates of the services are missing: {installed}",
            code="deploy_missing",
            hint="install Atelier again: deploy/install.sh",
        )
    return found


def render(template: Path, values: Mapping[str, str]) -> bytes:
    """``@NAME@`` is what ``values`` says. Raises KeyError for one that is not said."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template.read_text()).encode()

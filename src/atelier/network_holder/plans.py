"""Chooses the installation's addresses and keeps them: in a file of the data folder, and in the bridge itself."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, cast

from atelier.host.files import write_atomically
from atelier.model.address_plan import AddressPlan, choose_plan, is_plan_subnet, overlapping

_logger = logging.getLogger(__name__)


def settle_plan(
    file: Path, installation_id: str, taken: Iterable[IPv4Network], in_use: IPv4Network | None
) -> AddressPlan:
    """``in_use``: the bridge's network while it has ports, which then stands whatever else says; else the kept one
    where it overlaps nothing by now; else a new one, which is kept. Raises HostError (``network_overlap``)."""
    networks = list(taken)
    kept = _read(file)
    if in_use is not None:
        plan = AddressPlan(in_use)
    elif kept is not None and not overlapping(kept, networks):
        return kept
    else:
        if kept is not None:
            _logger.warning("the addresses %s are this machine's own by now: choosing others", kept.subnet)
        plan = choose_plan(networks, zlib.crc32(installation_id.encode()))
    if plan != kept:
        write_atomically(file, json.dumps({"subnet": str(plan.subnet)}).encode() + b"\n")
    return plan


def _read(file: Path) -> AddressPlan | None:
    try:
        content: Any = json.loads(file.read_text())
        subnet = IPv4Network(cast("dict[str, Any]", content)["subnet"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        _logger.warning("%s cannot be read (%s): choosing addresses anew", file, error)
        return None
    return AddressPlan(subnet) if is_plan_subnet(subnet) else None

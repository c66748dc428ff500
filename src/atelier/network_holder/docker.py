"""Lets sandboxes' traffic pass where Docker has made the host's FORWARD chain drop everything.

An accept in a table of ours cannot undo a drop in Docker's: DOCKER-USER is the chain that it keeps for others. It is
written by ``iptables``, as Docker writes it: rules in nftables' own words would make that table unreadable for it.
Source: Docker's manual, "Packet filtering and firewalls".
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from atelier.host import command
from atelier.model.errors import CommandError
from atelier.network_holder.names import NetworkNames

_CHAIN = "DOCKER-USER"
_IPTABLES = ("iptables", "--wait", "5")


def is_present(dropping: Sequence[tuple[str, str, str]]) -> bool:
    """Whether the only chain that drops is the one that DOCKER-USER is called from, and we can write there."""
    return list(dropping) == [("ip", "filter", "FORWARD")] and shutil.which("iptables") is not None


async def ensure_accepted(names: NetworkNames, link: str, in_host: Sequence[str]) -> bool:
    """What comes from and goes to ``link``. Whether anything had to be put there."""
    if not await _has_chain(in_host):
        return False
    added = False
    for rule in _rules(names, link):
        if not await _succeeds([*in_host, *_IPTABLES, "--check", _CHAIN, *rule]):
            await command.run([*in_host, *_IPTABLES, "--insert", _CHAIN, *rule])
            added = True
    return added


async def ensure_accepted_absent(names: NetworkNames, link: str, in_host: Sequence[str]) -> None:
    if await _has_chain(in_host):
        for rule in _rules(names, link):
            while await _succeeds([*in_host, *_IPTABLES, "--delete", _CHAIN, *rule]):
                pass


def _rules(names: NetworkNames, link: str) -> list[list[str]]:
    comment = ["-m", "comment", "--comment", names.table, "-j", "ACCEPT"]
    return [
        ["-i", link, *comment],
        ["-o", link, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", *comment],
    ]


async def _has_chain(in_host: Sequence[str]) -> bool:
    if shutil.which("iptables") is None:
        return False
    return await _succeeds([*in_host, *_IPTABLES, "--list-rules", _CHAIN])


async def _succeeds(arguments: Sequence[str]) -> bool:
    try:
        await command.run(arguments)
    except CommandError:
        return False
    return True

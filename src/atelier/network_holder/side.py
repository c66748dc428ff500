"""One network namespace as the holder works on it: its links, its rules, and the watch over them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from atelier.host.namespaces import entered
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import Nftables, RulesWatch


@dataclass(frozen=True, slots=True)
class NetworkSide:
    """``namespace`` is a descriptor, owned by this object."""

    namespace: int
    links: RouteSocket
    rules: Nftables
    watch: RulesWatch

    @staticmethod
    def open(namespace: int) -> NetworkSide:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, namespace)
            with entered(namespace):
                links = RouteSocket()
                stack.callback(links.close)
                rules = Nftables()
                stack.callback(rules.close)
                watch = RulesWatch()
            stack.pop_all()
        return NetworkSide(namespace, links, rules, watch)

    def close(self) -> None:
        self.links.close()
        self.rules.close()
        self.watch.close()
        os.close(self.namespace)

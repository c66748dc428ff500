"""One network namespace as the holder works on it: its links, its rules, and the watch over them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from atelier.host.flow_table import FlowTable
from atelier.host.namespaces import entered
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import Nftables, RulesWatch


@dataclass(frozen=True, slots=True)
class NetworkSide:
    """``namespace`` is a descriptor, owned by this object."""

    namespace: int
    links: RouteSocket
    rules: Nftables
    flows: FlowTable
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
                flows = FlowTable()
                stack.callback(flows.close)
                watch = RulesWatch()
            stack.pop_all()
        return NetworkSide(namespace, links, rules, flows, watch)

    def close(self) -> None:
        self.links.close()
        self.rules.close()
        self.flows.close()
        self.watch.close()
        os.close(self.namespace)

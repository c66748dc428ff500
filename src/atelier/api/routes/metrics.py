"""What a monitoring system scrapes: the text format of Prometheus, made anew for each scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from atelier.api.parameters import services_of
from atelier.model.network_policy import NetworkUsage
from atelier.model.states import SandboxState
from atelier.services.networks import HostFigures

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

router = APIRouter(tags=["metrics"])

_COUNTERS = {
    "received_bytes": "Bytes that the sandbox has received since it took its network slot",
    "sent_bytes": "Bytes that the sandbox has sent since it took its network slot",
    "received_packets": "Packets that the sandbox has received since it took its network slot",
    "sent_packets": "Packets that the sandbox has sent since it took its network slot",
    "refused_packets": "Packets that the sandbox has sent and its network policy has kept back",
}
"""Fields of ``NetworkUsage``, with their help."""


@router.get(
    "/metrics",
    operation_id="scrape_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Text format of Prometheus."}},
)
async def scrape_metrics(request: Request) -> Response:
    """Figures of this host for monitoring, in the text format of Prometheus."""
    figures = await services_of(request).networks.measure()
    # In a thread: a thousand sandboxes make thousands of lines.
    content, media_type = await asyncio.to_thread(_expose, figures)
    return Response(content, media_type=media_type)


def _expose(figures: HostFigures) -> tuple[bytes, str]:
    """(text, content type). The library is loaded at the first scrape: most managers never see one."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_client.registry import Collector

    class Figures(Collector):
        def collect(self) -> Iterator[Metric]:
            return _families(figures)

    registry = CollectorRegistry()
    registry.register(Figures())
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _families(figures: HostFigures) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    states = GaugeMetricFamily("atelier_sandboxes", "Sandboxes, by state", labels=["state"])
    for state in SandboxState:
        states.add_metric([state.value], figures.sandboxes.get(state, 0))
    yield states
    for field, text in _COUNTERS.items():
        family = CounterMetricFamily(f"atelier_sandbox_network_{field}", text, labels=["sandbox"])
        for sandbox_id, usage in figures.usage.items():
            family.add_metric([sandbox_id], _count(usage, field))
        yield family
    yield CounterMetricFamily(
        "atelier_network_scrape_errors",
        "Scrapes that could not read the network's counters, and left them out",
        value=figures.failed_reads,
    )


def _count(usage: NetworkUsage, field: str) -> int:
    return int(getattr(usage, field))

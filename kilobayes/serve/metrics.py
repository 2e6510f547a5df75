"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("kilobayes_requests", "Requests answered.", ["path", "status"], **own)
        self.seconds = Histogram(
            "kilobayes_request_seconds", "From the request's head to the end of its answer.", ["path"],
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.under_way = Gauge("kilobayes_requests_under_way", "Requests accepted and not answered.", **own)
        self.batch = Histogram("kilobayes_batch_rows", "Rows of a forward.", ["kind"], buckets=ROWS, **own)
        self.adapters = Histogram("kilobayes_batch_adapters", "Runs in a forward.", buckets=ROWS, **own)
        self.queue = Gauge("kilobayes_queue_rows", "Rows that wait for the model.", **own)
        self.tokens = Counter("kilobayes_tokens", "Tokens read and written.", ["kind"], **own)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("", "search", "embed", "health", "metrics", "media", "item", "map", "sample", "about", "login")
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20)


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self):
        self.registry = own = CollectorRegistry()
        labels = ("path", "method", "status")
        self.requests = Counter("mmfm_requests", "Requests that were answered", labels, registry=own)
        self.seconds = Histogram("mmfm_request_seconds", "From head to end", ("path",), registry=own, buckets=SECONDS)
        self.refused = Counter("mmfm_refused", "Requests that were refused, by reason", ("reason",), registry=own)
        self.batches = Histogram(
            "mmfm_batch_size", "Requests that went through the model together", registry=own,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self.model_seconds = Histogram("mmfm_batch_seconds", "A batch's seconds", registry=own, buckets=SECONDS)
        self.items = Gauge("mmfm_index_items", "Items in the index", ("modality",), registry=own)
        self.in_flight = Gauge("mmfm_in_flight", "Requests that are being answered", registry=own)
        self.held = Gauge("mmfm_held_bytes", "Bytes of requests that are held", registry=own)

    def observe_request(self, path: str, method: str, status: int, seconds: float, reason: str) -> None:
        """Paths and methods that nobody knows share a name, so that no client makes new counters."""
        first = path.split("/")[1] if path.startswith("/") else "other"
        first = f"/{first}" if first in PATHS else "other"
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self.requests.labels(first, method, str(status)).inc()
        self.seconds.labels(first).observe(seconds)
        if reason:
            self.refused.labels(reason).inc()

    def observe_batch(self, size: int, seconds: float) -> None:
        self.batches.observe(size)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

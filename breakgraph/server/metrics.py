"""Prometheus metrics in a registry of their own: names and labels are public and stay stable.

What the engine counts is read when somebody asks, from one snapshot; only latencies are recorded
as they happen. No label comes from a client, so that the series stay few.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from breakgraph.engine.async_engine import AsyncEngine

LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)


class ServerMetrics:
    """What the server records, and the registry it is read from."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self._requests = Counter(
            "breakgraph_http_requests",
            "Requests answered, by route and status; 499: the client went away first.",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "breakgraph_http_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "breakgraph_time_to_first_token_seconds",
            "From a request's head to the first token of each of its choices.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._next_token = Histogram(
            "breakgraph_time_per_output_token_seconds",
            "Between two tokens of a choice.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """Count ``count`` tokens of a choice that came ``seconds`` after what was before them."""
        (self._first_token if first else self._next_token).observe(
            seconds if first else seconds / count
        )

    def response(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class EngineCollector(Collector):
    """The engine's own counts, as they are when they are collected."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        now = self._engine.snapshot()
        gauges = {
            "healthy": ("Whether the model thread runs.", float(self._engine.healthy)),
            "queued_requests": ("Requests that wait to run.", now.queued),
            "running_requests": ("Requests that hold slots.", now.running),
            "kv_free_tokens": ("Slots that a new request could have.", now.free_kv_tokens),
            "kv_used_tokens": ("Slots that running requests hold.", now.used_kv_tokens),
            "kv_cached_tokens": ("Slots in the prefix cache.", now.cached_kv_tokens),
            "graph_memory_bytes": ("Memory of the graphs.", now.graph_memory_bytes),
            "prefill_buckets_out_of_service": (
                "Buckets that gave other results than an eager forward.",
                now.buckets_out_of_service,
            ),
            "prefill_padding_ratio": (
                "Padded rows as a share of all rows replayed by prefills, since the start.",
                now.padding,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"breakgraph_{name}", text, value)
        totals = {
            "engine_requests": ("Requests ended, however they did.", now.requests),
            "prompt_tokens": ("Tokens of the prompts that ran.", now.prompt_tokens),
            "cached_tokens": ("Those of them found in the prefix cache.", now.cached_tokens),
            "generated_tokens": ("Tokens sampled.", now.generated_tokens),
            "retractions": ("Times a request gave back its slots for a while.", now.retractions),
        }
        for name, (text, count) in totals.items():
            yield CounterMetricFamily(f"breakgraph_{name}", text, count)
        labelled: dict[str, tuple[str, str, dict[str, int]]] = {
            "prefill_forwards": (
                "Prefill forwards, by why they were replayed or not.",
                "reason",
                now.dispatch_counts,
            ),
            "prefill_modes": (
                "Prefill forwards, by how they ran: eager, or from which kind of graphs.",
                "mode",
                now.prefill_modes,
            ),
            "decode_forwards": (
                "Decode forwards, by why they were replayed or not.",
                "reason",
                now.decode_dispatch_counts,
            ),
            "prefill_replays": (
                "Prefill forwards replayed from a graph, by its bucket.",
                "bucket",
                {str(bucket): count for bucket, count in sorted(now.bucket_hits.items())},
            ),
            "prefill_verifications": (
                "Replayed prefills that ran eagerly too: same, different, or skipped.",
                "outcome",
                now.verifications,
            ),
        }
        for name, (text, label, counts) in labelled.items():
            family = CounterMetricFamily(f"breakgraph_{name}", text, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family

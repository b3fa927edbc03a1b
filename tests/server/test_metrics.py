"""Metrics parse, count what happened, and keep their names."""

from .support import Running, ServerMetrics, text_string_to_metric_families

# The public surface: metric and labels. Change it on purpose only.
SURFACE = {
    "breakgraph_cached_tokens": (),
    "breakgraph_decode_forwards": ("reason",),
    "breakgraph_engine_requests": (),
    "breakgraph_generated_tokens": (),
    "breakgraph_graph_memory_bytes": (),
    "breakgraph_healthy": (),
    "breakgraph_http_request_seconds": ("route",),
    "breakgraph_http_requests": ("route", "status"),
    "breakgraph_kv_cached_tokens": (),
    "breakgraph_kv_free_tokens": (),
    "breakgraph_kv_used_tokens": (),
    "breakgraph_prefill_buckets_out_of_service": (),
    "breakgraph_prefill_forwards": ("reason",),
    "breakgraph_prefill_modes": ("mode",),
    "breakgraph_prefill_padding_ratio": (),
    "breakgraph_prefill_replays": ("bucket",),
    "breakgraph_prefill_verifications": ("outcome",),
    "breakgraph_prompt_tokens": (),
    "breakgraph_queued_requests": (),
    "breakgraph_retractions": (),
    "breakgraph_running_requests": (),
    "breakgraph_time_per_output_token_seconds": (),
    "breakgraph_time_to_first_token_seconds": (),
}


def read(server: Running) -> dict:
    with server.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {f.name: f for f in families if not f.name.endswith("_created")}


def total(families: dict, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_metrics_count_what_happened(server: Running):
    before = read(server)
    with server.http() as http:
        for prompt in ([7, 8, 9] * 9, [7, 8, 9] * 9):  # the second is found in the cache
            body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
        http.get("/a/" + "b" * 50)
    after = read(server)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown("breakgraph_prompt_tokens_total") == 54
    assert grown("breakgraph_generated_tokens_total") == 10
    assert grown("breakgraph_cached_tokens_total") >= 26
    assert grown("breakgraph_engine_requests_total") == 2
    assert grown("breakgraph_time_to_first_token_seconds_count") == 2
    assert grown("breakgraph_prefill_forwards_total", reason="replayed") == 2
    assert grown("breakgraph_prefill_replays_total", bucket="32") == 1
    completions = {"route": "/v1/completions"}
    assert grown("breakgraph_http_requests_total", status="200", **completions) == 2
    assert grown("breakgraph_http_request_seconds_count", **completions) == 2
    assert grown("breakgraph_http_requests_total", route="unknown", status="404") == 1
    assert total(after, "breakgraph_graph_memory_bytes") > 0
    assert total(after, "breakgraph_running_requests") == 0


def test_latencies_are_of_the_first_token_and_of_each_other(server: Running):
    metrics = ServerMetrics(server.engine)
    metrics.tokens(2, 1.0, first=True)
    metrics.tokens(4, 1.0, first=False)  # four that a slow reader gets at once
    read = metrics.registry.get_sample_value
    assert read("breakgraph_time_to_first_token_seconds_sum") == 1.0
    assert read("breakgraph_time_per_output_token_seconds_sum") == 0.25


def test_names_and_labels_are_frozen(server: Running):
    found = {}
    for name, family in read(server).items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = tuple(sorted(labels))
    assert found == SURFACE

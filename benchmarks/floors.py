"""What no launch can save: a prefill's matrix products alone, and its kernels by class.

The products are those of every weight of the layer stack and of the head, by torch's library, in
the order of the model's modules, in one CUDA graph: what a prefill of many tokens cannot be faster
than. Few rows our own kernels may multiply faster, and experts at any count: torch's grouped
product takes longer alone than a whole prefill, so a model with experts has no floor.
The second floor is the products and the attention of a full graph's backend, in one graph; it and
the first are timed turn by turn with whole prefills, so that all meet the same chip, hot and bound
by its power. A hybrid's mixers are added as the profiler times them within a prefill.
There a kernel counts from the end of the one ahead if that is later than its own begin: one that is
launched early waits for the other. Gaps count for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import median, prefill_request, timed
from breakgraph.attention import Attention, AttentionBackend
from breakgraph.forward import ForwardBatch
from breakgraph.inspection.figures import CATEGORIES, category
from breakgraph.layers import Embedding
from breakgraph.layers.moe_experts import Experts
from breakgraph.models import CausalLM, PrefillModel
from breakgraph.runner import ModelRunner

Product = Callable[[], object]

LEAST_TURNS = 3

# Triton kernels carry their function's name alone.
_CLASSES = {
    **dict.fromkeys(("product", "finish", "up", "down"), "matrix product"),
    **dict.fromkeys(("carry", "outputs", "step", "extend", "gates", "summed"), "mixer"),
    **dict.fromkeys(("scan", "split", "merge"), "mixer"),
    **dict.fromkeys(("sort", "find"), "copy"),
}


def has_floor(model: PrefillModel) -> bool:
    """Whether the products by torch's library are what bounds a prefill."""
    return not any(isinstance(module, Experts) for module in model.modules())


def matrix_products(
    model: PrefillModel, tokens: int, last_rows: int, attention: AttentionBackend | None = None
) -> list[Product]:
    """Every product of a prefill of ``tokens``, of which ``last_rows`` go through the head.

    With ``attention``, a backend that has planned them, its calls too, where they belong.
    """
    inputs: dict[tuple[int, int], torch.Tensor] = {}

    def rows_of(rows: int, weight: torch.Tensor) -> torch.Tensor:
        key = (rows, weight.shape[-1])
        if key not in inputs:
            inputs[key] = torch.randn(*key, dtype=weight.dtype, device=weight.device)
        return inputs[key]

    def plain(rows: int, weight: torch.Tensor) -> Product:
        x = rows_of(rows, weight)
        return lambda: F.linear(x, weight)

    def attend(layer: Attention, backend: AttentionBackend) -> Product:
        q, k, v = (
            rows_of(tokens, torch.empty(0, heads * layer.head_dim).to(layer.k_cache))
            for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        )
        out = torch.empty_like(q)
        given = [x.unflatten(1, (-1, layer.head_dim)) for x in (q, k, v, out)]
        return lambda: backend.forward(layer, *given)

    products: list[Product] = []
    for module in model.get_layer_stack().modules():
        if attention is not None and isinstance(module, Attention):
            products.append(attend(module, attention))
        weight = getattr(module, "weight", None)
        if isinstance(module, Embedding | nn.Embedding):
            continue
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            products.append(plain(tokens, weight))
    if isinstance(model, CausalLM):
        products.append(plain(last_rows, model.lm_head_weight))
    return products


@torch.no_grad()
def floors_ms(runner: ModelRunner, tokens: int, row_ms: float) -> dict[str, float]:
    """Milliseconds of the products, of them with attention, and of a whole prefill of one request.

    Turn by turn, for about ``row_ms``; ``products_and_mixer_ms`` is there where attention is the
    only mixer and full graphs hold it.
    """
    request = prefill_request(runner.vocab_size, tokens, 1)
    calls = {"products_ms": _in_a_graph(matrix_products(runner.model, tokens, 1))}
    full = runner.full_graph_runner
    if full is not None and runner.mamba_pool is None:
        backend = full.attn_backend
        backend.init_forward_metadata(ForwardBatch.from_requests(*request), tokens)
        both = matrix_products(runner.model, tokens, 1, backend)
        calls["products_and_mixer_ms"] = _in_a_graph(both)
    times: dict[str, list[float]] = {name: [] for name in (*calls, "prefill_ms")}
    began = time.perf_counter()
    while time.perf_counter() - began < row_ms / 1e3 or len(times["prefill_ms"]) < LEAST_TURNS:
        prefill = timed(lambda: runner.forward(ForwardBatch.from_requests(*request)))
        times["prefill_ms"].append(prefill[0])
        for name, call in calls.items():
            times[name].append(timed(call)[1])
    return {name: median(found) for name, found in times.items()}


def _in_a_graph(products: list[Product]) -> Callable[[], None]:
    """All of them: a graph's replay on a GPU, the calls on a CPU."""

    def run() -> None:
        for product in products:
            product()

    run()
    if not torch.cuda.is_available():
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def kernel_classes(runner: ModelRunner, tokens: int, batch_size: int = 1) -> dict[str, float]:
    """Milliseconds of a prefill's kernels by class, as it is dispatched; ops on a CPU."""
    batch = ForwardBatch.from_requests(*prefill_request(runner.vocab_size, tokens, batch_size))
    runner.forward(batch)
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    if cuda:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        runner.forward(batch)
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for name, us in (_kernels if cuda else _cpu_ops)(profile.events()):
        kind = kernel_class(name)
        found[kind] = found.get(kind, 0.0) + us / 1e3
    return {kind: found[kind] for kind in CATEGORIES if kind in found}


def _cpu_ops(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for event in events:
        if event.name.startswith("aten::") and event.self_cpu_time_total > 0:
            yield event.name, float(event.self_cpu_time_total)


def _kernels(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    ended = 0.0
    for event in sorted(on_device, key=lambda event: event.time_range.start):
        begin, end = max(ended, event.time_range.start), event.time_range.end
        if end > begin:
            yield event.name, float(end - begin)
        ended = max(ended, end)


def kernel_class(name: str) -> str:
    """The class of a kernel, one of ``CATEGORIES`` of ``breakgraph.inspection.figures``."""
    return _CLASSES.get(name) or category(name)

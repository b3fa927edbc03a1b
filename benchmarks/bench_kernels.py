"""What our kernels cost against torch ops: token-wise ones, products of few rows, routed experts.

Every figure is of one call among many in a CUDA graph, the calls on buffers of their own, so that
launches cost nothing and long inputs come from memory, not from the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import machine, median, timed, write_json
from breakgraph.kernels.gated_products import gated_product
from breakgraph.kernels.norms import (
    add_rms_norm,
    gated_rms_norm,
    gated_rms_norm_reference,
    rms_norm,
)
from breakgraph.kernels.pointwise import relu_squared_, silu_mul
from breakgraph.kernels.rotary import qk_norm_rope_store
from breakgraph.kernels.routed_experts import routed_down, routed_up, sort_routes, sum_routed
from breakgraph.kernels.small_products import (
    Activation,
    add_small_product,
    serves,
    small_product,
)
from breakgraph.kernels.small_products_cuda import ROW_CLASSES

Call = Callable[[], object]
Row = dict[str, str | float]

ROWS = (16, 128, 512, 2048)
EPS = 1e-6
CACHE_BYTES = 256 << 20
"""Bytes that the calls of one graph touch together, several times the last-level cache."""

SHAPES = {
    # name: hidden size, feed-forward size, query heads, key heads
    "qwen3-0.6b": (1024, 3072, 16, 8),
    "qwen3-8b": (4096, 12288, 32, 8),
}
HEAD_DIM = 128
NEMOTRON_HIDDEN, NEMOTRON_MLP = 4096, 21504
MAMBA_SIZE, MAMBA_GROUP, MAMBA_PROJECTION = 8192, 1024, 18560

PRODUCTS: dict[str, list[tuple[str, int, int]]] = {
    # shape: products of a layer, and the weight's rows and columns
    "qwen3-0.6b": [
        ("qkv", 4096, 1024),
        ("out", 1024, 2048),
        ("gate_up", 6144, 1024),
        ("down", 1024, 3072),
    ],
    "qwen3-8b": [
        ("qkv", 6144, 4096),
        ("out", 4096, 4096),
        ("gate_up", 24576, 4096),
        ("down", 4096, 12288),
    ],
    "nemotron-h-8b": [
        ("in", MAMBA_PROJECTION, NEMOTRON_HIDDEN),
        ("out", NEMOTRON_HIDDEN, MAMBA_SIZE),
        ("up", NEMOTRON_MLP, NEMOTRON_HIDDEN),
        ("down", NEMOTRON_HIDDEN, NEMOTRON_MLP),
    ],
}

EXPERTS = {
    # name: experts, of them for a row, size, their own size, gated
    "qwen3-30b-a3b": (128, 8, 2048, 768, True),
    "qwen3-next-80b": (512, 10, 2048, 512, True),
    "deepseek-v2-lite": (64, 6, 2048, 1408, True),
    "nemotron-3-nano": (128, 6, 2688, 1856, False),
}


@dataclass(frozen=True)
class Case:
    """A kernel at one shape: ``make(rows)`` gives our call and torch's on fresh inputs."""

    kernel: str
    shape: str
    row_bytes: int
    make: Callable[[int], tuple[Call, Call]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def graph_us(*variants: list[Call], at_least: int = 24) -> list[float]:
    """Microseconds of one call of each variant, whose calls are captured in one graph in turn.

    The variants' replays alternate, so that drift of the clocks meets all alike.
    """
    graphs, kept = [], []
    for calls in variants:
        calls[0]()
        times = -(-at_least // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept, for memory that is written again and again stays in the cache.
            kept.append([call() for _ in range(times) for call in calls])
        graph.replay()
        graphs.append(graph)
    rounds = [[timed(graph.replay)[1] for graph in graphs] for _ in range(15)]
    times_of_each = zip(*rounds, strict=True)
    return [
        median(list(times)) * 1e3 / len(results)
        for times, results in zip(times_of_each, kept, strict=True)
    ]


def norm_case(kernel: str, shape: str, size: int) -> Case:
    def make(rows: int) -> tuple[Call, Call]:
        x, residual, weight = normal(rows, size), normal(rows, size), normal(size)
        if kernel == "rms_norm":
            return (
                lambda: rms_norm(x, weight, EPS),
                lambda: F.rms_norm(x, (size,), weight, EPS),
            )
        return (
            lambda: add_rms_norm(residual, x, weight, EPS),
            lambda: F.rms_norm(residual.add_(x), (size,), weight, EPS),
        )

    return Case(kernel, shape, 2 * size * (2 if kernel == "rms_norm" else 4), make)


def gated_case(shape: str, size: int, group: int, gate_row: int, gate_first: bool) -> Case:
    def make(rows: int) -> tuple[Call, Call]:
        x, gate = normal(rows, size), normal(rows, gate_row)[:, :size]
        weight = normal(size if gate_first else group)
        inputs = (x, gate, weight, EPS, group, gate_first)
        return lambda: gated_rms_norm(*inputs), lambda: gated_rms_norm_reference(*inputs)

    return Case("gated_rms_norm", shape, 2 * size * 3, make)


def relu_case(shape: str, size: int) -> Case:
    def make(rows: int) -> tuple[Call, Call]:
        x = normal(rows, size)
        return lambda: relu_squared_(x), lambda: x.relu_().square_()

    return Case("relu_squared_", shape, 2 * size * 2, make)


def silu_case(shape: str, size: int) -> Case:
    """Strided halves for the kernel, contiguous ones for torch: what each is best at."""

    def make(rows: int) -> tuple[Call, Call]:
        gate, up = normal(rows, 2 * size).chunk(2, dim=1)
        first, second = normal(2, rows, size)
        return lambda: silu_mul(gate, up), lambda: F.silu(first).mul_(second)

    return Case("silu_mul", shape, 2 * size * 3, make)


def head_case(shape: str, heads: int, kv_heads: int) -> Case:
    split = [heads, kv_heads, kv_heads]

    def make(rows: int) -> tuple[Call, Call]:
        qkv, cos_sin = normal(rows, sum(split), HEAD_DIM), normal(rows, 2, HEAD_DIM // 2)
        q, k, v = qkv.split(split, dim=1)
        k_cache, v_cache = normal(2, rows + 1, kv_heads, HEAD_DIM)
        slots = torch.randperm(rows, device="cuda") + 1
        q_weight, k_weight = normal(2, HEAD_DIM)
        weight = normal(heads + kv_heads, HEAD_DIM)

        def ours() -> object:
            return qk_norm_rope_store(
                *(q, k, v),
                cos_sin=cos_sin,
                out_cache_loc=slots,
                k_cache=k_cache,
                v_cache=v_cache,
                q_weight=q_weight,
                k_weight=k_weight,
                eps=EPS,
            )

        def chain() -> object:
            normed = F.rms_norm(qkv, (HEAD_DIM,), None, EPS)[:, : heads + kv_heads].mul_(weight)
            cos, sin = cos_sin[:, 0, None], cos_sin[:, 1, None]
            halves = normed.unflatten(-1, (2, -1))
            turned = halves * cos[:, None]
            turned[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
            turned[:, :, 1].addcmul_(halves[:, :, 0], sin)
            k_cache.index_copy_(0, slots, turned.flatten(2)[:, heads:])
            v_cache.index_copy_(0, slots, v)
            return turned

        return ours, chain

    moved = (sum(split) + heads + 3 * kv_heads) * HEAD_DIM + 2 * HEAD_DIM // 2
    return Case("qk_norm_rope_store", shape, 2 * moved, make)


def cases() -> Iterator[Case]:
    for shape, (hidden, inner, heads, kv_heads) in SHAPES.items():
        yield norm_case("rms_norm", shape, hidden)
        yield norm_case("add_rms_norm", shape, hidden)
        yield silu_case(shape, inner)
        yield head_case(shape, heads, kv_heads)
    yield relu_case("nemotron-h-8b", NEMOTRON_MLP)
    yield gated_case("nemotron-h-8b", MAMBA_SIZE, MAMBA_GROUP, MAMBA_PROJECTION, True)
    yield gated_case("qwen3-next-80b", 4096, 128, 12288, False)


def kernel_row(case: Case, rows: int) -> Row:
    """Our kernel, torch's ops, and a copy that moves the same bytes."""
    moved = rows * case.row_bytes
    sets = max(4, min(24, -(-CACHE_BYTES // moved)))
    ours, chain = zip(*(case.make(rows) for _ in range(sets)), strict=True)
    copies = [normal(moved // 4).clone for _ in range(sets)]
    took, torch_took, copy_took = graph_us(list(ours), list(chain), list(copies))
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "rows": rows,
        "us": took,
        "torch_us": torch_took,
        "copy_us": copy_took,
        "gb_per_s": moved / took / 1e3,
    }


def feed_forward_row(shape: str, rows: int) -> Row:
    """Norm, gate and up to the activation: a norm first or its factor last, and as one kernel."""
    hidden, inner, _, _ = SHAPES[shape]
    sets = max(2, -(-CACHE_BYTES // (4 * hidden * inner)))
    x, scale = normal(rows, hidden), normal(hidden)
    weights = [normal(2 * inner, hidden) * hidden**-0.5 for _ in range(sets)]

    def normed(weight: torch.Tensor) -> torch.Tensor:
        return silu_mul(F.linear(rms_norm(x, scale, EPS), weight))

    def factored(weight: torch.Tensor) -> torch.Tensor:
        return silu_mul(F.linear(x, weight), normed=x, eps=EPS)

    def gated(weight: torch.Tensor) -> torch.Tensor:
        return gated_product(rms_norm(x, scale, EPS), weight)

    calls = (normed, factored, gated)
    times = graph_us(*([partial(call, w) for w in weights] for call in calls), at_least=8)
    row: Row = {"shape": shape, "rows": rows}
    return row | dict(zip(("normed_us", "factored_us", "gated_us"), times, strict=True))


def residual_row(shape: str, rows: int, inputs: int) -> Row:
    """An output projection, its addition to the residual and the next norm."""
    hidden = SHAPES[shape][0]
    sets = max(2, -(-CACHE_BYTES // (2 * hidden * inputs)))
    x, residual, weight = normal(rows, inputs), normal(rows, hidden), normal(hidden)
    products = [normal(hidden, inputs) * 1e-3 for _ in range(sets)]

    def inside(product: torch.Tensor, fused: bool) -> torch.Tensor:
        residual.addmm_(x, product.t())
        if fused:
            return rms_norm(residual, weight, EPS)
        return F.rms_norm(residual, (hidden,), weight, EPS)

    def after(product: torch.Tensor) -> torch.Tensor:
        return add_rms_norm(residual, F.linear(x, product), weight, EPS)

    times = graph_us(
        [partial(inside, w, False) for w in products],
        [partial(inside, w, True) for w in products],
        [partial(after, w) for w in products],
        at_least=8,
    )
    names = ("addmm_torch_us", "addmm_fused_us", "mm_add_norm_us")
    row: Row = {"shape": shape, "rows": rows, "inputs": inputs}
    return row | dict(zip(names, times, strict=True))


def product_row(shape: str, name: str, features: int, size: int, rows: int) -> Row:
    """A norm and a product of few rows with what follows it: torch's library's, or our kernel."""
    sets = max(2, -(-CACHE_BYTES // (2 * features * size)))
    x, scale, residual = normal(rows, size), normal(size), normal(rows, features)
    weights = [normal(features, size) * size**-0.5 for _ in range(sets)]
    fused: dict[str, Activation] = {"gate_up": "silu_mul", "up": "relu_squared"}
    activation = fused.get(name, "none")

    def torchs(weight: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, scale, EPS)
        if name in ("out", "down"):
            return residual.addmm_(normed, weight.t())
        product = F.linear(normed, weight)
        if activation == "silu_mul":
            return silu_mul(*product.chunk(2, dim=1))
        return product if activation == "none" else relu_squared_(product)

    def ours(weight: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, scale, EPS)
        if name not in ("out", "down"):
            return small_product(normed, weight, activation)
        add_small_product(residual, normed, weight)
        return residual

    took, torch_took = graph_us(
        [partial(ours, w) for w in weights], [partial(torchs, w) for w in weights], at_least=8
    )
    row: Row = {"shape": shape, "product": name, "rows": rows, "us": took, "torch_us": torch_took}
    return row | {"used": str(serves(weights[0], activation))}


def experts_row(shape: str, rows: int) -> Row:
    """Routed experts, each kernel and all, and torch's grouped products with a gather before."""
    count, top_k, size, inner, gated = EXPERTS[shape]
    up = normal(count, 2 * inner if gated else inner, size) * size**-0.5
    down = normal(count, size, inner) * inner**-0.5
    x, live = normal(rows, size), torch.tensor([rows], dtype=torch.int32, device="cuda")
    weights, experts = torch.randn(rows, count, device="cuda").softmax(-1).topk(top_k)
    routes = sort_routes(experts, live, 0, count)
    ends, index = routes.offsets, routes.rows.long()
    hidden = routed_up(x, routes.rows, ends, up, gated=gated, spread=count)
    routed = routed_down(hidden, ends, down, spread=count)

    def whole() -> torch.Tensor:
        found = sort_routes(experts, live, 0, count)
        inside = routed_up(x, found.rows, found.offsets, up, gated=gated, spread=count)
        outside = routed_down(inside, found.offsets, down, spread=count)
        return sum_routed(outside, found.places, weights)

    def grouped() -> torch.Tensor:
        wide = F.grouped_mm(x.index_select(0, index), up.mT, offs=ends)
        inside = silu_mul(*wide.chunk(2, dim=1)) if gated else relu_squared_(wide)
        return F.grouped_mm(inside, down.mT, offs=ends)

    calls: dict[str, Call] = {
        "sort_us": lambda: sort_routes(experts, live, 0, count),
        "up_us": lambda: routed_up(x, routes.rows, ends, up, gated=gated, spread=count),
        "down_us": lambda: routed_down(hidden, ends, down, spread=count),
        "sum_us": lambda: sum_routed(routed, routes.places, weights),
        "all_us": whole,
        "grouped_us": grouped,
    }
    times = graph_us(*([call] for call in calls.values()), at_least=4)
    row: Row = {"shape": shape, "rows": rows}
    return row | dict(zip(calls, times, strict=True))


def show(rows: list[Row]) -> None:
    widths = {key: max(10, len(key)) for key in rows[0]}
    widths |= {"kernel": 18, "shape": 14} if "kernel" in widths else {"shape": 14}
    print("\n" + " ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values())
        print(" ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths.values(), strict=True)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    kernels = [kernel_row(case, rows) for case in cases() for rows in args.rows]
    show(kernels)
    feed_forward = [feed_forward_row(shape, rows) for shape in SHAPES for rows in args.rows]
    show(feed_forward)
    residual = [
        residual_row(shape, rows, inputs)
        for shape, (_, inner, heads, _) in SHAPES.items()
        for inputs in (heads * HEAD_DIM, inner)
        for rows in args.rows
    ]
    show(residual)
    products = [
        product_row(shape, *product, rows)
        for shape, listed in PRODUCTS.items()
        for product in listed
        for rows in ROW_CLASSES
    ]
    show(products)
    experts = [experts_row(shape, rows) for shape in EXPERTS for rows in args.rows]
    show(experts)
    print(machine())
    result = {"kernels": kernels, "feed_forward": feed_forward, "residual": residual}
    result |= {"products": products, "experts": experts}
    write_json(args.output, result)


if __name__ == "__main__":
    main()

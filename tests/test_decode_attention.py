"""The decode attention op equals a plain softmax over each request's own tokens."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.attention import SlotMirror
from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels import decode_attention, decode_attention_reference
from breakgraph.kernels.decode_attention import _kernels, require_decode_kernel
from breakgraph.memory import RequestTable, SlotAllocator


def make_inputs(
    lengths: list[int],
    *,
    kv_heads: int,
    groups: int,
    head_dim: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Requests on shuffled slots; what lies behind a request's end in its row is garbage."""
    draw = torch.Generator().manual_seed(seed)
    rows, slots = len(lengths), sum(lengths) + 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    table = torch.randint(0, slots, (rows + 3, context), generator=draw, dtype=torch.int32)
    request_rows = torch.randperm(rows + 3, generator=draw)[:rows]
    order = torch.randperm(slots - 1, generator=draw).to(torch.int32) + 1
    for row, mine in zip(request_rows.tolist(), order.split(lengths), strict=True):
        table[row, : len(mine)] = mine
    wide = normal(rows, kv_heads * (groups + 2), head_dim)
    return (
        wide[:, : kv_heads * groups],  # a view of wider rows, as a model's is
        normal(slots, kv_heads, head_dim),
        normal(slots, kv_heads, head_dim),
        table.to(device),
        request_rows.to(device),
        torch.tensor(lengths, device=device),
    )


def by_request(inputs: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    q, k_cache, v_cache, table, request_rows, seq_lens = inputs
    outs = []
    for i, (row, length) in enumerate(zip(request_rows, seq_lens.tolist(), strict=True)):
        slots = table[row, :length].long()
        keys, values = (cache[slots].float().transpose(0, 1) for cache in (k_cache, v_cache))
        outs.append(
            F.scaled_dot_product_attention(
                q[i].float().unsqueeze(1), keys, values, scale=scale, enable_gqa=True
            ).squeeze(1)
        )
    return torch.stack(outs)


def assert_op_is_right(inputs: tuple[torch.Tensor, ...], scale: float = 0.3) -> None:
    q = inputs[0]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    decode_attention(*inputs, scale, out)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[q.dtype]
    expected = by_request(inputs, scale).to(q.dtype)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    again = torch.empty_like(out)
    decode_attention_reference(*inputs, scale, again)
    torch.testing.assert_close(out, again, rtol=tolerance, atol=tolerance)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_any_shape(
    lengths: list[int], kv_heads: int, groups: int, head_dim: int, seed: int
) -> None:
    shape = {"kv_heads": kv_heads, "groups": groups, "head_dim": head_dim, "seed": seed}
    assert_op_is_right(make_inputs(lengths, context=53, **shape))


@pytest.mark.parametrize("reference", [False, True])
def test_a_captured_call_reads_lengths_rows_and_slots_at_replay(reference: bool) -> None:
    first, second = (
        make_inputs([5, 17, 1], kv_heads=2, groups=2, head_dim=8, context=20, seed=seed)
        for seed in (0, 1)
    )
    second[5].copy_(torch.tensor([17, 1, 5]))
    fixed = tuple(tensor.clone() for tensor in first)
    out, graph = torch.empty_like(fixed[0]), BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        (decode_attention_reference if reference else decode_attention)(*fixed, 0.5, out)
    for tensor, new in zip(fixed, second, strict=True):
        tensor.copy_(new)
    graph.pool().poison()
    graph.replay()
    torch.testing.assert_close(out, by_request(second, 0.5))


def test_nothing_behind_a_requests_end_is_read() -> None:
    inputs = make_inputs([4, 9], kv_heads=1, groups=2, head_dim=8, context=12)
    q, k_cache, v_cache, table, rows, lengths = inputs
    expected = by_request(inputs, 1.0)
    k_cache, v_cache = (
        torch.cat([cache, torch.full((1, 1, 8), float("nan"))]) for cache in (k_cache, v_cache)
    )
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        table[row, length:] = len(k_cache) - 1
    out = torch.empty_like(q)
    decode_attention(q, k_cache, v_cache, table, rows, lengths, 1.0, out)
    torch.testing.assert_close(out, expected)


def test_the_mirror_uploads_what_it_lacks_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = RequestTable(3, 32, SlotAllocator(64))
    mirror = SlotMirror(requests, 32, torch.device("cpu"))
    uploads: list[tuple[list[int], ...]] = []
    upload = mirror._upload

    def watched(*what: np.ndarray) -> None:
        uploads.append(tuple(each.tolist() for each in what))
        upload(*what)

    monkeypatch.setattr(mirror, "_upload", watched)

    def sync(*rows: int) -> None:
        mirror.sync(np.array(rows), requests.lengths[list(rows)])
        for row in rows:
            length = requests.lengths[row]
            assert mirror.slots[row, :length].tolist() == requests.slots(row).tolist()

    def append(row: int) -> None:  # what a captured step does
        at = requests.lengths[row]
        mirror.slots[row, at] = int(requests.extend(row, 1)[0])

    a, b = requests.acquire(), requests.acquire()
    requests.extend(a, 5)
    requests.extend(b, 3)
    sync(a, b)
    assert uploads.pop() == ([a, b], [0, 0], [5, 3])
    for _ in range(3):
        append(a)
        sync(a)
    assert not uploads
    append(b)
    requests.extend(b, 3)  # by the extend path, which appends nothing
    sync(b)
    assert uploads.pop() == ([b], [4], [7])
    requests.release(a)
    again = requests.acquire()
    requests.extend(again, 6)
    assert again == a
    sync(again)
    assert uploads.pop() == ([a], [0], [6])


def test_the_mirror_refuses_what_lies_outside_of_it() -> None:
    mirror = SlotMirror(RequestTable(3, 32, SlotAllocator(64)), 32, torch.device("cpu"))
    for rows, lengths in (([3], [1]), ([-1], [1]), ([0, 1], [1, 32])):
        with pytest.raises(ValueError, match="3 rows of 32 tokens"):
            mirror.sync(np.array(rows), np.array(lengths))


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton, or decode eagerly with --cuda"):
        require_decode_kernel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "groups"), [(128, 8, 4), (16, 1, 1), (80, 2, 7), (256, 1, 24)]
)
def test_kernel_equals_reference(
    dtype: torch.dtype, head_dim: int, kv_heads: int, groups: int
) -> None:
    shape = {"kv_heads": kv_heads, "groups": groups, "head_dim": head_dim}
    for lengths in ([1], [1, 2, 63, 64, 65, 300], [1000], [7] * 40):
        inputs = make_inputs(lengths, context=1003, dtype=dtype, device="cuda", **shape)
        assert_op_is_right(inputs, head_dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_over_long_contexts(dtype: torch.dtype) -> None:
    shape = {"kv_heads": 2, "groups": 4, "head_dim": 128, "dtype": dtype, "device": "cuda"}
    for lengths in ([40000], [16385, 3, 8192], [5000, 1] * 6):
        assert_op_is_right(make_inputs(lengths, context=40960, **shape), 128**-0.5)


@pytest.mark.gpu
def test_kernel_reads_nothing_behind_a_requests_end() -> None:
    inputs = make_inputs(
        [5, 130, 64], kv_heads=2, groups=2, head_dim=64, context=512, device="cuda"
    )
    q, k_cache, v_cache, table, rows, lengths = inputs
    expected = by_request(inputs, 1.0)
    nan = torch.full((1, 2, 64), float("nan"), device="cuda")
    k_cache, v_cache = torch.cat([k_cache, nan]), torch.cat([v_cache, nan])
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        table[row, length:] = len(k_cache) - 1
    out = torch.empty_like(q)
    decode_attention(q, k_cache, v_cache, table, rows, lengths, 1.0, out)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)

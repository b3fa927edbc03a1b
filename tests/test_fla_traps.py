"""What fla-core 0.6.0's public calls do that a graph cannot hold, and that ours do not.

An upgrade that mends one of them fails its test: then the launches in ``gated_delta_fla.py`` may
become public calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from breakgraph.kernels.gated_delta import gated_delta_rule

pytestmark = pytest.mark.gpu


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fla_keeps_the_chunks_of_a_tensor_that_was_refilled() -> None:
    index = pytest.importorskip("fla.ops.utils.index")
    cu_seqlens = torch.tensor([0, 64, 128], device="cuda", dtype=torch.int32)
    first = index.prepare_chunk_indices(cu_seqlens, 64).tolist()
    offsets = index.prepare_chunk_offsets(cu_seqlens, 64).tolist()
    cu_seqlens.copy_(torch.tensor([0, 1, 128]))
    right = torch.tensor([[0, 0], [1, 0], [1, 1]]).tolist()
    assert first == [[0, 0], [1, 0]]
    assert index.prepare_chunk_indices(cu_seqlens, 64).tolist() == first != right
    assert index.prepare_chunk_offsets(cu_seqlens, 64).tolist() == offsets == [0, 1, 2]
    assert index.prepare_chunk_indices(cu_seqlens.clone(), 64).tolist() == right


def test_fla_waits_for_the_device_at_a_new_cu_seqlens() -> None:
    chunk_simple_gla = pytest.importorskip("fla.ops.simple_gla").chunk_simple_gla
    q, k, v = (torch.randn(1, 128, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = -torch.rand(1, 128, 1, device="cuda")
    lengths = torch.tensor([0, 60, 128], device="cuda", dtype=torch.int32)

    def call(cu_seqlens: torch.Tensor) -> None:
        chunk_simple_gla(q, k, v, g, cu_seqlens=cu_seqlens)

    call(lengths)
    fresh = lengths.clone()
    with syncs_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        call(fresh)


def test_ours_does_not() -> None:
    pytest.importorskip("fla")
    q, k, v = (torch.randn(128, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    a, b = (torch.randn(128, 1, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a_log, dt_bias = (torch.zeros(1, device="cuda") for _ in range(2))
    state, out = torch.zeros(3, 1, 64, 64, device="cuda"), torch.empty_like(v)

    def plan(middle: int) -> list[torch.Tensor]:
        pairs = [[0, at] for at in range(-(-middle // 64))]
        count = len(pairs)
        pairs += [[1, at] for at in range(-(-(128 - middle) // 64))]
        arrays = ([0, middle, 128], [-1, -1], [1, 2], pairs, [0, count, len(pairs)])
        return [torch.tensor(array, device="cuda", dtype=torch.int32) for array in arrays]

    plans = [plan(64), plan(1)]
    call = (q, k, v, a, b, a_log, dt_bias, state)
    gated_delta_rule(*call, *plans[0], 64, out)
    with syncs_are_errors():
        for other in plans:
            gated_delta_rule(*call, *other, 64, out)
    for tensor, new in zip(plans[0], plan(64), strict=True):
        tensor.copy_(new)
    once = torch.empty_like(out)
    gated_delta_rule(*call, *plan(1), 64, once)
    assert torch.equal(once, out)

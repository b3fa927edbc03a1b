"""The latent decode op equals a plain softmax over each request's own latent rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from breakgraph.kernels import latent_decode
from breakgraph.kernels.latent_decode import latent_decode_attention_reference


def decode_operands(device: str = "cpu") -> list[Any]:
    """5 requests of 1 to 50 tokens of 48 heads, in a table of 64; unowned rows are NaN."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 50, 17, 33, 2])
    table = (torch.randperm(6 * 64, generator=generator) + 1).view(6, 64).int()
    latents = torch.full((6 * 64 + 1, 1, 144), float("nan"))
    rows = torch.tensor([4, 0, 5, 2, 1])
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        latents[table[row, :length].long()] = torch.randn(length, 1, 144, generator=generator)
    q = torch.randn(5, 48, 144, generator=generator)
    tensors = [q, latents, table, rows, lengths]
    out = torch.empty(5, 48, 128)
    return [tensor.to(device) for tensor in tensors] + [0.1, out.to(device)]


def expected_decode(operands: list[Any]) -> torch.Tensor:
    q, latents, table, rows, lengths, scale, _ = operands
    found = []
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        keys = latents[table[row, :length].long(), 0]
        found.append(((q[i] @ keys.T) * scale).softmax(-1) @ keys[:, :128])
    return torch.stack(found)


@pytest.mark.parametrize("chunk_rows", [1, 15, 1 << 15])
def test_decode_reads_its_own_rows_in_any_chunks(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_decode, "CHUNK_ROWS", chunk_rows)
    operands = decode_operands()
    operands[1][0] = float("nan")  # the reserved slot
    latent_decode_attention_reference(*operands)
    torch.testing.assert_close(operands[-1], expected_decode(operands), atol=1e-5, rtol=1e-5)
    operands[-1].zero_()
    torch.ops.breakgraph.latent_decode_attention(*operands)
    torch.testing.assert_close(operands[-1], expected_decode(operands), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("heads", "row_dim", "rank"), [(128, 576, 512), (16, 576, 512), (20, 48, 40)]
)
def test_the_decode_kernel_equals_its_reference_when_replayed(
    heads: int, row_dim: int, rank: int, rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    how = {"device": "cuda", "generator": generator}
    q = torch.randn(rows, heads, row_dim, **how).to(dtype)
    latents = torch.randn(8 * 2048 + 1, 1, row_dim, **how).to(dtype)
    table = (torch.randperm(8 * 2048, **how) + 1).view(8, 2048).int()
    where = torch.randperm(8, **how)[:rows]
    lengths = torch.ones(rows, dtype=torch.int64, device="cuda")
    out = torch.empty(rows, heads, rank, dtype=dtype, device="cuda")
    operands = (q, latents, table, where, lengths, row_dim**-0.5)
    torch.ops.breakgraph.latent_decode_attention(*operands, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.breakgraph.latent_decode_attention(*operands, out)
    for longest in (1, 17, 33, 700, 2048):
        lengths.random_(1, longest + 1, generator=generator)
        lengths[0] = longest
        expected = torch.empty_like(out)
        latent_decode_attention_reference(*operands, expected)
        out.fill_(float("nan"))
        graph.replay()
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)

"""The tiled kernel gives what the reference gives, captured once for every later batch.

On a CPU its op is a reference that goes through the same table, tile by tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_support import (
    BATCHES,
    CPU,
    DEVICES,
    Lengths,
    assert_close,
    check_one_capture_serves_all,
    make_batch,
    make_inputs,
    make_layer,
    reference,
    store,
)
from hypothesis import given
from hypothesis import strategies as st

from breakgraph.attention import (
    Attention,
    ByRowsBackend,
    FlashInferBackend,
    TiledBackend,
    TorchFlashBackend,
)
from breakgraph.kernels.tiled_attention import rows_of_tile


def make_backend(layer: Attention, **how: Any) -> TiledBackend:
    how = {"max_requests": 8, "max_context_tokens": 2048, "max_new_tokens": 768} | how
    how = {"static": True} | how
    return TiledBackend(layer, device=layer.k_cache.device, **how)


def check(layer: Attention, lengths: Lengths, *, in_place: bool = False, **how: Any) -> None:
    batch = make_batch(lengths)
    q, k, v = make_inputs(layer, batch, padding=11)
    wanted = reference(layer, batch, q, k, v)
    backend, out = make_backend(layer, **how), torch.full_like(q, 7.0)
    if in_place:
        out, before = q, q.clone()
    backend.init_forward_metadata(batch, len(q))
    backend.forward(layer, q, k, v, out)
    assert_close(out[: batch.num_tokens], wanted)
    padding = out[batch.num_tokens :]
    assert torch.equal(padding, before[batch.num_tokens :] if in_place else padding * 0 + 7)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_any_batch_gives_what_the_reference_gives(device: str, lengths: Lengths) -> None:
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16)
    for in_place in (False, True):
        check(layer, lengths, in_place=in_place)
        check(layer, lengths, in_place=in_place, static=False, max_context_tokens=4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_see_later_ones_are_read_in_rows(
    device: str, heads: tuple[int, int], static: bool
) -> None:
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16, *heads)
    layer.right = None
    batch = make_batch([(5, 0), (200, 0), (1, 0), (64, 0), (70, 0)])
    q, k, v = make_inputs(layer, batch, padding=11)
    layer.k_cache.fill_(float("nan"))
    layer.v_cache.fill_(float("nan"))
    backend, out = make_backend(layer, static=static), torch.full_like(q, 7.0)
    backend.init_forward_metadata(batch, len(q))
    backend.forward(layer, q, k, v, out)
    wanted = []
    for rows in torch.arange(batch.num_tokens).split(batch.extend_lens.tolist()):
        own = [one[rows].float().transpose(0, 1)[None] for one in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*own, scale=layer.scale, enable_gqa=True)
        wanted.append(mixed[0].transpose(0, 1))
    assert_close(out[: batch.num_tokens], torch.cat(wanted))
    assert (out[batch.num_tokens :] == 7.0).all()


def test_short_sequences_stay_with_few_whatever_their_rows() -> None:
    layer = make_layer("cpu", torch.float32)
    many = TorchFlashBackend(device=CPU, max_requests=8, max_context_tokens=64)
    backend = ByRowsBackend(make_backend(layer, static=False), many, 96, short=40)
    for lengths, planned in (([(40, 0)] * 5, backend.few), ([(41, 0)] * 5, many)):
        batch = make_batch(lengths)
        backend.init_forward_metadata(batch)
        assert backend._planned is planned


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (14, 2), (8, 1)], ids=str)
def test_every_shape_of_heads(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    layer = make_layer("cuda", dtype, *heads, head_dim)
    layer.scale *= 0.7
    for lengths in (BATCHES["prefixes"], BATCHES["many, no prefix"]):
        check(layer, lengths)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_call_captured_once_serves_every_later_batch(device: str, in_place: bool) -> None:
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16)
    check_one_capture_serves_all(layer, make_backend(layer), 768, in_place=in_place)


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_request_and_in_padding(device: str) -> None:
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16)
    batch = make_batch([(70, 0), (90, 0), (5, 0)])
    qkv = make_inputs(layer, batch, padding=60)
    wanted = reference(layer, batch, *qkv)
    bad = torch.zeros(len(qkv[0]), dtype=torch.bool, device=device)
    bad[70:160] = bad[batch.num_tokens :] = True
    for tensor in qkv:
        tensor[bad] = float("nan")
    store(layer, batch, *qkv[1:])
    backend, out = make_backend(layer), torch.zeros_like(qkv[0])
    backend.init_forward_metadata(batch)
    backend.forward(layer, *qkv, out)
    assert not out[batch.num_tokens :].any()
    assert_close(out[~bad], wanted[~bad[: batch.num_tokens]])


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 50)), min_size=1, max_size=8),
    st.sampled_from([(8, 8), (8, 2), (12, 2), (64, 1)]),
)
def test_every_token_lies_in_one_tile_that_sees_its_keys(
    lengths: Lengths, heads: tuple[int, int]
) -> None:
    batch = make_batch(lengths)
    backend = make_backend(make_layer("cpu", torch.float32, *heads, 8))
    backend.init_forward_metadata(make_batch([(300, 0)]))  # what it leaves is no tile of the next
    backend.init_forward_metadata(batch)
    tiles = backend._tiles.T.tolist()
    keys = np.cumsum(batch.extend_lens + batch.prefix_lens) - batch.extend_lens - batch.prefix_lens
    rows = np.cumsum(batch.extend_lens) - batch.extend_lens
    size = rows_of_tile(*heads)
    wanted = [
        [rows[r] + at, min(size, new - at), keys[r], prefix + at + 1]
        for r, (new, prefix) in enumerate(lengths)
        for at in range(0, new, size)
    ]
    assert tiles[: len(wanted)] == wanted
    assert not any(count for _, count, _, _ in tiles[len(wanted) :])


def test_what_there_is_no_room_for_is_refused() -> None:
    backend = make_backend(make_layer("cpu", torch.float32), max_requests=2, max_context_tokens=64)
    for lengths in ([(1, 0)] * 3, [(20, 40), (5, 0)]):
        with pytest.raises(ValueError, match="do not fit the 2 and 64"):
            backend.init_forward_metadata(make_batch(lengths))


def test_rows_say_who_attends_whatever_the_tokens() -> None:
    layer = make_layer("cpu", torch.float32)
    few = make_backend(layer)
    many = FlashInferBackend(
        layer,
        torch.float32,
        device=CPU,
        max_requests=8,
        max_context_tokens=2048,
        max_new_tokens=1024,
        static=True,
    )
    backend = ByRowsBackend(few, many, 96)
    assert backend.serves_prefixes and backend.max_requests == 8
    for bucket in (96, 768):
        check_one_capture_serves_all(layer, backend, bucket, in_place=True)


def test_more_padding_than_was_planned_changes_nothing() -> None:
    layer, batch = make_layer("cpu", torch.float32), make_batch([(40, 3), (50, 0)])
    few = make_backend(layer, static=False)
    many = TorchFlashBackend(device=CPU, max_requests=8, max_context_tokens=64)
    backend = ByRowsBackend(few, many, 96)
    q, k, v = make_inputs(layer, batch, padding=110)
    wanted, out = reference(layer, batch, q, k, v), torch.zeros_like(q)
    backend.init_forward_metadata(batch)
    backend.forward(layer, q, k, v, out)
    assert_close(out[: batch.num_tokens], wanted)
    assert not out[batch.num_tokens :].any()


def test_where_the_other_finds_no_prefix_graphs_serve_none() -> None:
    layer = make_layer("cpu", torch.float32)
    flash = TorchFlashBackend(device=CPU, max_requests=8, max_context_tokens=64, static=True)
    backend = ByRowsBackend(make_backend(layer), flash, 96)
    assert backend.refuses(make_batch([(5, 9)])) == "cached_prefix_in_full_graph"
    assert backend.refuses(make_batch([(5, 0)])) is None

"""Attention by FlashInfer gives what the reference gives, whatever the batch and wherever it lies.

On a CPU its op is a reference that goes through the same schedule, block by block.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_support import (
    BATCHES,
    CPU,
    DEVICES,
    SLOTS,
    Lengths,
    assert_close,
    check_one_capture_serves_all,
    make_batch,
    make_inputs,
    make_layer,
    reference,
    store,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import make_reference, poison, save_checkpoint

from breakgraph.attention import Attention, FlashInferBackend, TorchFlashBackend, TorchNativeBackend
from breakgraph.attention import flashinfer as flashinfer_module
from breakgraph.attention.flashinfer import unserved
from breakgraph.attention.tile_schedule import (
    ScheduleLayout,
    count_tiles,
    most_works,
    write_key_slots,
    write_schedule,
)
from breakgraph.forward import ForwardBatch
from breakgraph.kernels import flashinfer_prefill
from breakgraph.runner import DispatchReason, ModelRunner
from breakgraph.runner.backends import flashinfer_backend
from breakgraph.server_args import ServerArgs


def make_backend(layer: Attention, **how: Any) -> FlashInferBackend:
    how = {"max_requests": 8, "max_context_tokens": 2048} | how
    return FlashInferBackend(layer, layer.k_cache.dtype, device=layer.k_cache.device, **how)


def check(layer: Attention, lengths: Lengths, padding: int = 0) -> None:
    batch = make_batch(lengths)
    qkv = make_inputs(layer, batch, padding)
    backend, out = make_backend(layer), torch.full_like(qkv[0], 7.0)
    backend.init_forward_metadata(batch)
    backend.forward(layer, *qkv, out)
    assert_close(out[: batch.num_tokens], reference(layer, batch, *qkv))
    assert (out[batch.num_tokens :] == 7.0).all(), "a padded row was written"


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_any_batch_gives_what_the_reference_gives(device: str, lengths: Lengths) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    check(make_layer(device, dtype), lengths, padding=11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (4, 1), (8, 1)], ids=str)
def test_every_shape_of_heads(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    layer = make_layer("cuda", dtype, *heads, head_dim)
    layer.scale *= 0.7
    for lengths in (BATCHES["prefixes"], BATCHES["many, no prefix"]):
        check(layer, lengths, padding=3)


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_call_captured_once_serves_every_later_batch(
    device: str, in_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_module, "IN_ROWS", 768 if in_rows else 769)
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16)
    backend = make_backend(layer, static=True, max_context_tokens=1600)
    assert backend.capturable and backend.max_requests == 8
    check_one_capture_serves_all(layer, backend, 768, in_place=in_rows)


def test_what_a_capture_is_given_follows_from_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_module, "IN_ROWS", 64)
    backend = make_backend(make_layer("cpu", torch.float32), static=True)
    plans = []
    for lengths, rows in (([(5, 0)], 16), ([(3, 9), (2, 0)], 48), ([(5, 0)], 64), ([(40, 8)], 96)):
        backend.init_forward_metadata(make_batch(lengths), rows)
        plans.append(backend._plan)
    assert plans[0] is plans[1] is not plans[2] is plans[3]


def test_a_static_plan_refuses_what_it_has_no_room_for() -> None:
    layer = make_layer("cpu", torch.float32)
    backend = make_backend(
        layer, static=True, max_requests=2, max_context_tokens=64, max_new_tokens=32
    )
    for lengths, said in (
        ([(1, 0)] * 3, "3 requests do not fit the 2"),
        ([(33, 0)], "33 new tokens do not fit the 32"),
        ([(20, 40), (5, 0)], "65 tokens with their prefixes do not fit the 64"),
    ):
        with pytest.raises(ValueError, match=said):
            backend.init_forward_metadata(make_batch(lengths))
    backend.init_forward_metadata(make_batch([(31, 32), (1, 0)]))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [[(70, 0), (90, 0), (5, 0)], [(150, 0)]], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_request_and_in_padding(
    device: str, lengths: Lengths, static: bool
) -> None:
    layer = make_layer(device, torch.float32 if device == "cpu" else torch.bfloat16)
    batch = make_batch(lengths)
    qkv = make_inputs(layer, batch, padding=60)
    wanted = reference(layer, batch, *qkv)
    bad = torch.zeros(len(qkv[0]), dtype=torch.bool, device=device)
    bad[70:160] = len(lengths) > 1
    bad[batch.num_tokens :] = True
    for tensor in qkv:
        tensor[bad] = float("nan")
    store(layer, batch, *qkv[1:])
    backend, out = make_backend(layer, static=static), torch.zeros_like(qkv[0])
    backend.init_forward_metadata(batch)
    backend.forward(layer, *qkv, out)
    assert not out[batch.num_tokens :].any()
    assert_close(out[~bad], wanted[~bad[: batch.num_tokens]])


def test_attention_before_a_plan_is_one_clear_error() -> None:
    layer = make_layer("cpu", torch.float32)
    q = torch.zeros(1, 8, 64)
    with pytest.raises(RuntimeError, match="before init_forward_metadata"):
        make_backend(layer).forward(layer, q, q, q, q)


lengths_of_requests = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 50)), min_size=1, max_size=9
)


@given(lengths_of_requests, st.integers(1, 5), st.integers(1, 7), st.integers(0, 3))
def test_every_tile_of_every_head_is_dealt_once(
    lengths: Lengths, heads: int, processors: int, spare: int
) -> None:
    batch, tile = make_batch(lengths), 16
    tiles = count_tiles(batch.extend_lens, tile)
    works = int(tiles.sum()) * heads
    assert works <= most_works(batch.num_tokens, batch.batch_size, tile, heads)
    layout = ScheduleLayout(processors, works + spare)
    into = np.full(layout.keys_start, -1, np.int32)
    key_lens = batch.extend_lens + batch.prefix_lens
    write_schedule(batch, key_lens, tiles, tile, heads, layout, into)
    (ends, table), starts = layout.split(into), np.cumsum(key_lens) - key_lens
    assert ends[0] == 0 and ends[-1] == works and (np.diff(ends) >= 0).all()
    assert np.diff(ends).max() - np.diff(ends).min() <= 1
    queries = np.cumsum(batch.extend_lens) - batch.extend_lens
    wanted = {
        (t, queries[r], starts[r], new, new + prefix, head)
        for r, (new, prefix) in enumerate(lengths)
        for t in range(-(-new // tile))
        for head in range(heads)
    }
    dealt = [tuple(work) for work in table[:, :works].T.tolist()]
    assert len(dealt) == works and set(dealt) == wanted
    costs = np.minimum((table[0] + 1) * tile, table[3]) + table[4] - table[3]
    for begin, end in pairwise(ends):
        assert (np.diff(costs[begin:end]) <= 0).all(), "dear works come first"


@pytest.mark.parametrize(
    "lengths", [[(4096, 0)], [(1024, 0)] * 8, [(3000, 900), (70, 0), (500, 0)]]
)
def test_no_processor_has_much_more_to_do_than_another(lengths: Lengths) -> None:
    batch, tile, heads = (
        ForwardBatch.from_requests(
            [[0] * new for new, _ in lengths],
            [range(new) for new, _ in lengths],
            [range(prefix) for _, prefix in lengths],
        ),
        128,
        32,
    )
    tiles = count_tiles(batch.extend_lens, tile)
    layout = ScheduleLayout(132, int(tiles.sum()) * heads)
    into = np.zeros(layout.keys_start, np.int32)
    key_lens = batch.extend_lens + batch.prefix_lens
    write_schedule(batch, key_lens, tiles, tile, heads, layout, into)
    ends, table = layout.split(into)
    costs = np.minimum((table[0] + 1) * tile, table[3]) + table[4] - table[3] + 2 * tile
    shares = np.add.reduceat(costs, ends[:-1])
    assert shares.max() <= max(1.04 * shares.mean(), costs.max())


@given(lengths_of_requests)
def test_key_slots_are_each_requests_prefix_then_its_new_tokens(lengths: Lengths) -> None:
    batch = make_batch(lengths)
    into = np.full(sum(map(sum, lengths)), -1, np.int32)
    write_key_slots(batch, into)
    prefixes = np.split(batch.prefix_slots, np.cumsum(batch.prefix_lens)[:-1])
    news = np.split(batch.out_cache_loc, np.cumsum(batch.extend_lens)[:-1])
    wanted = np.concatenate([slots for pair in zip(prefixes, news, strict=True) for slots in pair])
    assert into.tolist() == wanted.tolist()
    other = TorchFlashBackend(device=CPU, max_requests=9, max_context_tokens=8)
    other.init_forward_metadata(batch)
    plan = other._plan
    assert plan is not None and (plan.key_slots is not None) == batch.has_prefix
    if plan.key_slots is not None:
        assert plan.key_slots.tolist() == wanted.tolist()
        assert plan.cu_seqlens_k[-1] == len(wanted)


@given(lengths_of_requests, st.integers(0, 99))
@settings(max_examples=25)
def test_any_batch_on_the_cpu(lengths: Lengths, seed: int) -> None:
    layer = make_layer("cpu", torch.float32, heads=3, kv_heads=1, head_dim=8)
    batch = make_batch(lengths, seed)
    qkv = make_inputs(layer, batch)
    backend, out = make_backend(layer, max_context_tokens=4), torch.empty_like(qkv[0])
    backend.init_forward_metadata(batch)
    backend.forward(layer, *qkv, out)
    assert_close(out, reference(layer, batch, *qkv))


def pretend(monkeypatch: pytest.MonkeyPatch, missing: str | None = None) -> None:
    monkeypatch.setattr(flashinfer_module, "missing_for", lambda device: missing)


def an_attention(**fields: Any) -> Attention:
    layer = Attention(num_heads=8, num_kv_heads=2, head_dim=fields.pop("head_dim", 128))
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("layers", "dtype", "said"),
    [
        ([an_attention()], torch.float32, "--dtype bfloat16"),
        ([an_attention(head_dim=96)], torch.bfloat16, "heads of 96"),
        ([an_attention(), an_attention(head_dim=64)], torch.bfloat16, "differ in their heads"),
        ([an_attention(), an_attention(left=511)], torch.bfloat16, "windows"),
        ([an_attention(right=None)], torch.bfloat16, "see later ones"),
        ([an_attention(limits=("soft cap",))], torch.bfloat16, "soft cap"),
    ],
)
def test_what_it_does_not_serve_is_named(
    layers: list[Attention], dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    assert unserved([an_attention()], torch.float16, CPU) is None
    assert said in str(unserved(layers, dtype, CPU))
    with pytest.raises(ValueError, match=f"--attention-backend flashinfer: .*{said}.*auto"):
        flashinfer_backend(layers, dtype, CPU, 4, 64, asked=True)
    assert flashinfer_backend(layers, dtype, CPU, 4, 64, asked=False) is None


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, version: str | None) -> str | None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def installed(name: str) -> str:
        if version is None:
            raise flashinfer_prefill.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(flashinfer_prefill.importlib.metadata, "version", installed)
    return flashinfer_prefill.missing_for(torch.device("cuda"))


def test_a_machine_without_the_kernels_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "need a GPU" in str(flashinfer_prefill.missing_for(CPU))
    for capability, version, said in (
        (8, flashinfer_prefill.VERSION, "needs a Hopper GPU"),
        (10, flashinfer_prefill.VERSION, "this is a GPU"),
        (9, None, "pip install 'breakgraph[flashinfer]'"),
        (9, "0.7.0", "flashinfer-python 0.7.0 is installed"),
    ):
        assert said in str(on_gpu(monkeypatch, capability, version))
    assert on_gpu(monkeypatch, 9, flashinfer_prefill.VERSION) is None


def test_kernels_that_cannot_be_compiled_leave_auto_to_another_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch)

    def fail(*how: Any, **room: Any) -> None:
        raise RuntimeError("FlashInfer's kernels cannot be had: no nvcc")

    monkeypatch.setattr("breakgraph.runner.backends.FlashInferBackend", fail)
    place = ([an_attention()], torch.bfloat16, CPU, 4, 64)
    assert flashinfer_backend(*place, asked=False) is None
    assert "no nvcc" in caplog.text
    with pytest.raises(ValueError, match="no nvcc"):
        flashinfer_backend(*place, asked=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_compile_is_told_with_where_its_result_lies(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = SimpleNamespace(
        is_compiled=compiled,
        get_library_path=lambda: Path("/cache/fa3/fa3.so"),
        build_and_load=lambda: "module",
    )
    jit = SimpleNamespace(gen_batch_prefill_module=lambda *how: spec)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(jit=jit))
    monkeypatch.setitem(sys.modules, "flashinfer.jit", jit)
    with caplog.at_level("INFO"):
        loaded = flashinfer_prefill.kernel_module.__wrapped__(torch.bfloat16, 128)
    assert loaded == "module"
    assert ("bfloat16 heads of 128" in caplog.text) is not compiled
    assert ("/cache/fa3" in caplog.text) is not compiled


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=64, max_position_embeddings=512)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


def make_runner(checkpoint: Path, **flags: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": (64, 512),
        "chunked_prefill_size": 512,
        "max_total_tokens": SLOTS,
        "prefill_dispatch": "always",
        "disable_cuda_graph": True,
    }
    return ModelRunner(ServerArgs(model_path=str(checkpoint), **(settings | flags)))


def test_asking_for_it_on_a_cpu_is_one_clear_error(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, device="cpu", max_total_tokens=512)
    assert isinstance(runner.attn_backend, TorchNativeBackend)
    with pytest.raises(ValueError, match="flashinfer needs a GPU"):
        make_runner(checkpoint, device="cpu", attention_backend="flashinfer")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_replay_equals_an_eager_forward(checkpoint: Path, page_size: int) -> None:
    flags = {"dtype": "bfloat16", "device": "cuda", "page_size": page_size}
    runner = make_runner(checkpoint, attention_backend="flashinfer", **flags)
    other = make_runner(checkpoint, attention_backend="torch_flash", **flags)
    assert isinstance(runner.attn_backend, FlashInferBackend)
    assert isinstance(other.attn_backend, TorchFlashBackend)
    for lengths in ([(64, 0)], [(512, 0)], [(200, 0), (1, 30), (250, 111)], [(9, 9)] * 6):
        batch = make_batch(lengths)
        eager = runner.forward(batch, allow_graph=False).next_token_logits
        poison(runner)
        result = runner.forward(batch)
        assert result.dispatch.reason is DispatchReason.REPLAYED
        assert eager is not None and result.next_token_logits is not None
        if result.dispatch.bucket == batch.num_tokens:
            assert torch.equal(result.next_token_logits, eager)
        torch.testing.assert_close(result.next_token_logits, eager, rtol=2e-2, atol=0.15)
        if not batch.has_prefix:
            flash = other.forward(batch).next_token_logits
            torch.testing.assert_close(result.next_token_logits, flash, rtol=5e-2, atol=0.3)


@pytest.mark.gpu
def test_auto_takes_it_where_it_is_installed(checkpoint: Path) -> None:
    if flashinfer_prefill.missing_for(torch.device("cuda")):
        pytest.skip("flashinfer is not installed, or the GPU is no Hopper")
    runner = make_runner(checkpoint, device="cuda", dtype="bfloat16")
    assert runner.attn_backend.name.endswith("else FlashInferBackend")

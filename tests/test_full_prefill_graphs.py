"""Full prefill graphs give what eager gives; what they cannot hold runs otherwise, and is said."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hybrid_support import Requests, make_hybrid_runner, outcomes, save_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_support import make_deepseek
from models_support import make_noise, make_reference, poison, random_prompts, save_checkpoint
from prefill_support import (
    AUTO,
    BUCKETS,
    FULL,
    REQUEST_SLOTS,
    assert_replay_equals_eager,
    make_batch,
    make_runner,
    plain,
)
from test_hybrid_graphs import assert_same_outcome

from breakgraph.attention import Attention, TorchFlashBackend, TorchNativeBackend
from breakgraph.forward import LayerInputs, get_forward_context
from breakgraph.graph import RefusedOpError
from breakgraph.runner import DispatchReason, GraphCaptureError, ModelRunner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16, max_position_embeddings=192)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def runner(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ModelRunner]:
    flags = {} if request.param == "cpu" else {"attention_backend": "torch_flash"}
    runner = make_runner(checkpoint, request.param, **FULL, **flags)
    make_noise(runner)
    yield runner
    del runner


@pytest.fixture(scope="module")
def auto(checkpoint: Path) -> ModelRunner:
    return make_runner(checkpoint, "cpu", **AUTO)


# What a full graph gives.


@st.composite
def few_requests(draw: st.DrawFn) -> list[int]:
    count = draw(st.integers(1, REQUEST_SLOTS))
    return [draw(st.integers(1, BUCKETS[-1] // count)) for _ in range(count)]


@given(lengths=few_requests(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_replay_equals_eager_for_any_batch_within_the_slots(
    runner: ModelRunner, lengths: list[int], seed: int
) -> None:
    batch = plain(lengths, seed)
    if runner.dispatch(batch).bucket is not None:
        assert_replay_equals_eager(runner, batch)


def test_every_shape_within_the_slots_of_a_small_bucket(runner: ModelRunner) -> None:
    """All counts of requests and all lengths, their order included; 16 tokens or fewer."""
    sizes = (1, 2, 3, 5, 7)
    shapes = [
        list(shape)
        for count in range(1, REQUEST_SLOTS + 1)
        for shape in product(sizes, repeat=count)
        if sum(shape) <= BUCKETS[0]
    ]
    assert len(shapes) > 250
    for seed, shape in enumerate(shapes):
        assert_replay_equals_eager(runner, plain(shape, seed))


def test_a_prefill_is_one_launch(runner: ModelRunner) -> None:
    result = runner.forward(plain([20, 3]))
    assert result.graph is not None
    assert (result.graph.num_segments, result.graph.num_breaks) == (1, 0)
    assert result.dispatch.kind == "full"
    said = runner.explain(plain([20, 3]))
    assert "of the full graphs" in said and "full graphs has 1 segments and 0 breaks" in said


def test_interleaved_shapes_do_not_disturb_each_other(runner: ModelRunner) -> None:
    for seed, shape in enumerate([[60], [5] * 3, [128], [1] * 4, [30, 2], [16], [1]] * 2):
        assert_replay_equals_eager(runner, plain(shape, seed))


def test_what_a_larger_batch_left_in_the_slots_is_not_seen(runner: ModelRunner) -> None:
    expected = runner.forward(plain([11])).next_token_logits
    runner.forward(plain([30, 20, 40, 30], seed=5))
    assert torch.equal(runner.forward(plain([11])).next_token_logits, expected)


def test_padded_rows_stay_finite_whatever_the_pool_held(runner: ModelRunner) -> None:
    graphs = runner.full_graph_runner
    assert graphs is not None
    poison(runner)
    for cache in runner.kv_pool.tensors():
        cache[0] = 0
    runner.forward(plain([9, 8]))
    assert graphs._outputs[32].isfinite().all()
    assert all(cache[0].isfinite().all() for cache in runner.kv_pool.tensors())


@pytest.mark.parametrize("left", [None, 3])
@pytest.mark.parametrize("right", [0, None, 2])
def test_the_static_plan_of_flash_attention_keeps_to_each_sequence(
    left: int | None, right: int | None
) -> None:
    """On a CPU its op is the reference, which is compared with a request at a time here."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2))
    layer = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
    layer.left, layer.right = left, right
    backend = TorchFlashBackend(
        device=torch.device("cpu"), max_requests=REQUEST_SLOTS, max_context_tokens=0, static=True
    )
    backend.init_forward_metadata(plain([5, 1, 9]))
    rows = torch.arange(20)
    backend.begin_layers(LayerInputs(q.flatten(1), rows, rows, rows[:1]))
    out = torch.full_like(q, float("nan"))
    backend.forward(layer, q, k, v, out)
    assert torch.equal(out[15:], torch.zeros(5, 4, 8))
    for begin, end in ((0, 5), (5, 6), (6, 15)):
        before = torch.arange(end - begin).unsqueeze(1) - torch.arange(end - begin)
        seen = before >= (-right if right is not None else -99)
        seen &= before <= (left if left is not None else 99)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end].repeat_interleave(2, 1))
        weights = (scores * layer.scale).masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[begin:end].repeat_interleave(2, 1))
        torch.testing.assert_close(out[begin:end], expected)


def test_attention_with_frozen_lengths_is_still_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager_plan(
        self: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: torch.Tensor
    ) -> torch.Tensor:
        backend = TorchNativeBackend(q.device)
        backend.init_forward_metadata(get_forward_context().batch)
        out = torch.zeros_like(q)
        backend.forward(self, q, k, v, out)
        return out

    monkeypatch.setattr(Attention, "attend", eager_plan)
    with pytest.raises(GraphCaptureError, match="128-token") as error:
        make_runner(checkpoint, "cpu", **FULL)
    assert isinstance(error.value.__cause__, RefusedOpError)
    # With graphs of another kind to fall back on it is no error, unless it is to be one.
    with pytest.raises(GraphCaptureError):
        make_runner(checkpoint, "cpu", **AUTO, cuda_graph_failure="error")


# What it cannot hold.


def test_more_requests_than_slots_run_eagerly_and_it_is_said(runner: ModelRunner) -> None:
    batch = plain([3] * (REQUEST_SLOTS + 1))
    before = runner.dispatch_counts[DispatchReason.TOO_MANY_FOR_SLOTS]
    result = runner.forward(batch)
    assert (result.dispatch.bucket, result.graph) == (None, None)
    assert result.dispatch.reason is DispatchReason.TOO_MANY_FOR_SLOTS
    assert runner.dispatch_counts[DispatchReason.TOO_MANY_FOR_SLOTS] == before + 1
    said = runner.explain(batch)
    assert "run eagerly: its graphs have 4 request slots" in said
    assert "--prefill-graph-requests" in said


def test_cached_prefixes_run_eagerly_and_it_is_said(runner: ModelRunner) -> None:
    batch = make_batch([(20, 0), (7, 5)])
    result = runner.forward(batch)
    assert result.dispatch.reason is DispatchReason.PREFIX
    assert "--cuda-graph-backend-prefill auto" in runner.explain(batch)
    eager = runner.forward(batch, allow_graph=False).next_token_logits
    assert torch.equal(result.next_token_logits, eager)


def test_auto_replays_in_breakable_graphs_what_full_ones_cannot_hold(auto: ModelRunner) -> None:
    for batch, kind, said in (
        (plain([20, 3]), "full", "in bucket 32 (9 rows of padding) of the full graphs"),
        (plain([3] * 5), "breakable", "not full: its graphs have 4 request slots"),
        (make_batch([(7, 5)]), "breakable", "not full: some are behind a cached prefix"),
    ):
        assert_replay_equals_eager(auto, batch)
        dispatch = auto.dispatch(batch)
        assert dispatch.kind == kind and said in dispatch.describe()
    # A full bucket that is out of service leaves the breakable one.
    assert auto.full_graph_runner is not None
    auto.full_graph_runner.retire(64)
    try:
        assert_replay_equals_eager(auto, plain([50]))
        assert "not full: bucket 64 is out of service" in auto.explain(plain([50]))
    finally:
        auto.full_graph_runner.out_of_service.clear()


def test_graphs_of_both_kinds_share_one_pool_and_one_output(auto: ModelRunner) -> None:
    assert auto.full_graph_runner is not None and auto.graph_runner is not None
    assert auto.full_graph_runner.pool is auto.graph_runner.pool
    assert auto.full_graph_runner._output is auto.graph_runner._output
    for batch in (plain([60]), plain([12] * 5), plain([20, 9]), make_batch([(20, 9)])):
        assert_replay_equals_eager(auto, batch)


def test_latent_attention_has_no_full_graphs(tmp_path: Path) -> None:
    folder = save_checkpoint(make_deepseek("v2-lite"), tmp_path)
    with pytest.raises(ValueError, match="no plan that graphs can hold; use breakable, or auto"):
        make_runner(folder, "cpu", **FULL, piecewise_cuda_graph_tokens=(16,))
    runner = make_runner(folder, "cpu", **AUTO, piecewise_cuda_graph_tokens=(16,))
    assert runner.full_graph_runner is None and runner.graph_runner is not None


# Hybrids.


@pytest.fixture(scope="module", params=["nemotron_h", "qwen3_next"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = save_hybrid(request.param, tmp_path_factory.mktemp(request.param))
    runner = make_hybrid_runner(folder, **AUTO, piecewise_cuda_graph_tokens=(16, 64, 160))
    make_noise(runner)
    return runner


@pytest.mark.parametrize(
    "lengths", [(1,), (63,), (65, 64), (1, 2, 3, 4), (16,), (1, 65, 64, 30)], ids=str
)
def test_a_hybrid_is_one_segment_and_leaves_the_states_that_eager_leaves(
    hybrid: ModelRunner, lengths: tuple[int, ...]
) -> None:
    with Requests(hybrid) as requests:
        rows = requests.open(len(lengths))
        batch = requests.batch(rows, random_prompts(lengths))
        full, eager = outcomes(hybrid, [(batch, {}), (batch, {"allow_graph": False})])
        assert full.result.dispatch.kind == "full" and full.result.graph is not None
        assert (full.result.graph.num_segments, full.result.graph.num_breaks) == (1, 0)
        torch.testing.assert_close(full.logits, eager.logits, rtol=1e-5, atol=2e-4)
        for one, other in zip(full.states, eager.states, strict=True):
            torch.testing.assert_close(one[rows], other[rows], rtol=1e-5, atol=2e-4)


def test_a_hybrid_with_more_requests_or_a_prefix_takes_the_breaks(hybrid: ModelRunner) -> None:
    with Requests(hybrid) as requests:
        for lengths, prefixes in (([3] * 5, [0] * 5), ([9, 4], [0, 7])):
            rows = requests.open(len(lengths), prefixes)
            batch = requests.batch(rows, random_prompts(lengths))
            graph, eager = outcomes(hybrid, [(batch, {}), (batch, {"allow_graph": False})])
            assert graph.result.dispatch.kind == "breakable"
            torch.testing.assert_close(graph.logits, eager.logits, rtol=1e-5, atol=2e-4)
            requests.close()


# Other ways to run.


def test_a_class_of_transformers_is_captured_whole(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, model_impl="transformers")
    for seed, lengths in enumerate([[60], [5, 9, 2], [16]]):
        batch = plain(lengths, seed)
        assert_replay_equals_eager(runner, batch)
        graph = runner.forward(batch).graph
        assert graph is not None and graph.num_breaks == 0


def test_attention_that_no_backend_has_still_breaks(tmp_path: Path) -> None:
    config = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
    folder = save_checkpoint(make_reference("Gemma2ForCausalLM", **config), tmp_path)
    runner = make_runner(folder, "cpu", **FULL, piecewise_cuda_graph_tokens=(32,))
    for seed, lengths in enumerate([[30], [5, 9, 2]]):
        assert_replay_equals_eager(runner, plain(lengths, seed))
    assert runner.full_graph_runner is not None
    assert runner.full_graph_runner.graphs[32].num_breaks == 2


def test_debug_mode_runs_python_each_time(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, debug_cuda_graph=True)
    expected = runner.forward(plain([20, 3]), allow_graph=False).next_token_logits
    result = runner.forward(plain([20, 3]))
    assert result.dispatch.kind == "full" and result.graph is not None
    assert result.graph.num_breaks == 1
    torch.testing.assert_close(result.next_token_logits, expected, rtol=1e-5, atol=1e-5)


def test_a_stale_plan_is_found_by_verification(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, verify_prefill_graph=1.0)
    assert runner.verifier is not None
    for batch in (plain([20, 3]), plain([9])):
        check = runner.forward(batch).verification
        assert check is not None
        check()
    assert runner.verifier.verified == 2
    monkeypatch.setattr("breakgraph.attention.torch_native.PackedLengths.send", lambda *_: None)
    check = runner.forward(plain([10, 13])).verification
    assert check is not None
    check()
    (found,) = runner.verifier.mismatches
    assert found.place == "in the full graph, which has no break to look at"
    again = runner.forward(plain([10, 13])).dispatch
    assert (again.bucket, again.reason) == (None, DispatchReason.OUT_OF_SERVICE)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch_flash", "torch_native", "flashinfer"])
def test_auto_is_close_to_eager_on_a_gpu(tmp_path: Path, attention: str) -> None:
    """Of the backends whose kernels differ in the two, equal but for rounding."""
    if attention == "flashinfer":
        pytest.importorskip("flashinfer")
    model = make_reference("Qwen3ForCausalLM", head_dim=64, max_position_embeddings=192)
    folder = save_checkpoint(model, tmp_path)
    runner = make_runner(folder, "cuda", **AUTO, attention_backend=attention)
    make_noise(runner)
    shapes = [[(60, 0)], [(5, 0)] * 3, [(128, 0)], [(1, 0)] * 4, [(3, 0)] * 9, [(7, 5), (20, 40)]]
    for seed, lengths in enumerate(shapes):
        batch = make_batch(lengths, seed)
        eager = runner.forward(batch, allow_graph=False).next_token_logits
        poison(runner)
        result = runner.forward(batch)
        torch.testing.assert_close(result.next_token_logits, eager, rtol=2e-2, atol=0.15)
        prefix = any(cached for _, cached in lengths)
        full = len(lengths) <= REQUEST_SLOTS and (attention == "flashinfer" or not prefix)
        assert result.dispatch.kind == ("full" if full else "breakable")
        assert result.graph is not None and (result.graph.num_breaks == 0) == full


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "attention"), [("float32", "torch_native"), ("bfloat16", "torch_flash")]
)
def test_hybrids_are_captured_whole_on_a_gpu(tmp_path: Path, dtype: str, attention: str) -> None:
    folder = save_hybrid("nemotron_h", tmp_path, num_experts_per_tok=4)
    where = {"device": "cuda", "dtype": dtype, "attention_backend": attention}
    runner = make_hybrid_runner(folder, **{**AUTO, **where})
    make_noise(runner)
    for lengths in ((1,), (63,), (65, 64), (1, 2, 3, 4), (1, 65, 64, 30)):
        with Requests(runner) as requests:
            batch = requests.batch(requests.open(len(lengths)), random_prompts(lengths))
            full, eager = outcomes(runner, [(batch, {}), (batch, {"allow_graph": False})])
            assert full.result.dispatch.kind == "full" and full.result.graph is not None
            assert full.result.graph.num_breaks == 0
            assert_same_outcome(runner, full, eager)


@pytest.mark.gpu
def test_a_full_replay_never_waits_for_the_device(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda", **FULL, attention_backend="torch_flash")
    batches = [plain([40, 7]), plain([16])]
    for batch in batches:
        runner.forward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            assert runner.forward(batch).dispatch.bucket is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_queued_full_replays_do_not_overwrite_each_others_lengths(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda", **FULL, attention_backend="torch_flash")
    lengths = np.random.default_rng(0).integers(1, 30, (12, REQUEST_SLOTS)).tolist()
    batches = [plain(shape, seed) for seed, shape in enumerate(lengths)]
    expected = [runner.forward(batch).next_token_logits.cpu() for batch in batches]
    queued = [runner.forward(batch).next_token_logits for batch in batches]
    for got, want in zip(queued, expected, strict=True):
        assert torch.equal(got.cpu(), want)

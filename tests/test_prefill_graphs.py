"""Replaying a prefill gives what running it eagerly gives, for every batch that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import VOCAB, make_noise, make_reference, save_checkpoint
from prefill_support import BUCKETS, SLOTS, assert_replay_equals_eager, make_batch, make_runner

from breakgraph.forward import ForwardBatch, LayerInputs, get_forward_context
from breakgraph.graph import ForeignReadError, RefusedOpError
from breakgraph.runner import DispatchReason, GraphCaptureError, ModelRunner
from breakgraph.runner.costs import ForwardTimes, Line, PrefillCosts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16, max_position_embeddings=192)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def runner(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ModelRunner]:
    runner = make_runner(checkpoint, request.param)
    make_noise(runner)
    yield runner
    del runner


@st.composite
def request_lengths(draw: st.DrawFn) -> list[tuple[int, int]]:
    """1 to 16 requests with or without a prefix, at most the largest bucket of new tokens."""
    count = draw(st.integers(1, 16))
    new = [draw(st.integers(1, BUCKETS[-1] // count)) for _ in range(count)]
    spare = (SLOTS - sum(new)) // count
    return [(n, draw(st.integers(0, min(spare, 40)))) for n in new]


@given(lengths=request_lengths(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_replay_equals_eager_for_any_batch_that_fits(
    runner: ModelRunner, lengths: list[tuple[int, int]], seed: int
) -> None:
    batch = make_batch(lengths, seed)
    if runner.dispatch(batch).bucket is not None:
        assert_replay_equals_eager(runner, batch)


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_bucket_edges(runner: ModelRunner, bucket: int, off: int) -> None:
    tokens = bucket + off
    batch = make_batch([(tokens, 0)])
    if tokens > BUCKETS[-1]:
        assert runner.dispatch(batch).reason is DispatchReason.TOO_MANY_TOKENS
    else:
        assert runner.dispatch(batch).bucket == next(b for b in BUCKETS if b >= tokens)
        assert_replay_equals_eager(runner, batch)


def test_interleaved_buckets_and_batch_sizes_do_not_disturb_each_other(
    runner: ModelRunner,
) -> None:
    shapes = [[(60, 0)], [(5, 9)] * 3, [(128, 0)], [(1, 20)] * 16, [(30, 0), (2, 7)], [(16, 0)]]
    for turn in range(3):
        for lengths in shapes:
            assert_replay_equals_eager(runner, make_batch(lengths, seed=turn))


def test_replays_survive_allocator_churn(runner: ModelRunner) -> None:
    for size in (10, 1000, 100_000):
        churn = [torch.full((size,), float("nan"), device=runner.device) for _ in range(50)]
        assert_replay_equals_eager(runner, make_batch([(40, 10), (3, 0)], seed=size))
        del churn


def test_a_result_does_not_depend_on_the_neighbours_in_the_batch(runner: ModelRunner) -> None:
    batch = make_batch([(20, 0), (31, 12), (9, 3)], seed=3)
    together = runner.forward(batch).next_token_logits
    assert together is not None
    starts = np.concatenate([[0], np.cumsum(batch.extend_lens)])
    old = np.concatenate([[0], np.cumsum(batch.prefix_lens)])
    for index in range(3):
        rows = slice(starts[index], starts[index + 1])
        alone = ForwardBatch.from_requests(
            [batch.input_ids[rows].tolist()],
            [batch.out_cache_loc[rows]],
            [batch.prefix_slots[old[index] : old[index + 1]]],
        )
        logits = runner.forward(alone).next_token_logits
        tolerance = 1e-5 if runner.device.type == "cpu" else 0.15
        torch.testing.assert_close(logits[0], together[index], rtol=2e-2, atol=tolerance)


def test_input_embeds_replay_as_their_ids_do(runner: ModelRunner) -> None:
    plain = make_batch([(20, 0), (7, 5)])
    embeds = runner.model.embed(torch.from_numpy(plain.input_ids).to(runner.device))
    wrong_ids = np.zeros_like(plain.input_ids)
    given = ForwardBatch(
        input_ids=wrong_ids,
        out_cache_loc=plain.out_cache_loc,
        extend_lens=plain.extend_lens,
        prefix_lens=plain.prefix_lens,
        prefix_slots=plain.prefix_slots,
        input_embeds=embeds,
    )
    expected = runner.forward(plain).next_token_logits
    result = runner.forward(given)
    assert result.dispatch.bucket == 32
    torch.testing.assert_close(result.next_token_logits, expected)


def test_token_logprobs_do_not_depend_on_the_graph(runner: ModelRunner) -> None:
    plain = make_batch([(20, 0), (7, 5)])
    targets = np.append(plain.input_ids[1:], -1)
    targets[19] = -1
    batch = make_batch([(20, 0), (7, 5)], logprob_targets=targets)
    eager = runner.forward(batch, allow_graph=False).input_token_logprobs
    replayed = runner.forward(batch).input_token_logprobs
    assert eager is not None and replayed is not None
    assert replayed.isnan().nonzero().flatten().tolist() == [19, 26]
    tolerance = 1e-5 if runner.device.type == "cpu" else 0.15
    torch.testing.assert_close(replayed, eager, rtol=1e-2, atol=tolerance, equal_nan=True)


def test_padding_stores_to_the_reserved_slot_alone(runner: ModelRunner) -> None:
    batch = make_batch([(17, 0)])
    before = [cache.clone() for cache in runner.kv_pool.tensors()]
    runner.forward(batch)
    untouched = np.setdiff1d(np.arange(1, SLOTS + 1), batch.out_cache_loc)
    for cache, was in zip(runner.kv_pool.tensors(), before, strict=True):
        assert torch.equal(cache[untouched], was[untouched])


def test_decisions_are_counted_and_explained(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", piecewise_cuda_graph_tokens=(16, 128))
    reasons = {
        DispatchReason.REPLAYED: make_batch([(3, 0)]),
        DispatchReason.PADDING: make_batch([(40, 0)]),
    }
    for reason, batch in reasons.items():
        assert runner.forward(batch).dispatch.reason is reason
        assert runner.dispatch_counts[reason] == 1
    runner.forward(reasons[DispatchReason.PADDING], allow_graph=False)
    assert runner.dispatch_counts[DispatchReason.EAGER_ASKED] == 1
    assert runner.bucket_hits == {16: 1}
    explained = runner.explain(reasons[DispatchReason.PADDING])
    assert "--max-prefill-padding" in explained
    assert "3 segments and 2 breaks" in explained
    off = make_runner(checkpoint, "cpu", enable_breakable_cuda_graph=False)
    assert off.forward(reasons[DispatchReason.REPLAYED]).dispatch.reason is DispatchReason.DISABLED
    assert "--enable-breakable-cuda-graph" in off.explain(reasons[DispatchReason.REPLAYED])


def test_a_batch_that_was_measured_faster_eagerly_runs_so(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", prefill_dispatch="measured")
    graphs = runner.graph_runner
    assert graphs is not None and graphs.costs is not None
    for times in (graphs.costs.eager.one, graphs.costs.replay.one):
        assert times.rows == BUCKETS and min(times.ms) > 0
    eager, replay = (Line(BUCKETS, ms) for ms in ((9, 9, 9, 18), (1, 2, 9, 17)))
    graphs.costs = PrefillCosts(ForwardTimes(eager), ForwardTimes(replay))
    for tokens, reason in {
        17: DispatchReason.REPLAYED,
        50: DispatchReason.EAGER_FASTER,
        64: DispatchReason.REPLAYED,
        128: DispatchReason.REPLAYED,
    }.items():
        assert runner.forward(make_batch([(tokens, 0)])).dispatch.reason is reason
    assert "--prefill-dispatch always" in runner.explain(make_batch([(50, 0)]))


def test_a_batch_over_the_buffers_is_one_clear_error(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="--chunked-prefill-size"):
        runner.forward(make_batch([(129, 0)]))
    with pytest.raises(ValueError, match="--max-running-requests"):
        runner.forward(make_batch([(1, 0)] * 17))
    assert_replay_equals_eager(runner, make_batch([(20, 0)]))


def test_what_would_read_past_a_table_is_refused_on_the_host(runner: ModelRunner) -> None:
    with pytest.raises(ValueError, match="193 tokens is longer than the context of 192"):
        runner.forward(make_batch([(100, 93)]))
    batch = make_batch([(20, 0)])
    for token in (-1, VOCAB):
        batch.input_ids[7] = token
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary"):
            runner.forward(batch)
    assert_replay_equals_eager(runner, make_batch([(20, 0)]))


def test_all_buckets_take_about_the_memory_of_the_largest(checkpoint: Path) -> None:
    ladder = make_runner(checkpoint, "cpu", piecewise_cuda_graph_tokens=None).graph_runner
    largest = make_runner(checkpoint, "cpu", piecewise_cuda_graph_tokens=(128,)).graph_runner
    assert ladder is not None and largest is not None
    assert len(ladder.buckets) == 8
    assert ladder.memory_bytes <= 1.15 * largest.memory_bytes


def patch_stack(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    """Run ``forward(stack, inputs, original)`` in place of the dense stack's forward."""
    from breakgraph.models.dense import DenseStack

    original = DenseStack.forward
    monkeypatch.setattr(DenseStack, "forward", lambda self, x: forward(self, x, original))


def test_a_segment_that_reads_a_stray_tensor_fails_the_capture(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = torch.ones(32)

    def forward(stack: Any, inputs: LayerInputs, original: Any) -> torch.Tensor:
        return original(stack, inputs) + stray

    patch_stack(monkeypatch, forward)
    with pytest.raises(GraphCaptureError, match=r"128-token.*segment 2.*\[32\].*test_prefill") as e:
        make_runner(checkpoint, "cpu")
    assert isinstance(e.value.__cause__, ForeignReadError)


def test_attention_that_does_not_break_fails_the_capture(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from breakgraph.attention import Attention

    def captured(self: Attention, *args: torch.Tensor) -> None:
        get_forward_context().attn_backend.forward(self, *args)

    monkeypatch.setattr(Attention, "mix", captured)
    with pytest.raises(GraphCaptureError) as error:
        make_runner(checkpoint, "cpu")
    assert isinstance(error.value.__cause__, RefusedOpError)
    assert "mixes the tokens" in str(error.value)


def test_running_out_of_memory_in_a_capture_names_the_flags_that_help(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(stack: Any, inputs: LayerInputs, original: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    patch_stack(monkeypatch, forward)
    with pytest.raises(GraphCaptureError, match=r"no memory left.*--mem-fraction-static"):
        make_runner(checkpoint, "cpu")


def test_a_model_without_a_layer_stack_runs_eagerly_and_says_why(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from breakgraph.models import PrefillModel

    monkeypatch.delattr(PrefillModel, "get_layer_stack")
    monkeypatch.setattr(
        PrefillModel, "forward", lambda self, x: self.model.forward(x), raising=False
    )
    runner = make_runner(checkpoint, "cpu")
    assert "get_layer_stack" in caplog.text
    result = runner.forward(make_batch([(20, 0)]))
    assert result.dispatch.reason is DispatchReason.NO_LAYER_STACK
    assert result.next_token_logits is not None
    assert "get_layer_stack" in runner.explain(make_batch([(20, 0)]))


def test_a_wrapped_layer_stack_is_found(checkpoint: Path) -> None:
    from torch import nn

    from breakgraph.runner import resolve_layer_stack

    inner = make_runner(checkpoint, "cpu", enable_breakable_cuda_graph=False).model
    outer = nn.Module()
    outer.language_model = inner
    assert resolve_layer_stack(outer) == (inner.get_layer_stack(), "")


def test_buckets_over_the_chunk_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--piecewise-cuda-graph-tokens"):
        make_runner(checkpoint, "cpu", piecewise_cuda_graph_tokens=(16, 4096))


def test_a_chunk_longer_than_the_context_is_captured_as_several_requests(tmp_path: Path) -> None:
    folder = save_checkpoint(
        make_reference("LlamaForCausalLM", max_position_embeddings=48), tmp_path
    )
    runner = make_runner(folder, "cpu")
    assert_replay_equals_eager(runner, make_batch([(48, 0), (40, 0), (20, 20)]))


def test_embeddings_and_scores_replay(tmp_path: Path, checkpoint: Path) -> None:
    batch = make_batch([(20, 0), (9, 0)])
    embedder = make_runner(checkpoint, "cpu", is_embedding=True, pooling="mean")
    scores = save_checkpoint(make_reference("Qwen3ForSequenceClassification"), tmp_path)
    assert json.loads((scores / "config.json").read_text())["architectures"]
    for runner, width in ((embedder, 32), (make_runner(scores, "cpu"), 2)):
        eager = runner.forward(batch, allow_graph=False).pooled
        replayed = runner.forward(batch)
        assert replayed.dispatch.bucket == 32
        assert replayed.pooled is not None and replayed.pooled.shape == (2, width)
        torch.testing.assert_close(replayed.pooled, eager, rtol=1e-5, atol=1e-5)


def test_a_warm_up_runs_many_rows_and_the_fewest(checkpoint: Path) -> None:
    graphs = make_runner(checkpoint, "cpu").graph_runner
    assert graphs is not None
    for buckets, rows in (((16, 64), {16, 64}), ((16, 1920, 2304, 8192), {16, 2304}), ((8,), {8})):
        graphs.buckets = buckets
        assert set(graphs._warm_up_buckets()) == rows


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_device(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda")
    batches = [make_batch([(40, 20), (7, 0)]), make_batch([(16, 0)])]
    for batch in batches:
        runner.forward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_queued_replays_do_not_overwrite_each_others_inputs(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda")
    batches = [make_batch([(40 + seed % 3, 0)], seed) for seed in range(12)]
    expected = [runner.forward(batch).next_token_logits.cpu() for batch in batches]
    queued = [runner.forward(batch).next_token_logits for batch in batches]
    for got, want in zip(queued, expected, strict=True):
        assert torch.equal(got.cpu(), want)

"""A replayed decode gives what eager decoding gives, whoever had the rows before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decode_support import Decoder, assert_close, make_runner, without_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import (
    VOCAB,
    make_noise,
    make_reference,
    poison,
    random_prompts,
    save_checkpoint,
)

from breakgraph.forward import ForwardBatch
from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    ForeignReadError,
    eager_on_graph,
    is_in_breakable_cuda_graph,
)
from breakgraph.runner import DispatchReason, GraphCaptureError, ModelRunner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def runner(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ModelRunner]:
    runner = make_runner(checkpoint, request.param)
    make_noise(runner)
    yield runner
    del runner


@pytest.fixture
def decoder(runner: ModelRunner) -> Iterator[Decoder]:
    decoder = Decoder(runner)
    yield decoder
    for row in list(decoder.ids):
        decoder.release(row)
    assert runner.requests.is_empty


def assert_replay_equals_eager(runner: ModelRunner, batch: ForwardBatch) -> None:
    """By the extend path, by the paged path, and replayed over a poisoned pool, in this order."""
    extended = runner.forward(without_rows(batch), allow_graph=False).next_token_logits
    eager = runner.forward(batch, allow_graph=False).next_token_logits
    assert_close(eager, extended)
    poison(runner)
    result = runner.forward(batch)
    assert result.dispatch.reason is DispatchReason.REPLAYED
    assert_close(result.next_token_logits, extended)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    steps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_replay_equals_eager_for_any_batch_that_fits(
    runner: ModelRunner, lengths: list[int], steps: int, seed: int
) -> None:
    decoder, draw = Decoder(runner), np.random.default_rng(seed)
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts(lengths, seed)]
    for _ in range(steps):
        some = draw.permutation(rows)[: draw.integers(1, len(rows) + 1)].tolist()
        batch = decoder.batch(some, draw.integers(0, VOCAB, len(some)).tolist())
        assert_replay_equals_eager(runner, batch)
    for row in rows:
        decoder.release(row)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_bucket_edges(runner: ModelRunner, decoder: Decoder, size: int, off: int) -> None:
    count = size + off
    if count == 0:
        return
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([7] * count)]
    batch = decoder.batch(rows, range(count))
    dispatch = runner.dispatch(batch)
    if count > SIZES[-1]:
        assert dispatch.reason is DispatchReason.TOO_MANY_REQUESTS
        assert "--cuda-graph-bs" in dispatch.describe()
    else:
        assert dispatch.bucket == next(size for size in SIZES if size >= count)
        assert_replay_equals_eager(runner, batch)


def test_growth_reaches_every_length_of_the_context(runner: ModelRunner, decoder: Decoder) -> None:
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([3, 60, 25])]
    for step in range(60):
        some = rows if step < 45 else rows[:2]
        assert_replay_equals_eager(runner, decoder.batch(some, [step % VOCAB] * len(some)))


def test_a_row_taken_by_another_request_reads_its_own_tokens(
    runner: ModelRunner, decoder: Decoder
) -> None:
    lengths = [20, 9, 31, 2]
    for turn in range(6):
        prompts = random_prompts(lengths[turn % 3 :], seed=turn)
        rows = [decoder.prefill(prompt)[0] for prompt in prompts]
        for _ in range(2):
            assert_replay_equals_eager(runner, decoder.batch(rows, [turn] * len(rows)))
        for row in rows[turn % 2 :]:
            decoder.release(row)


def test_a_row_that_skipped_the_paged_path_catches_up(
    runner: ModelRunner, decoder: Decoder
) -> None:
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([5, 8])]
    runner.forward(decoder.batch(rows, [1, 2]))
    for token in (3, 4):  # by the extend path, which leaves the mirror behind
        runner.forward(without_rows(decoder.batch(rows, [token, token])), allow_graph=False)
    assert_replay_equals_eager(runner, decoder.batch(rows, [5, 6]))


def test_prefills_and_decodes_share_a_pool_and_do_not_disturb_each_other(
    runner: ModelRunner, decoder: Decoder
) -> None:
    assert runner.graph_runner is not None and runner.decode_graph_runner is not None
    assert runner.graph_runner.pool is runner.decode_graph_runner.pool
    if runner.device.type == "cpu":
        assert runner.decode_graph_runner.memory_bytes < 0.2 * runner.graph_runner.memory_bytes
    rows: list[int] = []
    for turn, prompt in enumerate(random_prompts([16, 40, 3, 64, 11, 30])):
        poison(runner)
        row, replayed = decoder.prefill(prompt)
        assert replayed.dispatch.reason is DispatchReason.REPLAYED
        alone = decoder.prefill(prompt, allow_graph=False)
        assert_close(replayed.next_token_logits, alone[1].next_token_logits)
        decoder.release(alone[0])
        rows.append(row)
        assert_replay_equals_eager(runner, decoder.batch(rows, [turn] * len(rows)))


@torch.no_grad()
def test_greedy_decoding_by_graph_equals_transformers(tmp_path: Path) -> None:
    reference = make_reference("Qwen3ForCausalLM", head_dim=16)
    runner = make_runner(save_checkpoint(reference, tmp_path), "cpu")
    decoder, prompts = Decoder(runner), random_prompts([12, 3, 40, 7, 21])
    first = [decoder.prefill(prompt) for prompt in prompts]
    rows = [row for row, _ in first]
    tokens = [int(result.next_token_logits.argmax()) for _, result in first]
    for _ in range(24):
        result = runner.forward(decoder.batch(rows, tokens))
        assert result.dispatch.reason is DispatchReason.REPLAYED
        tokens = result.next_token_logits.argmax(-1).tolist()
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert decoder.ids[row] == expected[0].tolist()


def test_padding_writes_to_the_reserved_slot_and_the_spare_row_alone(
    runner: ModelRunner, decoder: Decoder
) -> None:
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([5, 9, 4])]
    runner.forward(decoder.batch(rows, [1, 2, 3]))
    batch = decoder.batch(rows, [4, 5, 6])
    assert runner.decode_backend is not None
    before = [cache.clone() for cache in runner.kv_pool.tensors()]
    mirror = runner.decode_backend.mirror.slots
    expected = mirror.clone()
    for row, length, slot in zip(rows, batch.prefix_lens, batch.out_cache_loc, strict=True):
        expected[row, length] = slot
    assert runner.forward(batch).dispatch.bucket == 4
    assert torch.equal(mirror, expected)
    untouched = np.setdiff1d(np.arange(1, runner.kv_pool.num_slots), batch.out_cache_loc)
    for cache, was in zip(runner.kv_pool.tensors(), before, strict=True):
        assert torch.equal(cache[untouched], was[untouched])


def test_decisions_are_counted_and_explained(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu")
    decoder = Decoder(runner)
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([4] * 9)]
    three = decoder.batch(rows[:3], [1, 1, 1])
    runner.forward(three)
    runner.forward(three, allow_graph=False)
    runner.forward(decoder.batch(rows, [1] * 9))
    runner.forward(without_rows(decoder.batch(rows[:1], [1])))
    assert runner.decode_dispatch_counts == {
        DispatchReason.REPLAYED: 1,
        DispatchReason.EAGER_ASKED: 1,
        DispatchReason.TOO_MANY_REQUESTS: 1,
        DispatchReason.NO_ROWS: 1,
    }
    assert runner.decode_bucket_hits == {4: 1}
    assert runner.dispatch_counts == {DispatchReason.REPLAYED: 9}
    said = runner.explain(three)
    assert "3 decoding requests replay in bucket 4 (1 rows of padding)" in said
    assert "each of 4 graphs has 1 segments and 0 breaks" in said
    assert "no_request_rows: 1" in said


def test_disabled_decode_runs_eagerly_and_says_which_flag_helps(checkpoint: Path) -> None:
    runner = make_runner(
        checkpoint, "cpu", cuda_graph_backend_decode="disabled", cuda_graph_bs=None
    )
    assert runner.decode_graph_runner is None
    decoder = Decoder(runner)
    batch = decoder.batch([decoder.prefill([1, 2, 3])[0]], [4])
    result = runner.forward(batch)
    assert result.dispatch.reason is DispatchReason.DISABLED
    assert "--cuda-graph-backend-decode full" in result.dispatch.describe()
    expected = runner.forward(without_rows(batch)).next_token_logits
    assert_close(result.next_token_logits, expected)


def mark_mlp(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Make the feed-forward block a marked op; returns a list that grows with each Python run."""
    from breakgraph.layers.mlp import GatedMLP

    ran: list[bool] = []
    original = GatedMLP.forward

    @eager_on_graph()
    def marked(
        self: GatedMLP, x: torch.Tensor, residual: torch.Tensor, normed_eps: float | None = None
    ) -> torch.Tensor:
        ran.append(is_in_breakable_cuda_graph())
        return original(self, x, residual, normed_eps)

    monkeypatch.setattr(GatedMLP, "forward", lambda *given: marked(*given))
    return ran


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("flags", "env", "breaks"),
    [
        ({"cuda_graph_backend_decode": None}, "1", 2),
        ({"cuda_graph_backend_decode": "breakable"}, None, 2),
        ({"cuda_graph_backend_decode": "full"}, None, 0),
        ({"cuda_graph_backend_decode": None}, "0", 0),
    ],
)
def test_a_marked_op_breaks_a_decode_that_is_asked_to_be_breakable(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    flags: dict[str, Any],
    env: str | None,
    breaks: int,
) -> None:
    if env is not None:
        monkeypatch.setenv("BREAKGRAPH_USE_BREAKABLE_CUDA_GRAPH", env)
    ran = mark_mlp(monkeypatch)
    runner = make_runner(checkpoint, device, **flags)
    assert runner.decode_graph_runner is not None
    graphs = runner.decode_graph_runner.graphs.values()
    assert [graph.num_breaks for graph in graphs] == [breaks] * len(SIZES)
    decoder = Decoder(runner)
    row = decoder.prefill([1, 2, 3])[0]
    batch = decoder.batch([row], [4])
    ran.clear()
    assert runner.forward(batch).dispatch.bucket == 1
    assert ran == [True] * breaks
    assert_replay_equals_eager(runner, batch)


def test_a_capture_without_breaks_is_one_segment() -> None:
    ran = []

    @eager_on_graph()
    def marked(x: torch.Tensor) -> torch.Tensor:
        ran.append(is_in_breakable_cuda_graph())
        return x + 1

    x, graph = torch.zeros(4), BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device="cpu", breaks=False):
        y = marked(x) * 2
    assert (graph.num_segments, graph.num_breaks, ran) == (1, 0, [False])
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [8] * 4 and len(ran) == 1


def test_a_decode_that_reads_a_stray_tensor_fails_the_capture(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from breakgraph.layers.norm import RMSNorm

    stray, original = torch.ones(32), RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: original(self, x) + stray)
    with pytest.raises(GraphCaptureError, match=r"8-request decode.*segment 0.*\[32\]") as error:
        make_runner(checkpoint, "cpu", enable_breakable_cuda_graph=False)
    assert isinstance(error.value.__cause__, ForeignReadError)
    assert "--cuda-graph-backend-decode disabled" in str(error.value)


def test_models_that_do_not_decode_have_no_decode_graphs(checkpoint: Path, tmp_path: Path) -> None:
    scores = save_checkpoint(make_reference("Qwen3ForSequenceClassification"), tmp_path)
    for runner in (make_runner(scores, "cpu"), make_runner(checkpoint, "cpu", is_embedding=True)):
        assert runner.decode_graph_runner is None and runner.decode_backend is None


@pytest.mark.gpu
def test_a_replayed_decode_never_waits_for_the_device(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda")
    decoder = Decoder(runner)
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([20, 9, 31])]
    batches = [decoder.batch(rows, [1, 2, 3]), decoder.batch(rows[:1], [4])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            assert runner.forward(batch).dispatch.reason is DispatchReason.REPLAYED
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_queued_decodes_do_not_overwrite_each_others_inputs(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda")
    decoder = Decoder(runner)
    rows = [decoder.prefill(prompt)[0] for prompt in random_prompts([20, 9, 31])]
    batches = [decoder.batch(rows, [step] * 3) for step in range(12)]
    queued = [runner.forward(batch).next_token_logits for batch in batches]
    expected = [runner.forward(batch).next_token_logits.cpu() for batch in batches]
    for got, want in zip(queued, expected, strict=True):
        assert torch.equal(got.cpu(), want)

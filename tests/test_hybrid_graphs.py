"""A replayed hybrid gives what eager gives, logits and states, whoever had the slots before."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hybrid_support import (
    CONTEXT,
    Outcome,
    Requests,
    make_hybrid_engine,
    make_hybrid_runner,
    outcomes,
    put_back,
    save_hybrid,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import VOCAB, make_noise, make_reference, random_prompts, save_checkpoint

from breakgraph.attention import Attention, RadixLinearAttention
from breakgraph.forward import ForwardBatch
from breakgraph.runner import DispatchReason, ModelRunner

BUCKETS, SIZES = (16, 64, 128, 160), (1, 2, 4, 8)
CAPTURED = 3
"""Requests for which the recurrent mixers are captured as well, where they are."""

EAGER: dict[str, Any] = {"allow_graph": False}
GRAPHS: dict[str, Any] = {
    "enable_breakable_cuda_graph": True,
    "piecewise_cuda_graph_tokens": BUCKETS,
    "cuda_graph_backend_decode": "full",
    "cuda_graph_bs": SIZES,
}


class Place(NamedTuple):
    """Where a runner is, and for how many requests it captures the recurrent mixers too."""

    device: str
    dtype: str
    captured: int

    def __str__(self) -> str:
        return f"{self.device}-{self.dtype}-{'captured' if self.captured else 'breaks'}"


CPU = Place("cpu", "float32", CAPTURED)
PLACES = [
    Place("cpu", "float32", 0),
    CPU,
    # With breaks for more requests, so that both kinds of graphs are there.
    pytest.param(Place("cuda", "float32", CAPTURED), marks=pytest.mark.gpu),
    pytest.param(Place("cuda", "bfloat16", CAPTURED), marks=pytest.mark.gpu),
]


on_cuda = pytest.mark.parametrize("place", PLACES[2:], ids=str, indirect=True)
served_by_flash = pytest.mark.parametrize("place", PLACES[3:], ids=str, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """Each capture collects garbage, which takes 0.25 s with all that was imported looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=["nemotron_h", "qwen3_next"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PLACES, ids=str)
def place(request: pytest.FixtureRequest, name: str) -> Place:
    if request.param.device == "cuda" and name == "qwen3_next":
        pytest.importorskip("fla", reason="the gated delta rule on CUDA needs fla-core")
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name: str, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In bfloat16 rounding alone sends a token to another expert, where two are nearly as good, so
    # there every token goes to all of them; float32 chooses.
    chosen = 4 if place.dtype == "bfloat16" else 2
    return save_hybrid(name, tmp_path_factory.mktemp(name), num_experts_per_tok=chosen)


def make(checkpoint: Path, place: Place, **flags: Any) -> ModelRunner:
    where = {"device": place.device, "dtype": place.dtype}
    captured = {"linear_attention_capture": place.captured}
    runner = make_hybrid_runner(checkpoint, **{**GRAPHS, **where, **captured, **flags})
    make_noise(runner)
    return runner


@pytest.fixture(scope="module")
def runner(checkpoint: Path, place: Place) -> Iterator[ModelRunner]:
    runner = make(checkpoint, place)
    yield runner
    del runner


@pytest.fixture
def requests(runner: ModelRunner) -> Iterator[Requests]:
    before = states(runner)
    with Requests(runner) as requests:
        yield requests
    put_back(runner, before)
    for cache in runner.kv_pool.tensors():
        cache[0] = 0  # where padding stores
    assert runner.requests.is_empty


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of sums; NaN where a test has put NaN, in the slots of nobody."""
    rtol, atol = 1e-5, 2e-4
    if got.device.type == "cuda":
        rtol, atol = (2e-2, 0.2) if got.dtype == torch.bfloat16 else (1e-3, 1e-3)
    got, expected = got.float(), expected.float()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_outcome(runner: ModelRunner, got: Outcome, expected: Outcome) -> None:
    """Logits, and the states of the batch's requests; the reserved slot is nobody's."""
    assert runner.mamba_pool is not None
    mine = np.delete(np.arange(runner.mamba_pool.num_slots), runner.mamba_pool.reserved_slot)
    for one, other in zip(
        [got.logits, *(state[mine] for state in got.states)],
        [expected.logits, *(state[mine] for state in expected.states)],
        strict=True,
    ):
        # Logits are float32 whatever they were computed in.
        assert_close(one.to(runner.dtype), other.to(runner.dtype))


def assert_replay_equals_eager(runner: ModelRunner, *batches: ForwardBatch) -> None:
    """By each of ``batches``, the same tokens asked for in different ways; the first replays."""
    runs = [(batches[0], {}), *((batch, EAGER) for batch in batches)]
    replayed, *eager = outcomes(runner, runs)
    assert replayed.result.dispatch.reason is DispatchReason.REPLAYED
    assert replayed.logits.isfinite().all()
    for one in eager:
        assert_same_outcome(runner, replayed, one)


def served(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner) -> Counter[str]:
    """How many forwards each kind of prefill graph replays from now on."""
    counts: Counter[str] = Counter()
    for kind in ("graph_runner", "linear_graph_runner"):
        graphs = getattr(runner, kind)
        if graphs is not None:

            def counted(*args: Any, kind: str = kind, replay: Any = graphs.replay) -> Any:
                counts[kind] += 1
                return replay(*args)

            monkeypatch.setattr(graphs, "replay", counted)
    return counts


@st.composite
def request_lengths(draw: st.DrawFn) -> list[tuple[int, int]]:
    """1 to 16 requests of ``(new, prefix)`` tokens, each at most the largest bucket in all."""
    count = draw(st.integers(1, 16))
    share = BUCKETS[-1] // count
    new = [draw(st.integers(1, share)) for _ in range(count)]
    most = [min(share, 1024 // count - n, CONTEXT - n) for n in new]
    return [(n, draw(st.integers(0, m))) for n, m in zip(new, most, strict=True)]


@given(lengths=request_lengths(), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_replay_equals_eager_for_any_batch_that_fits(
    runner: ModelRunner, lengths: list[tuple[int, int]], seed: int
) -> None:
    """With prefixes that an earlier forward computed, and then a decode of some."""
    draw = np.random.default_rng(seed)
    with Requests(runner) as requests:
        rows = requests.open(len(lengths))
        begun = [i for i, (_, prefix) in enumerate(lengths) if prefix]
        if begun:
            prefixes = random_prompts([lengths[i][1] for i in begun], seed + 1)
            runner.forward(requests.batch([rows[i] for i in begun], prefixes))
        batch = requests.batch(rows, random_prompts([new for new, _ in lengths], seed))
        assert_replay_equals_eager(runner, batch)
        some = draw.permutation(rows)[:8].tolist()
        decode_equals_extend(runner, requests, some, draw.integers(1, VOCAB, len(some)).tolist())


def decode_equals_extend(
    runner: ModelRunner, requests: Requests, rows: Sequence[int], tokens: Sequence[int]
) -> None:
    """A replayed decode, an eager one, and a prefill of one token a request.

    In bfloat16 a step and a chunk round differently, by more than a test of random weights bounds.
    """
    batch = requests.decode(rows, tokens)
    as_prefill = ForwardBatch(
        input_ids=batch.input_ids,
        out_cache_loc=batch.out_cache_loc,
        extend_lens=batch.extend_lens,
        prefix_lens=batch.prefix_lens,
        prefix_slots=batch.prefix_slots,
        rows=batch.rows,
    )
    exact = runner.dtype == torch.float32
    assert_replay_equals_eager(runner, batch, *([as_prefill] if exact else []))
    assert_replay_equals_eager(runner, as_prefill)


def shapes_within(captured: int) -> list[tuple[int, ...]]:
    """Lengths at the edges of chunks, in every count up to ``captured`` that fits a bucket."""
    edges = (1, 63, 64, 65, 128)
    return [
        lengths
        for count in range(1, captured + 1)
        for lengths in combinations_with_replacement(edges, count)
        if sum(lengths) <= BUCKETS[-1]
    ]


@pytest.mark.parametrize("lengths", shapes_within(CAPTURED), ids=str)
def test_every_edge_of_a_chunk(
    runner: ModelRunner, requests: Requests, lengths: tuple[int, ...]
) -> None:
    """New requests beside ones that go on from any state, the longest first or last."""
    order = lengths[:: 1 if sum(lengths) % 2 else -1]
    prefixes = [(37 * i + length) % 2 * 40 for i, length in enumerate(order)]
    rows = requests.open(len(order), prefixes)
    assert_replay_equals_eager(runner, requests.batch(rows, random_prompts(order)))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_bucket_edges_for_every_count_of_requests(
    runner: ModelRunner, requests: Requests, bucket: int
) -> None:
    for count in range(1, CAPTURED + 2):
        for tokens in (bucket - 1, bucket, bucket + 1):
            lengths = [len(part) for part in np.array_split(np.zeros(tokens), count)]
            rows = requests.open(count, [3 * (i % 2) for i in range(count)])
            batch = requests.batch(rows, random_prompts(lengths))
            dispatch = runner.dispatch(batch)
            if tokens > BUCKETS[-1]:
                assert dispatch.reason is DispatchReason.TOO_MANY_TOKENS
            else:
                assert dispatch.bucket == next(b for b in BUCKETS if b >= tokens)
                assert_replay_equals_eager(runner, batch)
            requests.close()


def test_few_requests_take_the_captured_mixers_and_more_the_breaks(
    runner: ModelRunner, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = sum(isinstance(module, Attention) for module in runner.model.modules())
    mixers = sum(isinstance(module, RadixLinearAttention) for module in runner.model.modules())
    captured = runner.args.linear_attention_capture
    assert (runner.linear_graph_runner is not None) == (captured > 0)
    counts = served(monkeypatch, runner)
    for count in range(1, CAPTURED + 3):
        batch = requests.batch(requests.open(count), random_prompts([5] * count))
        few = count <= captured
        breaks = attention if few else attention + mixers
        assert f"{breaks + 1} segments and {breaks} breaks" in runner.explain(batch)
        counts.clear()
        assert_replay_equals_eager(runner, batch)
        assert counts == {"linear_graph_runner" if few else "graph_runner": 1}
        requests.close()


def test_interleaved_buckets_and_batch_sizes_do_not_disturb_each_other(
    runner: ModelRunner, requests: Requests
) -> None:
    shapes = [[60], [5] * 3, [128], [1] * 16, [30, 2], [16], [70, 40, 9, 1]]
    for turn in range(2):
        for lengths in shapes:
            rows = requests.open(len(lengths), [turn * (i % 3) * 7 for i in range(len(lengths))])
            prompts = random_prompts(lengths, seed=turn)
            assert_replay_equals_eager(runner, requests.batch(rows, prompts))
            some = rows[:8]
            decode_equals_extend(runner, requests, some, [turn + 1] * len(some))
            requests.close()


def test_replays_survive_allocator_churn(runner: ModelRunner, requests: Requests) -> None:
    for size in (10, 1000, 100_000):
        churn = [torch.full((size,), float("nan"), device=runner.device) for _ in range(50)]
        rows = requests.open(2, [10, 0])
        assert_replay_equals_eager(runner, requests.batch(rows, random_prompts([40, 3], size)))
        requests.close()
        del churn


def test_slots_of_nobody_may_hold_anything(runner: ModelRunner, requests: Requests) -> None:
    """New requests, and padding, find NaN in their slots; no request after sees any of it."""
    assert runner.mamba_pool is not None
    rows = requests.open(5, [20, 0, 0, 9, 0])
    ongoing = [rows[0], rows[3]]
    free = np.setdiff1d(np.arange(runner.mamba_pool.num_slots), ongoing)
    for tensor in runner.mamba_pool.tensors():
        tensor[free] = float("nan")
    for count in (2, 5):
        batch = requests.batch(rows[:count], random_prompts([11, 70, 1, 3, 9][:count]))
        assert_replay_equals_eager(runner, batch)
        runner.forward(batch)
    decode_equals_extend(runner, requests, rows[:3], [1, 2, 3])  # with a row of padding


def test_a_result_does_not_depend_on_the_neighbours_in_the_batch(
    runner: ModelRunner, requests: Requests
) -> None:
    prompts, prefixes = random_prompts([20, 64, 31, 1, 9], seed=3), [0, 12, 0, 5, 70]
    before = states(runner)
    for count in (CAPTURED, 5):
        rows = requests.open(count, prefixes[:count])
        batch = requests.batch(rows, prompts[:count])
        put_back(runner, before)
        together = runner.forward(batch).next_token_logits
        assert together is not None
        after = states(runner)
        for index, row in enumerate(rows):
            put_back(runner, before)
            slots, prefix = runner.requests.slots(row), prefixes[index]
            alone = ForwardBatch.from_requests(
                [prompts[index]], [slots[prefix:]], [slots[:prefix]], rows=np.array([row])
            )
            logits = runner.forward(alone).next_token_logits
            assert logits is not None
            assert_close(logits[0].to(runner.dtype), together[index].to(runner.dtype))
            for now, then in zip(states(runner), after, strict=True):
                assert_close(now[row].to(runner.dtype), then[row].to(runner.dtype))
        requests.close()


def test_a_replay_from_states_put_back_is_bit_equal(
    runner: ModelRunner, requests: Requests
) -> None:
    rows = requests.open(6, [0, 30, 0, 7, 0, 1])
    for count in (2, 6):
        batch = requests.batch(rows[:count], random_prompts([30, 17, 5, 9, 1, 20][:count]))
        first, second = outcomes(runner, [(batch, {})] * 2)
        assert runner.device.type != "cpu" or torch.equal(first.logits, second.logits)
        assert_same_outcome(runner, first, second)
    assert runner.mamba_pool is not None
    batch = requests.decode(rows, [1] * 6)
    spare = runner.mamba_pool.snapshots[0]
    runner.mamba_pool.copy(rows[1], spare)
    before = runner.forward(batch).next_token_logits
    moved = states(runner)
    runner.mamba_pool.copy(spare, rows[1])
    after = runner.forward(batch).next_token_logits
    assert before is not None and after is not None
    for one, other in zip(states(runner), moved, strict=True):
        assert_close(one[rows[1]].to(runner.dtype), other[rows[1]].to(runner.dtype))
        assert not torch.equal(one[rows[0]], other[rows[0]])  # this one has moved on twice
    assert_close(after[1].to(runner.dtype), before[1].to(runner.dtype))


@pytest.mark.parametrize("count", range(1, 10))
def test_decodes_of_every_size(runner: ModelRunner, requests: Requests, count: int) -> None:
    rows = requests.open(count, [1 + 13 * i for i in range(count)])
    batch = requests.decode(rows, range(count))
    if count > SIZES[-1]:
        assert runner.dispatch(batch).reason is DispatchReason.TOO_MANY_REQUESTS
    else:
        decode_equals_extend(runner, requests, rows[::-1], range(count))


def test_prefills_and_decodes_share_a_pool_and_do_not_disturb_each_other(
    runner: ModelRunner, requests: Requests
) -> None:
    assert runner.graph_runner is not None and runner.decode_graph_runner is not None
    assert runner.graph_runner.pool is runner.decode_graph_runner.pool
    if runner.linear_graph_runner is not None:
        assert runner.graph_runner.pool is runner.linear_graph_runner.pool
    rows: list[int] = []
    for turn, prompt in enumerate(random_prompts([16, 40, 3, 64, 11])):
        rows += requests.open(1)
        assert_replay_equals_eager(runner, requests.batch(rows[-1:], [prompt]))
        decode_equals_extend(runner, requests, rows, [turn] * len(rows))
        chunks = [[turn + 1, 5, 6]] * len(rows)
        assert_replay_equals_eager(runner, requests.batch(rows, chunks))


def test_what_padded_rows_hold_changes_no_real_row(runner: ModelRunner, requests: Requests) -> None:
    """NaN behind the last token passes every layer, experts among them."""
    graphs = runner.linear_graph_runner or runner.graph_runner
    assert graphs is not None
    batch = requests.batch(requests.open(2, [4, 0]), random_prompts([17, 20]))
    before = states(runner)
    found = []
    for padding in (0.0, 3.0, float("nan")):
        put_back(runner, before)
        filled = graphs.replay_prepare(batch, 64)
        filled.inputs.hidden_states[37:] = padding
        with torch.no_grad():
            found.append([graphs.replay(batch, 64).clone(), *states(runner)])
    for other in found[1:]:
        for one, clean in zip(other, found[0], strict=True):
            assert torch.equal(one, clean)


def test_padding_touches_the_reserved_slots_alone(runner: ModelRunner, requests: Requests) -> None:
    """``outcomes`` sees to the states; here are keys and values too."""
    rows = requests.open(3, [5, 9, 4])
    for batch in (
        requests.batch(rows, random_prompts([5, 9, 4])),
        requests.decode(rows, [4, 5, 6]),
    ):
        before = [cache.clone() for cache in runner.kv_pool.tensors()]
        outcomes(runner, [(batch, {})])
        untouched = np.setdiff1d(np.arange(1, runner.kv_pool.num_slots), batch.out_cache_loc)
        for cache, was in zip(runner.kv_pool.tensors(), before, strict=True):
            assert torch.equal(cache[untouched], was[untouched])


def test_batches_of_no_rows_replay_from_zeros(runner: ModelRunner) -> None:
    for count in (2, 5):
        slots = np.arange(1, 1 + 20 * count).reshape(count, 20)
        batch = ForwardBatch.from_requests(random_prompts([20] * count), list(slots))
        replayed, eager = outcomes(runner, [(batch, {}), (batch, EAGER)])
        assert replayed.result.dispatch.reason is DispatchReason.REPLAYED
        assert_same_outcome(runner, replayed, eager)


def test_debug_mode_gives_what_eager_gives(
    checkpoint: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(checkpoint, place, debug_cuda_graph=True)
    runners = (runner.graph_runner, runner.linear_graph_runner, runner.decode_graph_runner)
    assert runners.count(None) == (not place.captured)
    for graphs in filter(None, runners):
        assert {(g.num_segments, g.num_breaks) for g in graphs.graphs.values()} == {(1, 1)}
    ran: list[int] = []
    original = RadixLinearAttention.forward

    def look(self: Any, *projected: torch.Tensor) -> torch.Tensor:
        ran.append(len(projected[0]))
        return original(self, *projected)

    monkeypatch.setattr(RadixLinearAttention, "forward", look)
    requests = Requests(runner)
    for count in (2, 5):
        rows = requests.open(count, [i % 2 * 9 for i in range(count)])
        batch = requests.batch(rows, random_prompts([7] * count))
        ran.clear()
        assert_replay_equals_eager(runner, batch)
        # Replayed with the bucket's rows, then eagerly with the batch's: its Python ran twice.
        bucket = runner.dispatch(batch).bucket
        assert Counter(ran) == {bucket: len(ran) // 2, 7 * count: len(ran) // 2}
        assert_replay_equals_eager(runner, requests.decode(rows, [3] * count))
    requests.close()


def test_a_context_shorter_than_the_chunk_ends_the_ladder_of_captured_mixers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing longer than all the request slots hold would ever use it."""
    folder = save_hybrid("nemotron_h", tmp_path, max_position_embeddings=48)
    runner = make(folder, CPU, linear_attention_capture=2)
    assert runner.linear_graph_runner is not None and runner.graph_runner is not None
    assert runner.linear_graph_runner.buckets == (16, 64, 96)
    assert runner.graph_runner.buckets == BUCKETS
    counts = served(monkeypatch, runner)
    requests = Requests(runner)
    for lengths in ([48, 48], [48], [48, 48, 48]):
        rows = requests.open(len(lengths))
        assert_replay_equals_eager(runner, requests.batch(rows, random_prompts(lengths)))
        requests.close()
    assert counts == {"linear_graph_runner": 2, "graph_runner": 1}


def test_the_engine_reports_the_graph_that_served(tmp_path: Path) -> None:
    """The bucket of 96 is one that only the captured mixers have."""
    folder = save_hybrid("nemotron_h", tmp_path, max_position_embeddings=48)
    flags = {**GRAPHS, "linear_attention_capture": 2, "disable_radix_cache": True}
    with make_hybrid_engine(folder, **flags) as engine:
        for count, bucket, breaks in ((3, 128, 3), (2, 96, 1)):
            answers = engine.generate(random_prompts([40] * count), 2)
            assert [answer.bucket for answer in answers] == [bucket] * count
            last = engine.statistics.last_prefill
            assert last is not None and last.bucket == bucket
            assert (last.breaks, last.segments) == (breaks, breaks + 1)


def test_capturing_mixers_that_a_model_has_not_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_checkpoint(make_reference("Qwen3ForCausalLM", head_dim=8), tmp_path)
    flags = {"piecewise_cuda_graph_tokens": (16,), "chunked_prefill_size": 16}
    runner = make_hybrid_runner(folder, **{**GRAPHS, **flags}, linear_attention_capture=2)
    assert runner.linear_graph_runner is None and runner.mamba_pool is None
    assert "--linear-attention-capture does nothing: the model has no such layer" in caplog.text


@pytest.mark.parametrize("limit", [8, 11])
def test_states_take_what_the_flags_say(tmp_path: Path, limit: int) -> None:
    folder = save_hybrid("nemotron_h", tmp_path)
    runner = make_hybrid_runner(folder, max_mamba_cache_size=limit, max_running_requests=8)
    assert runner.mamba_pool is not None
    assert len(runner.mamba_pool.snapshots) == limit - 8
    runner = make_hybrid_runner(folder, disable_radix_cache=True)
    assert runner.mamba_pool is not None and not runner.mamba_pool.snapshots


@served_by_flash
def test_a_replay_never_waits_for_the_device(runner: ModelRunner, requests: Requests) -> None:
    rows = requests.open(6, [20, 0, 0, 5, 0, 0])
    prompts = random_prompts([40, 7, 3, 1, 20, 9])
    batches = [requests.batch(rows[:2], prompts[:2]), requests.batch(rows, prompts)]
    batches += [requests.decode(rows, [1] * 6), requests.decode(rows[:1], [4])]
    for batch in batches:
        runner.forward(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            assert runner.forward(batch).dispatch.reason is DispatchReason.REPLAYED
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_queued_replays_do_not_overwrite_each_others_plans(
    runner: ModelRunner, requests: Requests
) -> None:
    batches = []
    for seed in range(12):
        count = 1 + seed % 5
        rows = requests.open(count)
        batches.append(requests.batch(rows, random_prompts([30 - 5 * i for i in range(count)])))
        requests.close()
    expected = [outcome.logits.cpu() for outcome in outcomes(runner, [(b, {}) for b in batches])]
    queued = [runner.forward(batch).next_token_logits for batch in batches]
    for got, want in zip(queued, expected, strict=True):
        assert got is not None and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", ["nemotron_h-latent", "qwen3_next-biased"])
def test_other_shapes_in_brief(name: str, tmp_path: Path) -> None:
    folder = save_hybrid(name, tmp_path)
    flags = {"piecewise_cuda_graph_tokens": (64, 128), "cuda_graph_bs": (4,)}
    runner = make(folder, CPU, **flags)
    for lengths in ([33, 65], [20, 1, 9]):
        with Requests(runner) as requests:
            rows = requests.open(len(lengths), [0, 30, 8][: len(lengths)])
            assert_replay_equals_eager(runner, requests.batch(rows, random_prompts(lengths)))
            decode_equals_extend(runner, requests, rows, [5] * len(rows))

"""A graph that goes wrong in service is caught by an eager forward, named, and not used again.

A fault here is one of replays alone: it is planted in what a replay prepares, or in a break, where
it looks whether a graph is running. Each is found on the first prefill at rate 1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import save_byte_model
from hybrid_support import HYBRIDS, make_hybrid_engine, make_hybrid_runner, save_hybrid
from models_support import VOCAB, make_noise, make_reference, pools, save_checkpoint

from breakgraph import is_in_breakable_cuda_graph
from breakgraph.attention import TorchNativeBackend
from breakgraph.attention.mamba2 import Mamba2Recurrence
from breakgraph.engine import AsyncEngine, SamplingParams
from breakgraph.forward import ForwardBatch, get_forward_context
from breakgraph.runner import DispatchReason, ForwardResult, ModelRunner
from breakgraph.runner.breakable_cuda_graph_runner import BreakableCudaGraphRunner
from breakgraph.runner.verification import PrefillVerifier, layer_of, row_error
from breakgraph.server_args import ServerArgs

BUCKETS = (16, 64, 160)
GRAPHS = {"enable_breakable_cuda_graph": True, "piecewise_cuda_graph_tokens": BUCKETS}
VERIFIED = {**GRAPHS, "verify_prefill_graph": 1.0}
SHAPE = ((9, 0), (20, 31), (1, 12))  # new and cached tokens of each request, 30 in bucket 64
BUCKET = 64
Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference(
        "Qwen3ForCausalLM", head_dim=16, max_position_embeddings=256, num_hidden_layers=3
    )
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hybrid("nemotron_h", tmp_path_factory.mktemp("nemotron_h"))


def make_runner(folder: Path, **flags: Any) -> ModelRunner:
    """A verified runner whose pools are full of noise."""
    runner = make_hybrid_runner(folder, **VERIFIED | flags)
    make_noise(runner)
    return runner


def make_batch(runner: ModelRunner, seed: int = 0) -> ForwardBatch:
    draw = np.random.default_rng(seed)
    slots = draw.permutation(runner.kv_pool.num_tokens) + 1
    cut = np.cumsum([length for both in SHAPE for length in both])
    parts = np.split(slots, cut)
    return ForwardBatch.from_requests(
        [draw.integers(1, VOCAB, new).tolist() for new, _ in SHAPE],
        parts[: 2 * len(SHAPE) : 2],
        parts[1 : 2 * len(SHAPE) : 2],
        rows=np.array([5, 2, 7]),
    )


def in_replays(patch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """Call ``change(graphs, batch, bucket)`` between what prepares a replay and the replay."""
    replay = BreakableCudaGraphRunner.replay

    def changed(self: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        change(self, batch, bucket)
        return replay(self, batch, bucket)

    patch.setattr(BreakableCudaGraphRunner, "replay", changed)


def in_breaks(patch: pytest.MonkeyPatch, change: Callable[..., None], layer: int = 0) -> None:
    """Call ``change(out)`` after the attention of ``layer``, in replays."""
    forward, seen = TorchNativeBackend.forward, list[Any]()

    def changed(self, module, q, k, v, out) -> None:
        forward(self, module, q, k, v, out)
        if is_in_breakable_cuda_graph():
            seen.extend([] if module in seen else [module])
            if seen.index(module) == layer:
                change(out)

    patch.setattr(TorchNativeBackend, "forward", changed)


# The faults of tests/test_evaluation_mutations.py, and those of what a segment reads.


def stale_lengths(patch: pytest.MonkeyPatch) -> None:
    """The plan made at capture: one request that fills the bucket."""
    in_replays(
        patch,
        lambda graphs, batch, bucket: graphs.attn_backend.init_forward_metadata(
            graphs.dummy(batch.num_tokens)
        ),
    )


def prefix_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Each cached prefix without its last token."""

    def shorten(graphs: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> None:
        ends = batch.prefix_lens.cumsum()
        kept = [i for i in range(len(batch.prefix_slots)) if i + 1 not in ends]
        short = dataclasses.replace(
            batch,
            prefix_lens=(batch.prefix_lens - 1).clip(min=0),
            prefix_slots=batch.prefix_slots[kept],
        )
        graphs.attn_backend.init_forward_metadata(short)

    in_replays(patch, shorten)


def dropped_last_token(patch: pytest.MonkeyPatch) -> None:
    def drop(out: torch.Tensor) -> None:
        out[torch.from_numpy(get_forward_context().batch.last_token_rows)] = 0

    in_breaks(patch, drop)


def wrong_in_layer_1(patch: pytest.MonkeyPatch) -> None:
    in_breaks(patch, lambda out: out[3].mul_(1.01), layer=1)


def nan_in_layer_2(patch: pytest.MonkeyPatch) -> None:
    in_breaks(patch, lambda out: out[4, 0].fill_(float("nan")), layer=2)


def stale_buffer(name: str) -> Fault:
    """A static input that keeps what the capture put there."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        in_replays(
            patch,
            lambda graphs, batch, bucket: getattr(graphs.buffers.inputs(bucket), name).zero_(),
        )

    return plant


def leaking_padding(patch: pytest.MonkeyPatch) -> None:
    """A row past the real ones that is added to one of them, eagerly too."""
    forward = TorchNativeBackend.forward

    def changed(self, module, q, k, v, out) -> None:
        forward(self, module, q, k, v, out)
        out[0] += q[-1]

    patch.setattr(TorchNativeBackend, "forward", changed)


def no_last_segment(patch: pytest.MonkeyPatch) -> None:
    """What follows the last break is not run."""
    in_replays(
        patch,
        lambda graphs, *_: setattr(graphs.graphs[BUCKET], "_run", graphs.graphs[BUCKET]._run[:6]),
    )


FAULTS: dict[str, tuple[Fault, str, int | None, str]] = {
    # what differs, the first layer that does, and where in it
    "stale lengths": (stale_lengths, "hidden", 0, "in break 0, Attention.mix of model.layers.0"),
    "prefix off by one": (
        prefix_off_by_one,
        "hidden",
        0,
        "in break 0, Attention.mix of model.layers.0",
    ),
    "dropped last token": (dropped_last_token, "hidden", 0, "in break 0, Attention.mix of"),
    "wrong in layer 1": (
        wrong_in_layer_1,
        "hidden",
        1,
        "in break 1, Attention.mix of model.layers.1",
    ),
    "NaN in layer 2": (nan_in_layer_2, "hidden", 2, "in break 2, Attention.mix of model.layers.2"),
    "stale positions": (stale_buffer("positions"), "hidden", 0, "in the segment before break 0,"),
    "stale embeddings": (stale_buffer("hidden_states"), "hidden", 0, "in the segment before break"),
    "stale slots": (stale_buffer("out_cache_loc"), "keys of", 0, "what it stores is at fault"),
    "leaking padding": (
        leaking_padding,
        "hidden",
        0,
        "in break 0, Attention.mix of model.layers.0",
    ),
    "no last segment": (no_last_segment, "hidden", None, "in the segments after"),
}


def check_found(runner: ModelRunner, result: ForwardResult) -> None:
    """Run the check that is due; it leaves all states and each slot of a request as they were."""
    assert result.verification is not None
    before = [buffer.clone() for buffer in pools(runner)]
    result.verification()
    for now, was in zip(pools(runner), before, strict=True):
        rows = slice(1, None) if len(now) == runner.kv_pool.num_slots else torch.arange(len(now))
        if not isinstance(rows, slice):
            assert runner.mamba_pool is not None
            rows = rows[rows != runner.mamba_pool.reserved_slot]
        assert torch.equal(now[rows].view(torch.uint8), was[rows].view(torch.uint8))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_on_the_first_prefill(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    plant, what, layer, place = FAULTS[name]
    runner = make_runner(folder)
    batch = make_batch(runner)
    plant(monkeypatch)
    result = runner.forward(batch)
    assert result.dispatch.bucket == BUCKET and result.next_token_logits is not None
    check_found(runner, result)
    assert runner.verifier is not None and runner.graph_runner is not None
    assert runner.verifier.outcomes == {"same": 0, "different": 1, "skipped": 0}
    (found,) = runner.verifier.mismatches
    assert found.what.startswith(what) and found.layer == layer and place in found.place, found
    assert found.error > found.bound == 1e-4
    (line,) = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert "30 tokens of 3 requests (new 9 20 1, behind cached 0 31 12)" in line
    assert "bucket 64" in line and place in line and "out of service" in line

    again = runner.forward(batch)
    assert again.dispatch.reason is DispatchReason.OUT_OF_SERVICE and again.verification is None
    assert runner.dispatch_counts == {
        DispatchReason.REPLAYED: 1,
        DispatchReason.OUT_OF_SERVICE: 1,
    }
    said = runner.explain(batch)
    assert "run eagerly: bucket 64 is out of service" in said and place in said


def test_other_buckets_stay_in_service(folder: Path, monkeypatch: pytest.MonkeyPatch):
    runner = make_runner(folder)
    with monkeypatch.context() as patch:
        stale_lengths(patch)
        check_found(runner, runner.forward(make_batch(runner)))
    small = ForwardBatch.from_requests([[1, 2, 3]], [[7, 8, 9]], rows=np.array([0]))
    result = runner.forward(small)
    assert result.dispatch.bucket == 16
    check_found(runner, result)
    assert runner.verifier is not None and runner.verifier.verified == 1


def test_a_fault_that_does_not_come_again_is_said_to_be_unsteady(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    runner = make_runner(folder)
    with monkeypatch.context() as patch:
        stale_lengths(patch)
        result = runner.forward(make_batch(runner))
    check_found(runner, result)
    assert runner.verifier is not None
    assert "not steady" in runner.verifier.mismatches[0].place


def test_a_mismatch_stands_where_its_place_cannot_be_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    runner = make_runner(folder)
    stale_lengths(monkeypatch)

    def fail(*how) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PrefillVerifier, "_replay", fail)
    check_found(runner, runner.forward(make_batch(runner)))
    assert runner.verifier is not None and runner.graph_runner is not None
    assert runner.verifier.mismatches[0].place.startswith("not found, for OutOfMemoryError")
    assert runner.graph_runner.out_of_service == {BUCKET}


def no_initial_state(patch: pytest.MonkeyPatch) -> None:
    """Requests that go on from cached tokens start from zeros."""
    extend = Mamba2Recurrence.extend

    def changed(self, plan, *tensors) -> None:
        if is_in_breakable_cuda_graph():
            plan = dataclasses.replace(plan, initial_slots=torch.full_like(plan.initial_slots, -1))
        extend(self, plan, *tensors)

    patch.setattr(Mamba2Recurrence, "extend", changed)


def no_final_state(patch: pytest.MonkeyPatch) -> None:
    """The states after the last token are left to nobody."""
    extend = Mamba2Recurrence.extend

    def changed(self, plan, *tensors) -> None:
        if is_in_breakable_cuda_graph():
            plan = dataclasses.replace(plan, final_slots=torch.full_like(plan.final_slots, 16))
        extend(self, plan, *tensors)

    patch.setattr(Mamba2Recurrence, "extend", changed)


@pytest.mark.parametrize(
    ("plant", "what", "place"),
    [
        (no_initial_state, "hidden", "in break 0, Mamba2Recurrence.mix of model.layers.0"),
        (no_final_state, "convolution inputs of", "what it stores is at fault"),
    ],
)
def test_a_fault_of_a_recurrent_state_is_found(
    plant: Fault,
    what: str,
    place: str,
    hybrid_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    runner = make_runner(hybrid_folder)
    plant(monkeypatch)
    check_found(runner, runner.forward(make_batch(runner)))
    assert runner.verifier is not None
    (found,) = runner.verifier.mismatches
    assert found.what.startswith(what) and found.layer == 0 and place in found.place, found


@pytest.mark.parametrize("capture", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_of_a_hybrid_starts_from_the_states_before_and_leaves_those_after(
    hybrid_folder: Path, capture: int, dtype: str
):
    runner = make_runner(hybrid_folder, linear_attention_capture=capture, dtype=dtype)
    for seed in range(3):
        check_found(runner, runner.forward(make_batch(runner, seed)))
    assert runner.verifier is not None
    assert runner.verifier.outcomes == {"same": 3, "different": 0, "skipped": 0}


def mixed_prompts(count: int) -> list[list[int]]:
    """Short ones and long ones that go in chunks, many with a beginning in common."""
    draw = np.random.default_rng(1)
    shared = draw.integers(1, VOCAB, 150).tolist()
    prompts = []
    for _ in range(count):
        new = draw.integers(1, VOCAB, int(draw.choice([1, 3, 9, 20, 40, 90]))).tolist()
        prompts.append(shared[: int(draw.choice([0, 0, 16, 70, 150]))] + new)
    return prompts


@pytest.mark.parametrize("name", ["dense", *HYBRIDS])
def test_a_sound_model_passes_200_mixed_prompts_and_answers_as_without(
    name: str, folder: Path, tmp_path: Path
):
    path = folder if name == "dense" else save_hybrid(name, tmp_path)
    flags = {**GRAPHS, "chunked_prefill_size": 160, "max_mamba_cache_size": 24}
    answers, prompts = [], mixed_prompts(200)
    for rate in (0.0, 1.0):
        with make_hybrid_engine(path, **flags, verify_prefill_graph=rate) as engine:
            answers.append([r.token_ids for r in engine.generate(prompts, 3)])
            verifier, statistics = engine.runner.verifier, engine.statistics
            assert (verifier is None) == (rate == 0)
    assert verifier is not None and statistics.cached_tokens > 1000
    assert verifier.outcomes == {"same": statistics.replays, "different": 0, "skipped": 0}
    assert set(statistics.reasons) == {"replayed"} and statistics.replays > 50
    assert answers[0] == answers[1]


@pytest.mark.parametrize("flags", [{"is_embedding": True}, {"debug_cuda_graph": True}])
def test_embeddings_and_debug_mode_are_verified_too(folder: Path, flags: dict[str, Any]):
    with make_hybrid_engine(folder, **VERIFIED | flags) as engine:
        prompts = mixed_prompts(5)
        if engine.args.is_embedding:
            engine.embed([prompt[:100] for prompt in prompts])
        else:
            engine.generate(prompts, 2)
        assert engine.runner.verifier is not None
        assert engine.runner.verifier.verified == engine.statistics.replays > 0


@pytest.mark.parametrize(
    ("rate", "count", "turns"),
    [
        (1.0, 3, [1, 2, 3]),
        (0.5, 6, [2, 4, 6]),
        (0.3, 10, [4, 7, 10]),
        (0.01, 250, [100, 200]),
    ],
)
def test_every_so_manieth_replay_is_chosen(folder: Path, rate: float, count: int, turns: list[int]):
    runner = make_runner(folder, verify_prefill_graph=rate)
    verifier, graphs = runner.verifier, runner.graph_runner
    assert verifier is not None and graphs is not None
    batch = make_batch(runner)
    chosen = [verifier.begin(graphs, batch, BUCKET) is not None for _ in range(count)]
    assert [i + 1 for i, one in enumerate(chosen) if one] == turns


def test_nothing_is_verified_that_did_not_replay_or_is_no_prefill(folder: Path):
    assert make_runner(folder, verify_prefill_graph=0.0).verifier is None
    runner = make_runner(folder)
    assert runner.forward(make_batch(runner), allow_graph=False).verification is None
    assert runner.verifier is not None and runner.verifier.replays == 0
    off = make_runner(folder, enable_breakable_cuda_graph=False)
    assert off.verifier is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("odd")])
def test_a_check_that_fails_itself_harms_nobody(
    hybrid_folder: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    runner = make_runner(hybrid_folder)
    result = runner.forward(make_batch(runner))
    forward, calls = TorchNativeBackend.forward, []

    def fail(self, *how) -> None:
        calls.append(how)
        forward(self, *how)
        raise error

    monkeypatch.setattr(TorchNativeBackend, "forward", fail)
    check_found(runner, result)
    assert calls and runner.verifier is not None
    assert runner.verifier.outcomes == {"same": 0, "different": 0, "skipped": 1}
    assert "was not verified, for" in caplog.text and str(error) in caplog.text


# In service.


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[AsyncEngine]:
    save_byte_model(tmp_path)
    flags = {"device": "cpu", "max_total_tokens": 512, "chunked_prefill_size": 64}
    graphs = {**VERIFIED, "piecewise_cuda_graph_tokens": (16, 64), "prefill_dispatch": "always"}
    engine = AsyncEngine(ServerArgs(model_path=str(tmp_path), **flags | graphs))
    engine.start()
    yield engine
    engine.shutdown(10)
    assert engine._scheduler.idle_and_empty


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited 10 seconds in vain"
        time.sleep(0.002)


ONE = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)


async def answer(engine: AsyncEngine, prompt: list[int]) -> tuple[list[int], Any]:
    outputs = [output async for output in engine.submit(prompt, ONE)]
    return [token for output in outputs for token in output.token_ids], outputs[-1]


def ask(engine: AsyncEngine, prompt: list[int]) -> tuple[list[int], Any]:
    return asyncio.run(asyncio.wait_for(answer(engine, prompt), 20))


def test_the_reply_is_out_before_the_check_begins(
    serving: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    run, replied = PrefillVerifier.run, threading.Event()

    def after_the_reply(self, check) -> None:
        assert replied.wait(10)
        run(self, check)

    monkeypatch.setattr(PrefillVerifier, "run", after_the_reply)
    tokens, last = ask(serving, [5] * 40)
    assert len(tokens) == 1 and last.finish_reason == "length" and last.bucket == 64
    assert serving.snapshot().verifications == {"same": 0, "different": 0, "skipped": 0}
    replied.set()
    wait_until(lambda: serving.snapshot().verifications["same"] == 1)


def test_a_fault_in_service_costs_nobody_the_answer(
    serving: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    dropped_last_token(monkeypatch)
    tokens, last = ask(serving, [5] * 40)
    assert len(tokens) == 1 and last.error is None and last.bucket == 64
    wait_until(lambda: serving.snapshot().verifications["different"] == 1)
    tokens, last = ask(serving, [6] * 40)
    assert len(tokens) == 1 and last.bucket is None and last.reason == "bucket_out_of_service"
    now = serving.snapshot()
    assert now.dispatch_counts == {"replayed": 1, "bucket_out_of_service": 1}
    assert now.buckets_out_of_service == 1 and serving.healthy
    assert "bucket 64 is out of service" in serving.explain([[7] * 40])
    assert "Attention.mix" in caplog.text


def test_metrics_count_checks_and_buckets_out_of_service(monkeypatch: pytest.MonkeyPatch):
    support = pytest.importorskip("server.support")
    with support.running(verify_prefill_graph=1.0, prefill_dispatch="always") as server:

        def complete(token: int, count: int) -> dict[str, Any]:
            body = {"prompt": [token] * count, "max_tokens": 2, "ignore_eos": True}
            with server.http() as http:
                answered = http.post("/v1/completions", json=body)
            assert answered.status_code == 200
            return answered.json()["choices"][0]["prefill"]

        assert complete(3, 12)["bucket"] == 16
        support.wait_for(lambda: server.engine.snapshot().verifications["same"] == 1)
        stale_buffer("positions")(monkeypatch)
        assert complete(4, 28)["bucket"] == 32
        support.wait_for(lambda: server.metric("breakgraph_prefill_buckets_out_of_service") == 1)
        assert complete(5, 28)["reason"] == "bucket_out_of_service"
        with server.http() as http:
            text = http.get("/metrics").text
        assert 'breakgraph_prefill_verifications_total{outcome="same"} 1.0' in text
        assert 'breakgraph_prefill_verifications_total{outcome="different"} 1.0' in text
        assert 'breakgraph_prefill_forwards_total{reason="bucket_out_of_service"} 1.0' in text


# The measure.


def test_an_error_is_a_share_of_the_row():
    expected = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    got = expected.clone()
    assert row_error(got, expected).tolist()[0] == 0
    got[1, 0] += 5
    error, row = row_error(got, expected).tolist()
    assert error == pytest.approx(0.1) and row == 1
    got = expected.clone()
    got[2, 0] += 0.05  # of a row of nothing: judged by a tenth of the median row's norm, 5
    error, row = row_error(got, expected).tolist()
    assert error == pytest.approx(0.1) and row == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_must_be_so_both_ways(value: float):
    expected = torch.ones(4, 2, 3)
    got = expected.clone()
    got[2, 1, 0] = value
    assert row_error(got, expected).tolist() == [float("inf"), 2]
    assert row_error(expected, got).tolist() == [float("inf"), 2]
    assert row_error(got, got.clone())[0] == 0
    other = got.clone()
    other[2, 1, 0] = 7 - value
    assert (row_error(got, other)[0] == 0) == (value != value)


def test_the_layer_is_read_from_a_module_name():
    assert layer_of("model.layers.13.self_attn.attn") == 13
    assert layer_of("hidden states") is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "nemotron_h"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_gpu_sound_models_pass_and_a_fault_is_found(
    folder: Path, hybrid_folder: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    path = folder if kind == "dense" else hybrid_folder
    with make_hybrid_engine(path, **VERIFIED, device="cuda", dtype=dtype) as engine:
        engine.generate(mixed_prompts(60), 3)
        verifier = engine.runner.verifier
        assert verifier is not None
        assert verifier.outcomes == {
            "same": engine.statistics.replays,
            "different": 0,
            "skipped": 0,
        }
        stale_buffer("hidden_states")(monkeypatch)
        engine.generate([[3] * 12], 1)
        assert len(verifier.mismatches) == 1 and "segment before" in verifier.mismatches[0].place

"""Streams from one model thread: whatever clients do, each gets its own text and nothing leaks."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import CONTEXT, END, VOCAB, save_byte_model
from models_support import make_reference, save_checkpoint

from breakgraph.engine import (
    AsyncEngine,
    Engine,
    EngineDeadError,
    Output,
    QueueFullError,
    RequestFailedError,
    SamplingParams,
    Stream,
)
from breakgraph.server_args import ServerArgs

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
LONG = SamplingParams(max_new_tokens=80, temperature=0, ignore_eos=True)
PROMPTS = [[(7 * n + 3 * i * i + i) % 250 for i in range(n)] for n in (1, 5, 17, 40, 3, 31)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_byte_model(folder)
    return folder


def make(folder: Path, **flags: Any) -> AsyncEngine:
    defaults = {"device": "cpu", "max_total_tokens": 512, "chunked_prefill_size": 32}
    return AsyncEngine(ServerArgs(model_path=str(folder), **defaults | flags))


@pytest.fixture
def engine(folder: Path) -> Iterator[AsyncEngine]:
    engine = make(folder, max_queued_requests=16)
    engine.start()
    yield engine
    engine.shutdown(10)
    assert_empty(engine)


def assert_empty(engine: AsyncEngine) -> None:
    assert engine._scheduler.idle_and_empty and not engine._streams
    engine._scheduler.kv.flush()
    assert engine.runner.requests.is_empty


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited 10 seconds in vain"
        time.sleep(0.002)


async def collect(stream: Stream) -> list[Output]:
    return [output async for output in stream]


def run(awaitable: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(awaitable, 20))


def test_streams_give_what_the_offline_engine_gives(folder: Path, engine: AsyncEngine):
    async def all_at_once() -> list[list[Output]]:
        streams = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
        return await asyncio.gather(*map(collect, streams))

    answers = run(all_at_once())
    with Engine(engine.args) as offline:
        expected = offline.generate(PROMPTS, sampling_params=GREEDY)
    for prompt, outputs, result in zip(PROMPTS, answers, expected, strict=True):
        assert [token for o in outputs for token in o.token_ids] == result.token_ids
        assert "".join(o.text for o in outputs) == result.text
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        last = outputs[-1]
        assert last.finish_reason == result.finish_reason and last.error is None
        assert last.prompt_tokens == len(prompt)
        assert last.completion_tokens == len(result.token_ids)
        assert last.reason == "graphs_disabled" and last.bucket is None


def test_a_slow_reader_finds_one_merged_output(engine: AsyncEngine):
    stream = engine.submit(PROMPTS[2], LONG)
    wait_until(lambda: stream._ended)  # counted it is a moment before
    outputs = run(collect(stream))
    assert len(outputs) == 1
    assert len(outputs[0].token_ids) == CONTEXT - 17 == outputs[0].completion_tokens
    assert outputs[0].finish_reason == "length"


def test_a_reader_may_be_in_any_loop(engine: AsyncEngine):
    texts: list[str] = []

    def read(stream: Stream) -> None:
        texts.append("".join(o.text for o in run(collect(stream))))

    threads = [
        threading.Thread(target=read, args=[engine.submit(PROMPTS[3], GREEDY)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 3 and len(set(texts)) == 1


def test_a_closed_loop_is_no_ones_problem(engine: AsyncEngine):
    abandoned, waiting = engine.submit(PROMPTS[1], LONG), []

    async def start_reading() -> None:
        await abandoned.__anext__()
        waiting.append(asyncio.ensure_future(abandoned.__anext__()))
        await asyncio.sleep(0)

    asyncio.run(start_reading())
    assert run(collect(engine.submit(PROMPTS[1], GREEDY)))[-1].finished
    abandoned.abort()


def test_log_probabilities_come_with_their_tokens(engine: AsyncEngine):
    params = SamplingParams(max_new_tokens=4, temperature=0, logprobs=2, prompt_logprobs=True)
    outputs = run(collect(engine.submit(PROMPTS[2], params)))
    prompt = outputs[0].prompt_logprobs
    assert prompt is not None and prompt[0] is None and len(prompt) == 17
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    for output in outputs:
        assert output.logprobs is not None
        assert [one.token_id for one in output.logprobs] == output.token_ids
        for one in output.logprobs:
            assert len(one.top) == 2 and one.top[0] == (one.token_id, one.logprob)


def test_abort_at_every_stage(engine: AsyncEngine):
    async def first_then_abort() -> Output:
        stream = engine.submit(PROMPTS[1], LONG)
        await stream.__anext__()
        stream.abort()
        return (await collect(stream))[-1]

    async def abort_at_once() -> Output:
        stream = engine.submit(PROMPTS[3], LONG)
        stream.abort()
        return (await collect(stream))[-1]

    for case in (first_then_abort, abort_at_once):
        last = run(case())
        assert last.finished and last.finish_reason in ("abort", "length")
    stream = engine.submit(PROMPTS[0], GREEDY)
    run(collect(stream))
    stream.abort()
    wait_until(lambda: engine.snapshot().running == 0)


def test_a_deadline_ends_a_request_as_it_is(engine: AsyncEngine):
    assert run(collect(engine.submit([1], LONG, deadline_seconds=0)))[-1].token_ids == []
    last = run(collect(engine.submit([1], LONG, deadline_seconds=0)))[-1]
    assert last.finish_reason == "deadline" and last.error is None


def test_bad_requests_are_refused_at_once(engine: AsyncEngine):
    for prompt, message in (
        ([], "the prompt is empty"),
        ([VOCAB], f"the prompt has token {VOCAB}"),
        ([1] * CONTEXT, f"context of {CONTEXT + 1} tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, GREEDY)
    with pytest.raises(ValueError, match="--is-embedding"):
        run(engine.encode([1]))
    with pytest.raises(ValueError, match="at least one label"):
        run(engine.score([1], []))
    with pytest.raises(ValueError, match=f"label token {VOCAB}"):
        run(engine.score([1], [1, VOCAB]))


def test_a_full_queue_refuses(engine: AsyncEngine, monkeypatch):
    release, step = threading.Event(), engine._scheduler.step

    def held_up():
        release.wait(10)
        return step()

    monkeypatch.setattr(engine._scheduler, "step", held_up)
    streams = []
    with pytest.raises(QueueFullError, match="--max-queued-requests"):
        for _ in range(40):
            streams.append(engine.submit([1, 2], GREEDY))
    assert 16 <= len(streams) <= 17
    release.set()
    for stream in streams:
        assert run(collect(stream))[-1].finish_reason in ("stop", "length")


def test_scores_are_the_labels_log_probabilities(folder: Path, engine: AsyncEngine):
    with Engine(engine.args) as offline:
        logits = offline.prefill([PROMPTS[3]])[0].next_token_logits
    expected = logits.log_softmax(-1)[[3, 7, 9]]
    for _ in range(2):  # the second finds the prompt cached
        scores = torch.tensor(run(engine.score(PROMPTS[3], [3, 7, 9])))
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_embeddings_and_class_logits(folder: Path, tmp_path: Path):
    classifier = make_reference("Qwen3ForSequenceClassification", num_labels=3, head_dim=8)
    save_checkpoint(classifier, tmp_path)
    for engine in (
        make(folder, is_embedding=True),
        make(tmp_path, skip_tokenizer_init=True),
    ):
        engine.start()
        prompt = list(range(5, 25))
        with Engine(engine.args) as offline:
            expected = offline.embed([prompt])[0]
        vector = torch.tensor(run(engine.encode(prompt)))
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="needs logits"):
            engine.submit([1], GREEDY)
        engine.shutdown(1)
        assert_empty(engine)


def test_a_cancelled_call_gives_back_its_slots(folder: Path):
    engine = make(folder, is_embedding=True)
    engine.start()

    async def cancel() -> None:
        task = asyncio.ensure_future(engine.encode([1, 2, 3]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancel())
    engine.shutdown(5)
    assert_empty(engine)


def test_a_failed_forward_fails_its_requests_alone(engine: AsyncEngine, monkeypatch, caplog):
    forward = engine.runner.forward

    def fail_once(batch, **how):
        monkeypatch.setattr(engine.runner, "forward", forward)
        raise ArithmeticError("one bad batch")

    monkeypatch.setattr(engine.runner, "forward", fail_once)
    last = run(collect(engine.submit(PROMPTS[1], GREEDY)))[-1]
    assert last.finish_reason == "error" and last.error == "ArithmeticError: one bad batch"
    assert engine.healthy and engine.failure is None
    assert "fail_once" in caplog.text  # the traceback, whole
    assert run(collect(engine.submit(PROMPTS[1], GREEDY)))[-1].error is None


@pytest.mark.parametrize("where", ["forward", "step"])
def test_a_dead_model_thread_is_said_to_everyone(folder: Path, monkeypatch, caplog, where: str):
    engine = make(folder)
    assert not engine.healthy
    with pytest.raises(EngineDeadError, match="not started"):
        engine.submit([1], GREEDY)
    engine.start()
    assert engine.healthy
    target = engine.runner if where == "forward" else engine._scheduler

    def fail(*batch: Any, **how: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(target, where, fail)
    with caplog.at_level(logging.CRITICAL):
        last = run(collect(engine.submit([1, 2], GREEDY)))[-1]
    assert last.finish_reason == "error" and "illegal memory" in (last.error or "")
    wait_until(lambda: not engine.healthy)
    assert engine.failure is not None and "illegal memory" in engine.failure
    with pytest.raises(EngineDeadError, match="illegal memory"):
        engine.submit([1], GREEDY)
    engine.shutdown()


def test_shutdown_drains(folder: Path):
    engine = make(folder)
    engine.start()
    streams = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    engine.shutdown(10)
    assert not engine.healthy and engine.failure is None
    assert all(run(collect(s))[-1].finish_reason in ("stop", "length") for s in streams)
    with pytest.raises(EngineDeadError, match="shutting down"):
        engine.submit([1], GREEDY)
    engine.shutdown()
    assert_empty(engine)
    with pytest.raises(RuntimeError, match="started before"):
        engine.start()


def test_shutdown_aborts_what_takes_too_long(folder: Path, monkeypatch):
    engine = make(folder)
    step = engine._scheduler.step

    def slow():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine._scheduler, "step", slow)
    engine.start()
    stream = engine.submit([1], LONG)
    engine.shutdown(0.1)
    assert run(collect(stream))[-1].finish_reason == "abort"
    assert_empty(engine)


def test_a_failed_result_is_an_error(folder: Path, monkeypatch):
    engine = make(folder, is_embedding=True)

    def fail(batch, **how):
        raise ArithmeticError("no")

    monkeypatch.setattr(engine.runner, "forward", fail)
    engine.start()
    with pytest.raises(RequestFailedError, match="ArithmeticError: no"):
        run(engine.encode([1]))
    engine.shutdown(1)
    assert_empty(engine)


def test_snapshot_and_explain(folder: Path):
    engine = make(
        folder, enable_breakable_cuda_graph=True, piecewise_cuda_graph_tokens=[16, 32], page_size=4
    )
    assert engine.snapshot().last_prefill is None
    engine.start()
    for _ in range(2):
        run(collect(engine.submit(PROMPTS[2], GREEDY)))
    wait_until(lambda: engine.snapshot().requests == 2)
    now = engine.snapshot()
    assert (now.queued, now.running, now.prompt_tokens, now.cached_tokens) == (0, 0, 34, 16)
    assert now.dispatch_counts == {"replayed": 2} and now.bucket_hits == {32: 1, 16: 1}
    assert 0 < now.padding < 1 and now.generated_tokens > 0
    assert now.free_kv_tokens == 512 and now.used_kv_tokens == 0 < now.cached_kv_tokens
    last = now.last_prefill
    assert last is not None and (last.tokens, last.bucket, last.padding_rows) == (1, 16, 15)
    assert last.breaks == 2 and last.segments == 3 and "bucket 16" in last.text and last.ms > 0
    assert "bucket 32" in engine.explain([[1] * 30])
    engine.shutdown(1)
    assert_empty(engine)


def test_random_clients_leave_nothing_behind(engine: AsyncEngine):
    """Many requests, a third of them aborted at some time: every other is answered in full."""

    async def client(number: int) -> bool:
        prompt = PROMPTS[number % len(PROMPTS)]
        stream = engine.submit(prompt, GREEDY)
        if number % 3:
            return (await collect(stream))[-1].finish_reason in ("stop", "length")
        for _ in range(number % 7):
            try:
                await stream.__anext__()
            except StopAsyncIteration:
                return True
        stream.abort()
        return (await collect(stream) or [None])[-1] is None or True

    async def wave(start: int) -> list[bool]:
        return await asyncio.gather(*[client(start + i) for i in range(15)])

    for start in range(0, 120, 15):
        assert all(run(wave(start)))
    assert END not in PROMPTS[0]

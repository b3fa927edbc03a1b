"""Whatever runs beside a request, is cached, or is taken from it: it generates the same tokens."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import HistoryRunner, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.engine.dry_run import dry_run
from breakgraph.engine.request import Request, Want
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.scheduler import MAX_PREFILLS, Scheduler, Update
from breakgraph.engine.stopping import StopRule
from breakgraph.forward import ForwardMode

GREEDY = SamplingParams(temperature=0)
END = 0


def request(ids: Sequence[int], new: int = 4, params: SamplingParams = GREEDY, **fields: Any):
    rule = StopRule(None, frozenset())
    return Request(list(ids), params, len(ids) + new, **{"rule": rule} | fields)


def run(scheduler: Scheduler, limit: int = 10_000) -> list[Update]:
    updates = []
    for _ in range(limit):
        if not scheduler.has_work:
            break
        updates += scheduler.step()
    assert not scheduler.has_work
    check_empty(scheduler)
    return updates


def check_empty(scheduler: Scheduler) -> None:
    assert scheduler.idle_and_empty
    scheduler.kv.flush()
    assert scheduler.kv.table.is_empty


def steps_until(scheduler: Scheduler, reached, limit: int = 200) -> int:
    for step in range(limit):
        if reached():
            return step
        scheduler.step()
    raise AssertionError(f"not reached in {limit} steps")


work = st.lists(
    st.tuples(
        st.integers(1, 3),  # which prompt it begins with
        st.integers(1, 40),  # tokens of it
        st.lists(st.integers(1, 9), max_size=3),  # and what follows
        st.integers(1, 12),  # new tokens
        st.booleans(),  # greedy
        st.sampled_from(["run", "run", "run", "abort", "late"]),
        st.booleans(),  # prompt logprobs
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    work=work,
    chunk=st.integers(1, 24),
    rows=st.integers(1, 6),
    page=st.sampled_from([1, 4]),
    spare=st.sampled_from([0, 3, 20, 300]),
    headroom=st.sampled_from([0, 2, 64]),
    caching=st.booleans(),
)
def test_each_request_generates_what_it_would_alone(
    work, chunk, rows, page, spare, headroom, caching
):
    """Shared prefixes, chunks, tiny pools, retractions and aborts against a loop without any."""
    need = max(length + len(tail) + new for _, length, tail, new, *_ in work) - 1
    pool = (need + spare + page - 1) // page * page
    runner = HistoryRunner(
        chunk_size=min(chunk, pool), max_running_requests=rows, num_tokens=pool, page_size=page
    )
    scheduler = Scheduler(runner, cache_prefixes=caching, headroom=headroom)
    requests, late = [], []
    for kind, length, tail, new, greedy, fate, echo in work:
        ids = [kind, *[10 + i % 17 for i in range(length - 1)], *tail]
        params = SamplingParams(
            temperature=0 if greedy else 1.0, frequency_penalty=0.5, prompt_logprobs=echo
        )
        one = request(ids, new, params, rule=StopRule(None, frozenset([END])))
        requests.append((one, fate))
        (late.append if fate == "late" else scheduler.add)(one)
    for step in range(10_000):
        if step % 5 == 4 and late:
            scheduler.add(late.pop())
        if step == 6:
            for one, fate in requests:
                if fate == "abort":
                    scheduler.abort(one)
        if not scheduler.has_work and not late:
            break
        scheduler.step()
    check_empty(scheduler)
    for one, fate in requests:
        expected = runner.expected(one)
        if one.finish_reason == "abort":
            assert fate == "abort" and one.new_ids == expected[: one.num_new]
            continue
        assert one.error is None
        assert one.new_ids == expected
        assert one.finish_reason == ("stop" if expected[-1] == END else "length")
        if one.params.prompt_logprobs:
            wanted = [
                runner.logits(one.ids[:end]).log_softmax(-1)[one.ids[end]].item()
                for end in range(1, one.prompt_len)
            ]
            np.testing.assert_allclose(one.prompt_logprobs, wanted, atol=1e-5)


def test_a_tiny_pool_retracts_and_gives_the_same_texts():
    def texts(num_tokens: int, params: SamplingParams) -> tuple[list[list[int]], int]:
        scheduler = Scheduler(HistoryRunner(num_tokens=num_tokens), headroom=0)
        requests = [request([i, *range(1, 10)], 20, params) for i in range(1, 7)]
        for one in requests:
            scheduler.add(one)
        run(scheduler)
        return [one.new_ids for one in requests], scheduler.statistics.retractions

    for params in (GREEDY, SamplingParams(temperature=1.2, top_p=0.9, seed=3)):
        roomy, none = texts(400, params)
        tight, some = texts(32, params)
        assert roomy == tight and none == 0 < some


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_prompts_log_probabilities_survive_a_retraction(caching: bool, steps: int):
    runner = HistoryRunner(chunk_size=8, page_size=4)
    scheduler = Scheduler(runner, cache_prefixes=caching)
    params = SamplingParams(temperature=0, prompt_logprobs=True)
    one = request([1 + i % 30 for i in range(30)], 12, params)
    scheduler.add(one)
    for _ in range(steps):
        scheduler.step()
    scheduler._retract(one)
    run(scheduler)
    wanted = [runner.logits(one.ids[:n]).log_softmax(-1)[one.ids[n]].item() for n in range(1, 30)]
    np.testing.assert_allclose(one.prompt_logprobs, wanted, atol=1e-5)
    assert one.new_ids == runner.expected(one)


def test_the_oldest_is_never_retracted_and_all_end_in_order_of_age():
    scheduler = Scheduler(HistoryRunner(num_tokens=40), headroom=0)
    requests = [request([i, 1, 2, 3], 30) for i in range(1, 6)]
    for one in requests:
        scheduler.add(one)
    ended: list[int] = []
    while scheduler.has_work:
        ended += [u.request.number for u in scheduler.step() if u.request.finish_reason]
        if scheduler.running:
            oldest = min(one.number for one in requests if one.finish_reason is None)
            assert oldest in scheduler.running
    check_empty(scheduler)
    assert ended == sorted(ended) and scheduler.statistics.retractions > 0


def test_a_hit_shortens_the_prefill_and_always_leaves_a_token():
    runner = HistoryRunner(page_size=4)
    scheduler = Scheduler(runner)
    prompt = list(range(1, 13))
    for _ in range(2):
        scheduler.add(request(prompt))
        run_keeping(scheduler)
    longer = request([*prompt, 20, 21])
    scheduler.add(longer)
    run_keeping(scheduler)
    lengths = [b.num_tokens for b in runner.batches if b.mode is ForwardMode.PREFILL]
    assert lengths == [12, 4, 2]
    assert longer.cached_tokens == 12 and longer.new_ids == runner.expected(longer)
    assert scheduler.statistics.cached_tokens == 8 + 12
    check_empty(scheduler)


def run_keeping(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        scheduler.step()


def test_a_running_prompt_is_shared_before_it_ends():
    runner = HistoryRunner()
    scheduler = Scheduler(runner)
    first, second = request([1, 2, 3, 4, 5], 20), request([1, 2, 3, 4, 5], 3)
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    run(scheduler)
    assert second.cached_tokens == 4
    assert second.new_ids == first.new_ids[:3] == runner.expected(second)


def test_without_a_cache_nothing_is_shared():
    scheduler = Scheduler(HistoryRunner(), cache_prefixes=False)
    for _ in range(2):
        scheduler.add(request([1, 2, 3]))
        run_keeping(scheduler)
        assert scheduler.kv.table.is_empty
    assert scheduler.statistics.cached_tokens == 0


@pytest.mark.parametrize("short", [3, 8, 9, 16])
def test_short_requests_answer_while_a_long_one_chunks(short: int):
    runner = HistoryRunner(chunk_size=16, num_tokens=400)
    scheduler = Scheduler(runner)
    long = request(range(1, 161), 1)
    scheduler.add(long)
    scheduler.step()
    while not long.num_new:
        one = request([30] * short, 1)
        scheduler.add(one)
        assert steps_until(scheduler, lambda one=one: one.num_new) <= 2
    # Half of every second forward, at the least, was its own.
    assert len(runner.batches) <= 4 * 10 + 2
    run(scheduler)


def test_a_flood_of_short_requests_does_not_starve_a_long_one():
    scheduler = Scheduler(HistoryRunner(chunk_size=16, num_tokens=400, max_running_requests=64))
    long = request([1 + i % 30 for i in range(160)], 1)
    scheduler.add(long)
    numbers = itertools.count()

    def flood() -> bool:
        while len(scheduler.waiting) < 8:
            number = next(numbers)
            scheduler.add(request([number // 30 % 30, number % 30] * 8, 1))
        return long.num_new > 0

    assert steps_until(scheduler, flood) <= 4 * 10
    run(scheduler)


def test_decoding_goes_on_while_prompts_come():
    scheduler = Scheduler(HistoryRunner(chunk_size=16, num_tokens=800, max_running_requests=64))
    first = request([1, 2, 3], 10)
    scheduler.add(first)

    def flood() -> bool:
        while len(scheduler.waiting) < 8:
            scheduler.add(request([9] * 3, 1))
        return first.finish_reason is not None

    assert steps_until(scheduler, flood) <= 10 * (MAX_PREFILLS + 1)
    run(scheduler)


def test_short_prompts_share_a_forward_and_are_never_cut():
    runner = HistoryRunner(chunk_size=10)
    requests = [request([i] * n, 1, want=Want.NOTHING) for i, n in enumerate([4, 3, 6, 25, 2])]
    batches = dry_run(runner, requests)
    assert [b.extend_lens.tolist() for b in batches] == [
        [4, 3],
        [6, 4],
        [2, 8],
        [10],
        [3],
    ]
    assert runner.requests.is_empty and not runner.batches


def test_more_run_than_a_forward_holds_and_all_get_their_turn():
    runner = HistoryRunner(chunk_size=3)
    scheduler = Scheduler(runner)
    requests = [request([i], 6) for i in range(1, 9)]
    for one in requests:
        scheduler.add(one)
    run(scheduler)
    assert all(one.new_ids == runner.expected(one) for one in requests)


@pytest.mark.parametrize("steps", range(0, 16, 3))
def test_abort_at_every_stage_gives_everything_back(steps: int):
    runner = HistoryRunner(num_tokens=48, max_running_requests=3)
    scheduler = Scheduler(runner, headroom=0)
    requests = [request([i] * n, 9) for i, n in enumerate([3, 35, 10, 2, 20], start=1)]
    for one in requests:
        scheduler.add(one)
    for _ in range(steps):
        scheduler.step()
    left = [one for one in requests if one.finish_reason is None]
    for one in left:
        assert [u.request for u in scheduler.abort(one)] == [one]
        assert one.finish_reason == "abort" and scheduler.abort(one) == []
    assert not scheduler.has_work and scheduler.step() == []
    check_empty(scheduler)


def test_deadlines_end_the_waiting_and_the_running():
    scheduler = Scheduler(HistoryRunner(max_running_requests=1))
    running, waiting = request([1, 2], 50), request([3], 5)
    running.deadline = waiting.deadline = time.monotonic() + 0.05
    free = request([4], 2)
    for one in (running, waiting, free):
        scheduler.add(one)
    scheduler.step()
    time.sleep(0.06)
    run(scheduler)
    assert running.finish_reason == waiting.finish_reason == "deadline"
    assert running.num_new >= 1 and not waiting.num_new and free.finish_reason == "length"


def test_deadlines_of_the_ended_are_forgotten():
    scheduler = Scheduler(HistoryRunner())
    for _ in range(300):
        one = request([1], 1)
        one.deadline = time.monotonic() + 1000
        scheduler.add(one)
        run_keeping(scheduler)
    assert len(scheduler._deadlines) < 100


def test_prompts_that_begin_alike_and_come_together_are_computed_once():
    runner = HistoryRunner(chunk_size=256, num_tokens=500, max_running_requests=16)
    scheduler = Scheduler(runner)
    shared = [1 + i % 20 for i in range(40)]
    requests = [request([*shared, i]) for i in range(1, 9)]
    other = request([25] * 40)
    for one in [*requests, other]:
        scheduler.add(one)
    run(scheduler)
    lengths = [b.extend_lens.tolist() for b in runner.batches if b.mode is ForwardMode.PREFILL]
    assert lengths == [[41, 40], [1] * 7]
    assert all(one.new_ids == runner.expected(one) for one in requests)


def test_a_failed_forward_ends_its_requests_and_no_others():
    runner = HistoryRunner(chunk_size=8)
    scheduler = Scheduler(runner)
    first = request([1] * 6)
    second = request([2] * 6)
    for one in (first, second):
        scheduler.add(one)
    runner.fail = ArithmeticError("on fire")
    (update,) = scheduler.step()
    assert update.request is first and first.finish_reason == "error"
    assert isinstance(first.error, ArithmeticError)
    run(scheduler)
    assert second.new_ids == runner.expected(second)


def test_a_request_whose_result_is_missing_ends_with_an_error_and_holds_nothing():
    runner = HistoryRunner()  # it pools nothing
    scheduler = Scheduler(runner)
    wrong = request([1] * 6, want=Want.POOLED)
    beside = request([2] * 6)
    for one in (wrong, beside):
        scheduler.add(one)
    updates = scheduler.step()
    assert {update.request for update in updates} == {wrong, beside}
    for one in (wrong, beside):
        assert one.finish_reason == "error" and "lacks an output" in str(one.error)
    assert scheduler.idle_and_empty and scheduler.statistics.prompts == 2


def test_an_error_in_one_request_fails_that_one_alone():
    class Broken:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise UnicodeError("what is this?")

    scheduler = Scheduler(HistoryRunner())
    bad = request([1, 2], rule=StopRule(Broken(), frozenset(), ["x"]))
    good = request([3, 4], rule=StopRule(byte_tokenizer(), frozenset(), ["\0\0\0\0"]))
    for one in (bad, good):
        scheduler.add(one)
    run(scheduler)
    assert bad.finish_reason == "error" and isinstance(bad.error, UnicodeError)
    assert good.finish_reason == "length"


def test_logits_and_label_scores_beside_a_generation():
    runner = HistoryRunner(chunk_size=32)
    scheduler = Scheduler(runner)
    writer = request([5, 6])
    logits = Request([1, 2, 3], GREEDY, 3, want=Want.LOGITS, use_cache=False)
    scores = Request([1, 2, 4], GREEDY, 3, want=Want.LOGITS, labels=(7, 3))
    for one in (logits, writer, scores):
        scheduler.add(one)
    run(scheduler)
    assert writer.new_ids == runner.expected(writer)
    torch.testing.assert_close(logits.vector, runner.logits([1, 2, 3]))
    wanted = runner.logits([1, 2, 4]).log_softmax(-1)[[7, 3]]
    torch.testing.assert_close(scores.vector, wanted)

"""Recurrent states follow their tokens: cached, cut, chunked, retracted, aborted or failed."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engine_support import HistoryRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.engine import scheduler as scheduling
from breakgraph.engine.request import Request
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.scheduler import Scheduler
from breakgraph.engine.stopping import StopRule
from breakgraph.forward import ForwardBatch, ForwardMode
from breakgraph.memory import MambaPool
from breakgraph.runner.forward_result import ForwardResult

END = 0


class StateRunner(HistoryRunner):
    """A ``HistoryRunner`` with a state too: a hash of all tokens so far, and the last of them.

    Attributes:
        wrong: what each forward found in a slot that should have held another state.
    """

    def __init__(self, *, snapshots: int = 8, **sizes: int) -> None:
        super().__init__(**sizes)
        self.layer: Any = SimpleNamespace(conv_shape=(1, 1), state_shape=(1,))
        rows = len(self.requests.table)
        self.mamba_pool = MambaPool([self.layer], rows, snapshots, torch.float32, self.device)
        self.mamba_pool.bind([self.layer])
        self.wrong: list[tuple[list[int], float]] = []

    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        assert batch.rows is not None
        state, conv = self.layer.state[:, 0], self.layer.conv_state[:, 0, 0]
        if self.fail is not None:
            state[batch.rows] = -1
        result = super().forward(batch, allow_graph=allow_graph)
        prefixes = np.split(batch.prefix_slots, np.cumsum(batch.prefix_lens)[:-1])
        parts = np.split(batch.input_ids, np.cumsum(batch.extend_lens)[:-1])
        for row, slots, new in zip(batch.rows.tolist(), prefixes, parts, strict=True):
            before = self.stored[slots].tolist()
            start = (float(state[row]), float(conv[row]))
            if before and start != (digest(before), before[-1]):
                self.wrong.append((before, start[0]))
            state[row], conv[row] = digest([*before, *new.tolist()]), int(new[-1])
        return result

    @property
    def prefills(self) -> list[list[int]]:
        """New tokens of each request of each prefill."""
        return [b.extend_lens.tolist() for b in self.batches if b.mode is ForwardMode.PREFILL]


def digest(ids: Sequence[int]) -> float:
    """Exact in float32."""
    value = 0
    for token in ids:
        value = (31 * value + token + 1) % 65521
    return float(value)


def request(ids: Sequence[int], new: int = 4, **fields: Any) -> Request:
    rule = fields.pop("rule", StopRule(None, frozenset()))
    params = fields.pop("params", SamplingParams(temperature=0))
    return Request(list(ids), params, len(ids) + new, rule=rule, **fields)


def run(scheduler: Scheduler, *requests: Request) -> None:
    for one in requests:
        scheduler.add(one)
    for _ in range(10_000):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("the scheduler goes on for ever")


def check(scheduler: Scheduler, runner: StateRunner, *requests: Request) -> None:
    """No state was ever wrong, each request is right, and nothing is left behind."""
    assert runner.wrong == []
    assert all(one.error is None and one.new_ids == runner.expected(one) for one in requests)
    assert scheduler.idle_and_empty
    scheduler.kv.flush()
    assert scheduler.kv.table.is_empty and scheduler.idle_and_empty
    assert scheduler.kv.states is None or scheduler.kv.states.num_saved == 0


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 30, count).tolist()


def roomy(**sizes: int) -> StateRunner:
    return StateRunner(**({"chunk_size": 256, "num_tokens": 2000} | sizes))


work = st.lists(
    st.tuples(
        st.integers(1, 3),  # which prompt it begins with
        st.integers(1, 40),  # tokens of it
        st.lists(st.integers(1, 9), max_size=3),  # and what follows
        st.integers(1, 12),  # new tokens
        st.sampled_from(["run", "run", "run", "abort", "late", "late", "private"]),
        st.booleans(),  # prompt logprobs
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    work=work,
    chunk=st.integers(1, 24),
    rows=st.integers(1, 6),
    page=st.sampled_from([1, 4]),
    spare=st.sampled_from([0, 3, 20, 300]),
    headroom=st.sampled_from([0, 2, 64]),
    snapshots=st.sampled_from([0, 1, 2, 30]),
    worth=st.sampled_from([1, 4, 64]),
    fails=st.booleans(),
)
def test_every_forward_begins_from_the_state_of_its_prefix(
    work, chunk, rows, page, spare, headroom, snapshots, worth, fails
):
    """Shared prefixes, cuts, chunks, tiny pools, retractions, aborts and a failed forward."""
    need = max(length + len(tail) + new for _, length, tail, new, *_ in work) - 1
    pool = (need + spare + page - 1) // page * page
    runner = StateRunner(
        chunk_size=min(chunk, pool),
        max_running_requests=rows,
        num_tokens=pool,
        page_size=page,
        snapshots=snapshots,
    )
    scheduler = Scheduler(runner, headroom=headroom)
    requests, late = [], []
    for kind, length, tail, new, fate, echo in work:
        ids = [kind, *[10 + i % 17 for i in range(length - 1)], *tail]
        params = SamplingParams(temperature=0, prompt_logprobs=echo)
        rule = StopRule(None, frozenset([END]))
        one = request(ids, new, params=params, rule=rule, use_cache=fate != "private")
        requests.append((one, fate))
        (late.append if fate == "late" else scheduler.add)(one)
    with patch.multiple(scheduling, WORTH_CUTTING=worth, WORTH_WAITING=worth):
        for step in range(10_000):
            if step % 5 == 4 and late:
                scheduler.add(late.pop())
            if step == 6:
                for one, fate in requests:
                    if fate == "abort":
                        scheduler.abort(one)
            if step == 7 and fails:
                runner.fail = ArithmeticError("on fire")
            if not scheduler.has_work and not late:
                break
            scheduler.step()
    runner.fail = None
    ended = [one for one, _ in requests if one.finish_reason in ("stop", "length")]
    failed = [one for one, _ in requests if one.finish_reason == "error"]
    assert all(isinstance(one.error, ArithmeticError) for one in failed) and (fails or not failed)
    check(scheduler, runner, *ended)


def test_the_third_prompt_with_the_same_beginning_hits():
    runner = roomy()
    scheduler = Scheduler(runner)
    prompts = [request([*text(100), i, i, i]) for i in range(1, 5)]
    for one in prompts:
        run(scheduler, one)
    assert [one.cached_tokens for one in prompts] == [0, 0, 100, 100]
    assert runner.prefills == [[103], [100], [3], [3], [3]]
    check(scheduler, runner, *prompts)


def test_the_same_prompt_hits_when_it_comes_a_third_time():
    runner = roomy()
    scheduler = Scheduler(runner)
    prompts = [request(text(100)) for _ in range(3)]
    for one in prompts:
        run(scheduler, one)
    assert [one.cached_tokens for one in prompts] == [0, 0, 99]
    assert runner.prefills == [[100], [99], [1], [1]]
    check(scheduler, runner, *prompts)


@pytest.mark.parametrize("page", [1, 16])
def test_a_conversation_computes_only_what_is_new(page: int):
    """With pages, what a turn finds is what the turn before was cut at."""
    runner = roomy(page_size=page)
    scheduler = Scheduler(runner)
    ids, turns = text(100), []
    for turn in range(4):
        turns.append(request(ids, 60))
        run(scheduler, turns[-1])
        ids = [*turns[-1].ids, *text(20, seed=turn)]
    expected = [0, 159, 239, 319] if page == 1 else [0, 0, 144, 224]
    assert [one.cached_tokens for one in turns] == expected
    check(scheduler, runner, *turns)


def test_a_running_requests_prompt_is_there_for_longer_ones():
    runner = roomy()
    scheduler = Scheduler(runner)
    first, second = request(text(80), 30), request([*text(80), 1, 2])
    scheduler.add(first)
    scheduler.step()
    run(scheduler, second)
    assert second.cached_tokens == 80
    check(scheduler, runner, first, second)


def test_each_chunk_of_a_long_prompt_is_kept_and_the_cut_costs_one_forward():
    runner = roomy(chunk_size=64)
    scheduler = Scheduler(runner)
    prompts = [request([*text(290), *text(20, seed=i)], 1) for i in range(3)]
    counts = []
    for one in prompts:
        run(scheduler, one)
        counts.append(len(runner.batches) - sum(counts))
    assert [one.cached_tokens for one in prompts] == [0, 256, 256]  # 34 more are not worth it
    assert counts == [5, 1, 1]
    longer = [request([*text(255), *text(200, seed=i)], 1) for i in range(7, 10)]
    for one in longer:
        run(scheduler, one)
    assert [one.cached_tokens for one in longer] == [192, 192, 192]
    check(scheduler, runner, *prompts, *longer)


def test_a_cut_prompt_shares_its_last_forward():
    runner = roomy(chunk_size=256)
    scheduler = Scheduler(runner)
    run(scheduler, request([*text(100), 1]), request([*text(70, seed=1), 1]))
    prompts = [request([*text(100), 2, 2]), request([*text(70, seed=1), 2, 2, 2])]
    run(scheduler, *prompts, request(text(30, seed=2)))
    assert runner.prefills == [[101, 71], [100, 70, 30], [2, 3]]
    check(scheduler, runner, *prompts)


def test_prompts_wait_for_a_state_that_is_about_to_be_saved_and_for_no_other():
    runner = roomy(chunk_size=512)
    scheduler = Scheduler(runner)
    first = [request([*text(100), i]) for i in range(1, 3)]
    run(scheduler, *first)
    assert runner.prefills == [[101, 101]]
    second = [request([*text(100), i]) for i in range(3, 8)]
    run(scheduler, *second)
    assert runner.prefills[1:] == [[100], [1, 1, 1, 1, 1]]
    assert [one.cached_tokens for one in second] == [0, 100, 100, 100, 100]
    check(scheduler, runner, *first, *second)


def test_prompts_do_not_wait_for_a_state_that_saves_them_little_or_nothing():
    runner = roomy(chunk_size=512)
    scheduler = Scheduler(runner)
    same = [request(text(100)) for _ in range(2)]  # a state at its end is none for the other
    run(scheduler, *same)
    nearly = [request([*text(100), *range(1, count)]) for count in (4, 5)]
    run(scheduler, *nearly)
    assert runner.prefills == [[100, 100], [3, 4]]
    check(scheduler, runner, *same, *nearly)


def test_the_rests_of_cut_prompts_fit_the_next_forward():
    runner = roomy(chunk_size=1024, num_tokens=9000, context=1024)
    scheduler = Scheduler(runner)
    run(scheduler, *[request([*text(70, seed=i), 1], 1) for i in range(8)])
    prompts = [request([*text(70, seed=i), 2, *text(429, seed=i + 20)], 1) for i in range(8)]
    run(scheduler, *prompts)
    assert runner.prefills[1:] == [[70, 70], [430, 430]] * 4
    check(scheduler, runner, *prompts)


def test_what_a_failed_forward_left_is_not_gone_on_from():
    runner = roomy()
    scheduler = Scheduler(runner)
    failing = request(text(50), 20)
    scheduler.add(failing)
    for _ in range(5):
        scheduler.step()
    runner.fail = ArithmeticError("on fire")
    scheduler.step()
    again = request([*failing.ids, 1, 2])
    run(scheduler, again)
    assert failing.finish_reason == "error" and again.cached_tokens == 50
    check(scheduler, runner, again)


def test_short_and_private_prompts_are_never_cut():
    runner = roomy()
    scheduler = Scheduler(runner)
    for count, fields in ((60, {}), (100, {"use_cache": False})):
        prompts = [request([*text(count), i], **fields) for i in range(1, 4)]
        for one in prompts:
            run(scheduler, one)
        assert not any(one.cached_tokens for one in prompts)
    assert runner.prefills == [[61]] * 3 + [[101]] * 3
    check(scheduler, runner)


def test_a_retracted_request_goes_on_from_its_own_state():
    runner = roomy()
    scheduler = Scheduler(runner)
    one = request(text(50), 20)
    scheduler.add(one)
    for _ in range(8):
        scheduler.step()
    scheduler._retract(one)
    run(scheduler)
    assert runner.prefills == [[50], [1]]
    check(scheduler, runner, one)


def test_a_tiny_pool_retracts_and_the_states_stay_right():
    runner = StateRunner(num_tokens=32, snapshots=3)
    scheduler = Scheduler(runner, headroom=0)
    requests = [request([i, *range(1, 10)], 20) for i in range(1, 7)]
    run(scheduler, *requests)
    assert scheduler.statistics.retractions > 0
    check(scheduler, runner, *requests)


def test_cut_prompts_and_a_long_one_do_not_starve_each_other():
    runner = roomy(chunk_size=128, num_tokens=4000, max_running_requests=32, context=1024)
    scheduler = Scheduler(runner)
    run(scheduler, *[request([*text(70, seed=i), 1], 1) for i in range(12)])
    before = len(runner.batches)
    long = request(text(640, seed=50), 1)
    scheduler.add(long)
    scheduler.step()
    shorts = [request([*text(70, seed=i), 2, 3], 1) for i in range(12)]
    run(scheduler, *shorts)
    total = 640 + 12 * 72
    assert len(runner.batches) - before <= 2 * -(-total // 128)
    check(scheduler, runner, long, *shorts)

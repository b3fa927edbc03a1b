"""Ranks that hold different requests give what one rank gives, whatever each of them has to do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parallel_support import (
    BREAKABLE,
    HYBRID_NAMES,
    MODELS,
    PROMPTS,
    WAYS,
    by_turns,
    close,
    make_engine,
    outcome,
    ranks_of,
    save_models,
)
from hypothesis import given
from hypothesis import strategies as st
from models_support import random_prompts
from pair import assert_same_prefills

from breakgraph.distributed import SINGLE, TensorParallelGroup, current_group, expert_group
from breakgraph.engine.data_parallel import choose_rank
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.forward import ForwardMode, RankCounts
from breakgraph.layers import moe_experts
from breakgraph.layers.moe_experts import GatedExperts
from breakgraph.server_args import ServerArgs

pytestmark = pytest.mark.usefixtures("in_pair")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def of_one() -> dict[str, tuple[list[Any], list[Any]]]:
    """What one rank gives eagerly, by model."""
    return {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "qwen3"), *HYBRID_NAMES])
def test_ranks_give_what_one_gives(folders, of_one, name: str, way: str) -> None:
    if name not in of_one:
        of_one[name] = outcome(folders[name], 1)
    one, two = of_one[name], outcome(folders[name], 2, **WAYS[way])
    assert_same_prefills(two[0], one[0], "replayed" if way == "replayed" else "graphs_disabled")
    assert [r.token_ids for r in two[1]] == [r.token_ids for r in one[1]]


@pytest.mark.parametrize("pair", [4], indirect=True)
def test_four_ranks_give_what_one_gives(folders, counted) -> None:
    name = "qwen3-moe"
    one, four = outcome(folders[name], 1), outcome(folders[name], 4, **WAYS["replayed"])
    for a, b in zip(one[0], four[0], strict=True):
        close(b.next_token_logits, a.next_token_logits)
    assert [r.token_ids for r in four[1]] == [r.token_ids for r in one[1]]
    assert all(len(counts.tokens) == 4 for counts, _ in counted)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_without_requests_takes_part_with_no_tokens(folders, of_one, counted, way) -> None:
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = engine.prefill([PROMPTS[2]])[0], engine.generate([PROMPTS[2]], 5)[0]
    with make_engine(folders["qwen3-moe"], 2, **WAYS[way]) as engine:
        close(engine.prefill([PROMPTS[2]])[0].next_token_logits, expected[0].next_token_logits)
        assert engine.generate([PROMPTS[2]], 5)[0].token_ids == expected[1].token_ids
    assert {counts.tokens for counts, _ in counted} == {(23, 0), (1, 0)}
    modes = [counts.mode for counts, _ in counted]
    assert modes == [ForwardMode.PREFILL] * 2 + [ForwardMode.DECODE] * 4
    assert {bucket for _, bucket in counted} == ({64, 1} if way == "replayed" else {None})


@pytest.mark.parametrize(("way", "rows"), [("eager", 40), ("replayed", 64)])
def test_each_rank_counts_its_own_real_rows(folders, way: str, rows: int) -> None:
    with make_engine(folders["qwen3-moe"], 2, **WAYS[way]) as engine:
        inputs = engine.runner._buffers.inputs(rows)
        for first, second, real in ((1, 3, 5 + 1), (3, 2, 40)):
            engine.prefill([PROMPTS[first], PROMPTS[second], [1]])
            assert inputs.num_token_non_padded.tolist() == [real]


def test_one_capture_serves_all_counts_of_the_ranks(folders, counted) -> None:
    flags = BREAKABLE | {"piecewise_cuda_graph_tokens": [13], "chunked_prefill_size": 13}
    prompts = random_prompts(range(1, 14))
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = [engine.prefill([prompt])[0].next_token_logits for prompt in prompts]
    with make_engine(folders["qwen3-moe"], 2, **flags) as engine:
        assert engine.runner.graph_runner is not None
        for first in range(13):
            for second in range(0, 13, 3):
                engine.runner.graph_runner.pool.poison()
                found = engine.prefill([prompts[first], prompts[second]])
                close(found[0].next_token_logits, expected[first])
                close(found[1].next_token_logits, expected[second])
    pairs = {(first + 1, second + 1) for first in range(13) for second in range(0, 13, 3)}
    assert {counts.tokens for counts, _ in counted} == pairs
    assert {bucket for _, bucket in counted} == {13}


def test_ranks_dispatch_alike_where_costs_are_measured(folders) -> None:
    # A rank that decides otherwise than rank 0 says so, and the next forward raises.
    with make_engine(
        folders["qwen3-moe"], 2, **BREAKABLE | {"prefill_dispatch": "measured"}
    ) as one:
        for length in range(1, 64, 7):
            one.prefill(random_prompts([length, 64 - length]))
            one.prefill(random_prompts([length]))


def test_a_rank_that_decodes_joins_the_prefill_of_another(folders, counted) -> None:
    folder, short, long = folders["qwen3-moe"], PROMPTS[1], [*PROMPTS[5], *PROMPTS[3]]
    with make_engine(folder, 1) as engine:
        expected = [r.token_ids for r in engine.generate([short, long], 6)]
    for way in WAYS.values():
        counted.clear()
        with make_engine(folder, 2, **way) as engine:
            assert [r.token_ids for r in engine.generate([short, long], 6)] == expected
        # The second prompt is of two forwards; in its second one the first decodes.
        assert (ForwardMode.PREFILL, (1, 40)) in [(c.mode, c.tokens) for c, _ in counted]


def test_more_requests_than_ranks_and_long_messages(folders) -> None:
    prompts = random_prompts([120 - i for i in range(20)], seed=1)
    flags = {"chunked_prefill_size": 512, "max_total_tokens": 2048, "max_running_requests": 8}
    params = SamplingParams(max_new_tokens=6, temperature=0.8, logprobs=2, prompt_logprobs=True)
    results = []
    for size in (1, 2):
        with make_engine(folders["qwen3-moe"], size, **flags) as engine:
            results.append(engine.generate(prompts, sampling_params=params))
            if size == 2:
                assert ranks_of(engine).idle_and_empty
                assert ranks_of(engine)._loads == [0, 0]
    for one, two in zip(*results, strict=True):
        assert two.token_ids == one.token_ids
        np.testing.assert_allclose(two.prompt_logprobs[1:], one.prompt_logprobs[1:], atol=1e-3)
        assert [lp.token_id for lp in two.logprobs] == [lp.token_id for lp in one.logprobs]


def test_a_full_cache_makes_a_rank_retract_its_own(folders) -> None:
    flags = {"max_total_tokens": 80, "chunked_prefill_size": 32}
    prompts = random_prompts([18, 18, 17, 17, 16, 16, 15, 15])
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = [r.token_ids for r in engine.generate(prompts, 20)]
    with make_engine(folders["qwen3-moe"], 2, **flags) as engine:
        for rank in ranks_of(engine).ranks:
            rank._headroom = 2
        assert [r.token_ids for r in engine.generate(prompts, 20)] == expected
        assert engine.statistics.retractions > 0


def test_vectors_come_from_all_ranks(folders) -> None:
    flags = {"is_embedding": True, "pooling": "mean"}
    with make_engine(folders["qwen3-moe"], 1, **flags) as engine:
        expected = engine.embed(PROMPTS)
    with make_engine(folders["qwen3-moe"], 2, **flags, **BREAKABLE) as engine:
        close(engine.embed(PROMPTS), expected)
        close(engine.embed(PROMPTS[:1]), expected[:1])


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3_next"])
def test_a_prompt_goes_where_its_beginning_is_cached(folders, name: str) -> None:
    prompts = [PROMPTS[2], PROMPTS[3], [*PROMPTS[3], 5], [*PROMPTS[2], 5]]
    with make_engine(folders[name], 1) as engine:
        expected = [r.token_ids for r in engine.generate(prompts, 4)]
    with make_engine(folders[name], 2) as engine:
        requests = by_turns(engine, prompts)
        assert [request.rank for request in requests] == [0, 1, 1, 0]
        assert [request.cached_tokens for request in requests] == [0, 0, 40, 23]
        assert [request.new_ids for request in requests] == expected


def test_the_least_loaded_rank_takes_a_request() -> None:
    assert choose_rank([0, 0, 0], [0, 0, 0]) == 0
    assert choose_rank([7, 5, 6], [0, 0, 0]) == 1
    assert choose_rank([7, 5, 6], [0, 0, 2]) == 2
    assert choose_rank([700, 5], [64, 0]) == 1  # what it saves is less than the wait


counts_of_ranks = st.lists(st.tuples(st.integers(0, 80), st.integers(1, 8)), min_size=1).filter(
    lambda pairs: any(tokens for tokens, _ in pairs)
)


@given(counts_of_ranks, st.sampled_from(ForwardMode))
def test_all_ranks_decide_alike_and_for_the_widest(pairs, mode: ForwardMode) -> None:
    tokens = tuple(count for count, _ in pairs)
    requests = tuple(min(pair) for pair in pairs)
    if mode is ForwardMode.DECODE:
        tokens = requests
    counts = RankCounts(mode, tokens, requests)
    batch = counts.widest()
    assert batch.num_tokens == counts.rows == max(tokens)
    assert batch.batch_size == max(requests) and batch.mode is mode
    # Nothing but the counts enters, and of them the most: idle ranks and their order do not.
    other = RankCounts(mode, (*tokens[::-1], 0), (*requests[::-1], 0))
    assert np.array_equal(other.widest().extend_lens, batch.extend_lens)


class Meeting:
    """What the threads of one test exchange in place of ranks."""

    def __init__(self, size: int) -> None:
        self.barrier, self.parts = threading.Barrier(size, timeout=20), [None] * size

    def exchange(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class ThreadGroup(TensorParallelGroup):
    """A rank that is a thread; ``each`` of them hold the same requests."""

    def __init__(self, rank: int, size: int, each: int, meeting: Meeting) -> None:
        peers = SINGLE if each == 1 else TensorParallelGroup(rank % each, each)
        super().__init__(rank, size, attention=peers)
        self._meeting = meeting

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self.rank, part))

    def reduce_scatter(self, part: torch.Tensor) -> torch.Tensor:
        return sum(self._meeting.exchange(self.rank, part)).chunk(self.size)[self.rank]


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("size", [16, 6])
@pytest.mark.parametrize("counts", [(7, 7), (5, 2), (0, 7), (3, 0)])
def test_padded_rows_of_no_rank_reach_an_expert(size: int, each, counts, monkeypatch) -> None:
    torch.manual_seed(0)
    whole, ranks = GatedExperts(4, size, size), []
    for parameter in whole.parameters():
        parameter.normal_()
    all_ranks = 2 * each
    meeting = Meeting(all_ranks)
    for number in range(all_ranks):
        with ThreadGroup(number, all_ranks, each, meeting).active():
            assert (current_group().size, expert_group().size) == (each, all_ranks)
            ranks.append(GatedExperts(4, size, size))
        for mine, all_ in zip(ranks[-1].parameters(), whole.parameters(), strict=True):
            mine.copy_(all_.chunk(all_ranks)[number])
    inputs = []
    for count in counts:
        x, weights = torch.randn(7, size), torch.rand(7, 2)
        x[count:] = weights[count:] = float("nan")
        experts = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
        inputs.append((x, weights, experts, torch.tensor([count], dtype=torch.int32)))
    worked, sort = [], moe_experts.sort_routes

    def watched(*args: Any) -> Any:
        worked.append(int((dispatch := sort(*args)).offsets[-1]))
        return dispatch

    monkeypatch.setattr(moe_experts, "sort_routes", watched)
    with ThreadPoolExecutor(all_ranks) as threads:
        parts = threads.map(lambda rank: ranks[rank](*inputs[rank // each]), range(all_ranks))
        found = torch.stack(list(parts)).unflatten(0, (2, each)).sum(1)
    assert sum(worked) == 2 * sum(counts)
    for one, given_, count in zip(found, inputs, counts, strict=True):
        torch.testing.assert_close(one, whole(*given_), atol=1e-4, rtol=1e-4)
        assert not one[count:].any()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tp_size": 2, "dp_size": 4}, "--dp-size 4 must divide --tp-size, which is 2"),
        ({"tp_size": 4, "dp_size": 3}, "into how many groups"),
        ({"dp_size": 2}, "start a server each"),
        ({"tp_size": 2, "dp_size": 2, "moe_scatter": True}, "leave one out"),
    ],
)
def test_flags_that_contradict_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerArgs(model_path="m", **flags)


def test_a_model_without_experts_is_refused(folders) -> None:
    with pytest.raises(ValueError, match="has no experts that ranks could share"):
        make_engine(folders["qwen3"], 2)


@pytest.mark.parametrize("fails", [0, 2])
def test_a_capture_that_fails_on_one_rank_makes_all_eager(folders, pair, of_one, fails) -> None:
    pair.fails = fails
    flags = WAYS["replayed"] | {"cuda_graph_failure": "eager"}
    with make_engine(folders["qwen3-moe"], 2, **flags) as engine:
        assert (engine.runner.graph_runner is None) == (fails < 2)
        found = engine.generate(PROMPTS, max_new_tokens=6)
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = engine.generate(PROMPTS, max_new_tokens=6)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_explain_tells_of_the_widest_rank(folders) -> None:
    with make_engine(folders["qwen3-moe"], 2, **BREAKABLE) as engine:
        text = engine.explain([PROMPTS[3], PROMPTS[1]])
    assert text.startswith("40 tokens replay in bucket 64") and text.count("replay") == 1

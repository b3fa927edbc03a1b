"""Ranks that hold different requests give what one rank gives, whatever each of them has to do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_support import save_hybrid
from hypothesis import given
from hypothesis import strategies as st
from models_support import make_reference, random_prompts, save_checkpoint
from pair import assert_same_prefills

from breakgraph import Engine
from breakgraph.distributed import TensorParallelGroup, current_group, expert_group
from breakgraph.engine.data_parallel import RankedScheduler, choose_rank
from breakgraph.engine.request import Want
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.forward import ForwardBatch, ForwardMode, RankCounts
from breakgraph.layers import moe_experts
from breakgraph.layers.moe_experts import GatedExperts
from breakgraph.runner.buckets import Dispatch
from breakgraph.runner.data_parallel import RankedForward
from breakgraph.server_args import ServerArgs

pytestmark = pytest.mark.usefixtures("in_pair")

SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE = {**SIZES, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8}
DEEPSEEK = {
    **SIZES,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "topk_method": "greedy",
    "norm_topk_prob": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", MOE),
    "qwen3-moe-mixed": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [0]}),
    "qwen3-moe-tied": ("Qwen3MoeForCausalLM", {**MOE, "tie_word_embeddings": True}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 2, "topk_group": 1}),
}
HYBRID_NAMES = ["nemotron_h-latent", "qwen3_next", "qwen3_next-biased"]
BREAKABLE = {
    "enable_breakable_cuda_graph": True,
    "piecewise_cuda_graph_tokens": [16, 64],
    "prefill_dispatch": "always",
    "max_prefill_padding": 64.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "replayed": {**BREAKABLE, "cuda_graph_bs": [1, 4]},
}
PROMPTS = random_prompts([1, 5, 23, 40, 3, 64, 17])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, (architecture, config) in MODELS.items():
        save_checkpoint(make_reference(architecture, **config), root / name)
    for name in HYBRID_NAMES:
        save_hybrid(name, root / name)
    return {name: root / name for name in [*MODELS, *HYBRID_NAMES]}


def make_engine(folder: Path, size: int, **flags: Any) -> Engine:
    settings: dict[str, Any] = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "chunked_prefill_size": 64,
        "max_total_tokens": 512,
        "max_running_requests": 4,
    }
    return Engine(model_path=str(folder), tp_size=size, dp_size=size, **settings | flags)


def ranks_of(engine: Engine) -> RankedScheduler:
    scheduler = engine._scheduler
    assert isinstance(scheduler, RankedScheduler)
    return scheduler


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RankCounts, int | None]]:
    """The counts of every forward of ranks, and its bucket."""
    found: list[tuple[RankCounts, int | None]] = []
    real = RankedForward._run

    def run(self: RankedForward, batch: ForwardBatch, counts: RankCounts, how: Dispatch) -> Any:
        found.append((counts, how.bucket))
        return real(self, batch, counts, how)

    monkeypatch.setattr(RankedForward, "_run", run)
    return found


def outcome(folder: Path, size: int, **flags: Any) -> tuple[list[Any], list[Any]]:
    with make_engine(folder, size, **flags) as engine:
        prefills = engine.prefill(PROMPTS, return_logprob=True)
        tokens = engine.generate(PROMPTS, max_new_tokens=6)
    return prefills, tokens


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


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
        scheduler, requests = ranks_of(engine), []
        with engine._turn("generate", Want.TOKENS) as admission:
            params = SamplingParams(max_new_tokens=4, temperature=0)
            for ids in prompts:
                request = admission.continuation(ids, params, admission.rule(params))
                requests.append(request)
                scheduler.add(request)
                if len(requests) > 1:  # the first two are there together
                    while scheduler.has_work:
                        scheduler.step()
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
    """A rank that is a thread."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, data_parallel=True)
        self._meeting = meeting

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self.rank, part))

    def reduce_scatter(self, part: torch.Tensor) -> torch.Tensor:
        return sum(self._meeting.exchange(self.rank, part)).chunk(self.size)[self.rank]


@pytest.mark.parametrize("size", [16, 6])
@pytest.mark.parametrize("counts", [(7, 7), (5, 2), (0, 7), (3, 0)])
def test_padded_rows_of_no_rank_reach_an_expert(size: int, counts, monkeypatch) -> None:
    torch.manual_seed(0)
    whole, ranks = GatedExperts(4, size, size), []
    for parameter in whole.parameters():
        parameter.normal_()
    meeting = Meeting(2)
    for number in range(2):
        with ThreadGroup(number, 2, meeting).active():
            assert current_group().size == 1 and expert_group().size == 2
            ranks.append(GatedExperts(4, size, size))
        for mine, all_ in zip(ranks[-1].parameters(), whole.parameters(), strict=True):
            mine.copy_(all_[2 * number : 2 * number + 2])
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
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda rank: ranks[rank](*inputs[rank]), range(2)))
    assert sum(worked) == 2 * sum(counts)
    for one, given_, count in zip(found, inputs, counts, strict=True):
        torch.testing.assert_close(one, whole(*given_), atol=1e-4, rtol=1e-4)
        assert not one[count:].any()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tp_size": 2, "dp_size": 4}, "--dp-size 4 must be --tp-size, which is 2"),
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

"""Two groups of two ranks: attention is divided within a group, experts over all four ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collective_support import check_as_many_entered
from data_parallel_support import (
    BREAKABLE,
    PROMPTS,
    WAYS,
    by_turns,
    close,
    make_engine,
    outcome,
    save_models,
)
from hybrid_support import save_hybrid
from models_support import random_prompts
from pair import assert_same_prefills

from breakgraph import Engine
from breakgraph.forward import ForwardMode
from breakgraph.models.dense import DenseAttention

pytestmark = [
    pytest.mark.usefixtures("in_pair"),
    pytest.mark.parametrize("pair", [4], indirect=True),
]

NAMES = [
    "qwen3-moe",
    "qwen3-moe-mixed",
    "qwen3-moe-tied",
    "deepseek-v2",
    "deepseek-v3",
    "nemotron_h",
    "nemotron_h-latent",
    "qwen3_next-biased",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    divisible = save_hybrid("nemotron_h-latent", root / "two groups", n_groups=2)
    return save_models(root, [*NAMES, "qwen3_next"]) | {"nemotron_h-latent": divisible}


@pytest.fixture(scope="module")
def of_one(folders: dict[str, Path]) -> Callable[[str], tuple[list[Any], list[Any]]]:
    """What one rank gives eagerly, by model."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}

    def ask(name: str) -> tuple[list[Any], list[Any]]:
        if name not in found:
            found[name] = outcome(folders[name], 1)
        return found[name]

    return ask


def in_groups(folder: Path, **flags: Any) -> Engine:
    return make_engine(folder, 4, **{"dp_size": 2} | flags)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_groups_give_what_one_rank_gives(folders, of_one, name: str, way: str) -> None:
    one = of_one(name)
    prefills, tokens = outcome(folders[name], 4, dp_size=2, **WAYS[way])
    assert_same_prefills(prefills, one[0], "replayed" if way == "replayed" else "graphs_disabled")
    assert [r.token_ids for r in tokens] == [r.token_ids for r in one[1]]


def test_what_a_rank_has_of_the_model(folders) -> None:
    def parts(engine: Engine) -> tuple[int, int, int, int]:
        runner, stack = engine.runner, engine.runner.model.get_layer_stack()
        layer = stack.layers[0]
        attention = next(m for m in layer.modules() if isinstance(m, DenseAttention))
        return (
            attention.attn.num_heads,
            runner.kv_pool.tensors()[0].shape[1],
            len(layer.mlp.experts.up),
            len(runner.rank_memory),
        )

    with make_engine(folders["qwen3-moe"], 1) as engine:
        assert parts(engine) == (4, 2, 4, 1)
    with in_groups(folders["qwen3-moe"]) as engine:
        assert parts(engine) == (2, 1, 1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_without_requests_takes_part_with_no_tokens(folders, counted, way: str) -> None:
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = engine.prefill([PROMPTS[2]])[0], engine.generate([PROMPTS[2]], 5)[0]
    with in_groups(folders["qwen3-moe"], **WAYS[way]) as engine:
        close(engine.prefill([PROMPTS[2]])[0].next_token_logits, expected[0].next_token_logits)
        assert engine.generate([PROMPTS[2]], 5)[0].token_ids == expected[1].token_ids
    assert {counts.tokens for counts, _ in counted} == {(23, 0), (1, 0)}
    modes = [counts.mode for counts, _ in counted]
    assert modes == [ForwardMode.PREFILL] * 2 + [ForwardMode.DECODE] * 4
    assert {bucket for _, bucket in counted} == ({64, 1} if way == "replayed" else {None})


def test_one_capture_serves_all_counts_of_the_groups(folders, counted) -> None:
    """Of 13 rows the ranks of a group have 7 and 6."""
    flags = BREAKABLE | {"piecewise_cuda_graph_tokens": [13], "chunked_prefill_size": 13}
    prompts, sizes = random_prompts(range(1, 14)), (0, 5, 6, 7, 12)
    with make_engine(folders["qwen3-moe"], 1) as engine:
        expected = [engine.prefill([prompt])[0].next_token_logits for prompt in prompts]
    with in_groups(folders["qwen3-moe"], **flags) as engine:
        assert engine.runner.graph_runner is not None
        for first in sizes:
            for second in sizes:
                engine.runner.graph_runner.pool.poison()
                found = engine.prefill([prompts[first], prompts[second]])
                close(found[0].next_token_logits, expected[first])
                close(found[1].next_token_logits, expected[second])
    pairs = {(first + 1, second + 1) for first in sizes for second in sizes}
    assert {counts.tokens for counts, _ in counted} == pairs
    assert {bucket for _, bucket in counted} == {13}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3_next"])
def test_cached_prefixes_and_states_are_on_every_rank_of_a_group(folders, name, way) -> None:
    prompts = [PROMPTS[2], PROMPTS[3], [*PROMPTS[3], 5], [*PROMPTS[2], 5]]
    with make_engine(folders[name], 1) as engine:
        expected = [r.token_ids for r in engine.generate(prompts, 4)]
    with in_groups(folders[name], **WAYS[way]) as engine:
        requests = by_turns(engine, prompts)
        assert [request.rank for request in requests] == [0, 1, 1, 0]
        assert [request.cached_tokens for request in requests] == [0, 0, 40, 23]
        assert [request.new_ids for request in requests] == expected


def test_vectors_come_from_all_groups(folders) -> None:
    flags = {"is_embedding": True, "pooling": "mean"}
    with make_engine(folders["qwen3-moe"], 1, **flags) as engine:
        expected = engine.embed(PROMPTS)
    with in_groups(folders["qwen3-moe"], **flags, **BREAKABLE) as engine:
        close(engine.embed(PROMPTS), expected)
        close(engine.embed(PROMPTS[:1]), expected[:1])


@pytest.mark.parametrize("fails", [0, 2])
def test_a_capture_that_fails_on_one_rank_makes_all_eager(folders, pair, of_one, fails) -> None:
    pair.fails = fails
    flags = WAYS["replayed"] | {"cuda_graph_failure": "eager"}
    with in_groups(folders["qwen3-moe"], **flags) as engine:
        assert (engine.runner.graph_runner is None) == (fails < 2)
        found = engine.generate(PROMPTS, max_new_tokens=6)
    assert [r.token_ids for r in found] == [r.token_ids for r in of_one("qwen3-moe")[1]]


def test_ranks_enter_as_many_collectives_that_all_enter(folders, pair) -> None:
    """What one group alone does for the logits is not counted: it would hide its hang."""
    with in_groups(folders["qwen3-moe"]) as engine:
        for count in (1, 4):
            engine.prefill(PROMPTS[:count], return_logprob=True)
            engine.generate(PROMPTS[:count], 3)
    pair.call(check_as_many_entered)

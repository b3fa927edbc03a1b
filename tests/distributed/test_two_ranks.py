"""Two ranks give what one gives: every architecture, eagerly and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_support import HYBRIDS, save_hybrid
from models_support import make_reference, random_prompts, save_checkpoint
from pair import Pair, assert_same_prefills

from breakgraph import Engine
from breakgraph.distributed import TensorParallelGroup
from breakgraph.runner import GraphCaptureError

pytestmark = pytest.mark.usefixtures("in_pair")

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3-one-kv-head": ("Qwen3ForCausalLM", {"head_dim": 8, "num_key_value_heads": 1}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", MOE),
    "qwen3-moe-mixed": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [0]}),
}
CHANGES: dict[str, dict[str, Any]] = {"nemotron_h-latent": {"n_groups": 2}}
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
QWEN3_NEXT = [name for name in HYBRIDS if name.startswith("qwen3_next")]
AUTO = {**BREAKABLE, "cuda_graph_bs": [1, 4], "cuda_graph_backend_prefill": "auto"}
LINEAR = {**BREAKABLE, "cuda_graph_bs": [1, 4], "linear_attention_capture": 4}
PROMPTS = random_prompts([1, 5, 23, 40])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("models")}


def folder_of(name: str, folders: dict[str, Path]) -> Path:
    """The checkpoint ``name``, made once."""
    if name not in folders:
        folders[name] = folders[""] / name
        if name in HYBRIDS:
            save_hybrid(name, folders[name], **CHANGES.get(name, {}))
        else:
            architecture, config = MODELS[name]
            save_checkpoint(make_reference(architecture, **config), folders[name])
    return folders[name]


def make_engine(folder: Path, size: int, **flags: Any) -> Engine:
    settings: dict[str, Any] = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "chunked_prefill_size": 64,
        "max_total_tokens": 512,
        "max_running_requests": 4,
    }
    return Engine(model_path=str(folder), tp_size=size, **settings | flags)


def outcome(folder: Path, size: int, **flags: Any) -> tuple[list[Any], list[Any]]:
    """Prefills, and generations of which some begin alike."""
    repeated = [*PROMPTS, [*PROMPTS[3], 7, 8], [*PROMPTS[3][:35], 7]]
    with make_engine(folder, size, **flags) as engine:
        prefills = engine.prefill(PROMPTS, return_logprob=True)
        tokens = engine.generate(repeated, max_new_tokens=6)
    return prefills, tokens


@pytest.fixture(scope="module")
def of_one() -> dict[Path, tuple[list[Any], list[Any]]]:
    """What one rank gives eagerly, by checkpoint."""
    return {}


def check_same(of_one: dict[Path, Any], folder: Path, flags: dict[str, Any]) -> None:
    """Two ranks give the logits, log-probabilities and tokens of one."""
    if folder not in of_one:
        of_one[folder] = outcome(folder, 1)
    one, two = of_one[folder], outcome(folder, 2, **flags)
    reason = "replayed" if "enable_breakable_cuda_graph" in flags else "graphs_disabled"
    assert_same_prefills(two[0], one[0], reason)
    assert [r.token_ids for r in two[1]] == [r.token_ids for r in one[1]]
    assert [r.cached_tokens for r in two[1]] == [r.cached_tokens for r in one[1]]
    assert two[1][4].cached_tokens == 40  # keys and values, or a state, of another request


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_give_what_one_gives(folders, of_one, name: str, way: str) -> None:
    check_same(of_one, folder_of(name, folders), WAYS[way])


@pytest.mark.parametrize("flags", [{}, LINEAR], ids=["eager", "captured"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_too(folders, of_one, name: str, flags: dict[str, Any]) -> None:
    check_same(of_one, folder_of(name, folders), flags)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-mixed", *QWEN3_NEXT])
def test_scattered_rows_give_the_same(folders, of_one, name: str) -> None:
    flags = WAYS["replayed"] if name in MODELS else {}
    check_same(of_one, folder_of(name, folders), flags | {"moe_scatter": True})


@pytest.mark.parametrize("scatter", [False, True])
def test_a_capture_serves_every_count_of_tokens(folders, scatter: bool) -> None:
    folder = folder_of("qwen3-moe", folders)
    flags = BREAKABLE | {"piecewise_cuda_graph_tokens": [13], "chunked_prefill_size": 13}
    prompts = random_prompts(range(1, 14))
    with make_engine(folder, 1) as engine:
        expected = [engine.prefill([prompt])[0] for prompt in prompts]
    with make_engine(folder, 2, moe_scatter=scatter, **flags) as engine:
        for prompt, one in zip(prompts, expected, strict=True):
            found = engine.prefill([prompt])[0]
            assert found.bucket == 13
            torch.testing.assert_close(
                found.next_token_logits, one.next_token_logits, atol=1e-4, rtol=1e-4
            )


def test_all_reduces_lie_inside_the_segments(folders) -> None:
    with make_engine(folder_of("qwen3", folders), 2, **BREAKABLE) as engine:
        runner = engine.runner.graph_runner
        assert runner is not None
        graph = runner.graphs[16]
        names = [step.segment.node_names() for step in graph.steps if step.segment is not None]
        assert graph.num_breaks == 2
        assert sum(name.startswith("breakgraph.all_reduce_") for row in names for name in row) == 4
        assert engine.runner.model.model.layers[0].mlp.down_proj.weight.shape == (32, 24)


@pytest.mark.parametrize("measured", ["always", "measured"])
def test_ranks_dispatch_alike_where_costs_are_measured(folders, measured: str) -> None:
    # A rank that decides otherwise than rank 0 says so, and the next forward raises.
    flags = BREAKABLE | {"prefill_dispatch": measured}
    with make_engine(folder_of("qwen3", folders), 2, **flags) as engine:
        for prompt in random_prompts(range(1, 64, 5)):
            engine.prefill([prompt])


@pytest.mark.parametrize("name", ["qwen3-moe", "nemotron_h"])
def test_full_graphs_of_two_ranks_give_what_one_gives(folders, of_one, name: str) -> None:
    check_same(of_one, folder_of(name, folders), AUTO)


def test_ranks_choose_the_same_graphs_by_the_first_ones_times(
    folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the first writes a file; a budget drops the same graphs of both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = {"prefill_dispatch": "measured", "cuda_graph_memory_budget": 1e-4}
    with make_engine(folder_of("qwen3", folders), 2, **AUTO | flags) as engine:
        for prompt in random_prompts(range(1, 64, 5)):
            engine.prefill([prompt])
        engine.prefill(PROMPTS)
    assert len(list((tmp_path / "breakgraph").iterdir())) == 1


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_capture_that_fails_on_one_rank_makes_all_eager(folders, pair, caplog, fails) -> None:
    flags = WAYS["replayed"] | {"cuda_graph_failure": "eager"}
    folder = folder_of("qwen3", folders)
    with make_engine(folder, 1) as engine:
        expected = [r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=4)]
    pair.fails = fails
    with make_engine(folder, 2, **flags) as engine:
        found = engine.generate(PROMPTS, max_new_tokens=4)
        runner = engine.runner
        assert (runner.graph_runner is None) == (fails < 2)
        assert (runner.decode_graph_runner is None) == (fails >= 2)
    assert [r.token_ids for r in found] == expected
    assert "rank 1: " in caplog.text and "out of luck" in caplog.text
    assert "runs eagerly" in caplog.text


def test_a_capture_that_fails_on_one_rank_stops_all(folders, pair) -> None:
    pair.fails = 1
    with pytest.raises(GraphCaptureError, match=r"another rank could not capture: rank 1: out of"):
        make_engine(folder_of("qwen3", folders), 2, **BREAKABLE)


def test_sampling_is_the_same(folders) -> None:
    folder = folder_of("qwen3", folders)
    drawn = []
    for size in (1, 2):
        with make_engine(folder, size) as engine:
            results = engine.generate(PROMPTS, max_new_tokens=8, temperature=0.8)
            drawn.append([r.token_ids for r in results])
    assert drawn[0] == drawn[1]


def test_dummy_weights_and_vectors_run(folders) -> None:
    folder = folder_of("qwen3-moe", folders)
    with make_engine(folder, 2, load_format="dummy", is_embedding=True, **BREAKABLE) as engine:
        vectors = engine.embed(PROMPTS)
    assert vectors.shape == (4, 32) and vectors.isfinite().all()


def check_shared_text(group: TensorParallelGroup) -> None:
    for text in ("", '{"a": 1.5}', "é" * 3000):
        if group.shared_text(text if group.is_first else "another") != text:
            raise AssertionError(f"rank {group.rank} was not given {text[:20]!r}")


def test_the_first_ranks_text_is_everybodys(pair: Pair) -> None:
    pair.call(check_shared_text)

"""NemotronH and Qwen3-Next give the logits of transformers, packed, in chunks, or step by step."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_support import (
    HYBRIDS,
    Requests,
    make_hybrid,
    make_hybrid_engine,
    make_hybrid_runner,
    save_hybrid,
)
from models_support import (
    edit_config,
    make_noise,
    make_reference,
    random_prompts,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file

from breakgraph import Engine
from breakgraph.forward import ForwardBatch
from breakgraph.models import ModelLoadError, load_model
from breakgraph.runner import ModelRunner

FIRST_OF_EACH = ["nemotron_h", "qwen3_next"]


@dataclass
class Pair:
    """A reference model, its checkpoint, and ours on a pool full of noise."""

    reference: Any
    folder: Path
    runner: ModelRunner
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """``[len(ids), vocab_size]``, by one forward of the reference over the whole of it."""
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.reference(torch.tensor([key]), use_cache=False).logits[0]
            assert len(ids) < 5 or self.known[key].std() > 0.5  # else a tolerance means nothing
        return self.known[key]

    def assert_logits(self, got: torch.Tensor | None, sequences: Sequence[Sequence[int]]) -> None:
        """``got`` are the logits after each of ``sequences``."""
        assert got is not None
        for one, ids in zip(got, sequences, strict=True):
            assert_close(one, self.logits(ids)[-1])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits to a ten-thousandth of what is usual among them."""
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.std()), rtol=0)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """Each capture collects garbage, which takes 0.25 s with all that was imported looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=HYBRIDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    reference = make_hybrid(request.param)
    folder = save_checkpoint(reference, tmp_path_factory.mktemp("hybrid"))
    runner = make_hybrid_runner(
        folder, cuda_graph_backend_decode="full", cuda_graph_bs=(2, 8), max_running_requests=8
    )
    make_noise(runner)
    return Pair(reference, folder, runner)


@pytest.fixture
def requests(pair: Pair) -> Iterator[Requests]:
    with Requests(pair.runner) as requests:
        yield requests
    assert pair.runner.requests.is_empty


def test_packed_prompts_of_mixed_lengths(pair: Pair, requests: Requests) -> None:
    prompts = random_prompts([1, 7, 40, 2, 100])
    targets = np.concatenate([[*prompt[1:], -1] for prompt in prompts])
    batch = requests.batch(requests.open(5), prompts, logprob_targets=targets)
    result = pair.runner.forward(batch)
    pair.assert_logits(result.next_token_logits, prompts)
    assert result.input_token_logprobs is not None
    for prompt, got in zip(
        prompts, result.input_token_logprobs.split([len(p) for p in prompts]), strict=True
    ):
        every = pair.logits(prompt).log_softmax(-1)
        expected = every[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(got[:-1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_long_prompts_in_chunks(pair: Pair, requests: Requests, size: int) -> None:
    """Two at a time, that end at different chunks and stand in either order."""
    prompts = random_prompts([140, 57] if size > 1 else [40, 29], seed=2)
    rows = requests.open(2)
    for start in range(0, len(prompts[0]), size):
        live = [i for i in (1, 0) if start < len(prompts[i])]
        live = live[:: 1 if start % 2 else -1]
        pieces = [prompts[i][start : start + size] for i in live]
        logits = pair.runner.forward(
            requests.batch([rows[i] for i in live], pieces)
        ).next_token_logits
        assert logits is not None
        for i, got in zip(live, logits, strict=True):
            end = min(start + size, len(prompts[i]))
            expected = pair.logits(prompts[i])[end - 1]
            assert_close(got, expected)


def test_prompts_with_cached_prefixes(pair: Pair, requests: Requests) -> None:
    prompts, cached = random_prompts([9, 30, 12, 5, 70], seed=1), [8, 17, 0, 1, 65]
    rows = requests.open(5)
    some = [i for i in range(5) if cached[i]]
    first = [prompts[i][: cached[i]] for i in some]
    pair.runner.forward(requests.batch([rows[i] for i in some], first))
    rest = [prompt[count:] for prompt, count in zip(prompts, cached, strict=True)]
    result = pair.runner.forward(requests.batch(rows, rest))
    pair.assert_logits(result.next_token_logits, prompts)


@pytest.mark.parametrize("how", ["replayed", "eager", "extended"])
def test_twenty_decode_steps(pair: Pair, requests: Requests, how: str) -> None:
    """All requests, or some, in a new order at each step; one is not asked for a while."""
    whole = random_prompts([21, 27, 60, 22, 90], seed=3)
    rows, _ = requests.prefill([ids[:-20] for ids in whole])
    draw = np.random.default_rng(0)
    left = [20] * 5
    for _ in range(24):
        live = [i for i in draw.permutation(5)[: draw.integers(4, 6)] if left[i]]
        if not live:
            break
        tokens = [whole[i][-left[i]] for i in live]
        if how == "extended":
            batch = requests.batch([rows[i] for i in live], [[token] for token in tokens])
        else:
            batch = requests.decode([rows[i] for i in live], tokens)
        result = pair.runner.forward(batch, allow_graph=how == "replayed")
        assert (result.dispatch.bucket is not None) == (how == "replayed")
        assert result.next_token_logits is not None
        for i, got in zip(live, result.next_token_logits, strict=True):
            left[i] -= 1
            expected = pair.logits(whole[i])[len(whole[i]) - 1 - left[i]]
            assert_close(got, expected)
    assert sum(left) <= 10


def test_a_row_taken_over_starts_from_zeros(pair: Pair, requests: Requests) -> None:
    for seed in range(3):
        prompts = random_prompts([5, 20, 33], seed)
        pair.assert_logits(requests.prefill(prompts)[1], prompts)
        requests.close()


def test_a_batch_without_rows_starts_from_zeros_and_cannot_go_on(pair: Pair) -> None:
    prompts = random_prompts([6, 11])
    slots = [list(range(1, 7)), list(range(7, 18))]
    plain = ForwardBatch.from_requests(prompts, slots)
    pair.assert_logits(pair.runner.forward(plain).next_token_logits, prompts)
    more = ForwardBatch.from_requests([[3], [4]], [[18], [19]], slots)
    with pytest.raises(ValueError, match="needs the rows of its requests"):
        pair.runner.forward(more)


def rename(folder: Path, pattern: str, replacement: str, **more: torch.Tensor) -> None:
    """Rename the tensors of a checkpoint, and add ``more``."""
    path = folder / "model.safetensors"
    tensors = {re.sub(pattern, replacement, name): t for name, t in load_file(path).items()}
    save_file(tensors | more, path, metadata={"format": "pt"})


def assert_same_weights(model: Any, other: Any) -> None:
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_experts_are_read_one_by_one_and_further_heads_ignored(pair: Pair, tmp_path: Path) -> None:
    pair.reference.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0.up_proj.weight" in name for name in names)  # as on the hub
    mtp = {"mtp.layers.0.norm.weight": torch.ones(32), "mtp.fc.weight": torch.ones(32, 64)}
    rename(tmp_path, "^$", "", **mtp)
    assert_same_weights(load_model(tmp_path), pair.runner.model)
    rename(tmp_path, "^$", "", **{"model.layers.0.mixer.extra": torch.ones(3)})
    with pytest.raises(ModelLoadError, match=r"left over: model.layers.0.mixer.extra \(3,\)"):
        load_model(tmp_path)


def test_nemotron_loads_by_the_names_of_the_hub_and_of_transformers(tmp_path: Path) -> None:
    reference = make_hybrid("nemotron_h")
    folder = save_checkpoint(reference, tmp_path)
    first = load_model(folder)
    names = load_file(folder / "model.safetensors")
    assert "backbone.embeddings.weight" in names and "backbone.norm_f.weight" in names
    for pattern, replacement in ((r"^backbone\.", "model."), (r"^model\.", "backbone.")):
        rename(folder, pattern, replacement)
        assert_same_weights(load_model(folder), first)


def test_nemotron_configs_of_the_hub_name_their_blocks_by_letters(tmp_path: Path) -> None:
    folder = save_hybrid("nemotron_h", tmp_path)
    first = load_model(folder)
    edit_config(folder, layers_block_type=None, layer_types=None, hybrid_override_pattern="M-*EM")
    assert_same_weights(load_model(folder), first)


@pytest.mark.parametrize("name", FIRST_OF_EACH)
def test_what_the_recurrence_decays_by_stays_float32(name: str, tmp_path: Path) -> None:
    folder = save_hybrid(name, tmp_path)
    runner = make_hybrid_runner(folder, dtype="bfloat16")
    exact = {
        path.rpartition(".")[2]: parameter
        for path, parameter in runner.model.named_parameters()
        if parameter.dtype == torch.float32
    }
    wanted = {"A_log", "dt_bias"}
    assert set(exact) == (
        wanted | {"D", "e_score_correction_bias"} if name == "nemotron_h" else wanted
    )
    full = dict(load_model(folder, dtype=torch.float32).named_parameters())
    for path, parameter in runner.model.named_parameters():
        if parameter.dtype == torch.float32:
            assert torch.equal(parameter, full[path])
    assert runner.mamba_pool is not None
    assert runner.mamba_pool.conv.dtype == torch.bfloat16
    assert runner.mamba_pool.state.dtype == torch.float32
    requests = Requests(runner)
    rows, logits = requests.prefill(random_prompts([40, 3]))
    more = runner.forward(requests.decode(rows, [1, 2])).next_token_logits
    assert logits.isfinite().all() and more is not None and more.isfinite().all()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ("nemotron_h", {"residual_in_fp32": True}, "residual_in_fp32 is not supported"),
        ("nemotron_h", {"mlp_hidden_act": "gelu"}, "mlp_hidden_act 'gelu'"),
        ("nemotron_h", {"mamba_hidden_act": "relu"}, "mamba_hidden_act 'relu'"),
        (
            "nemotron_h",
            {"layers_block_type": ["linear_attention", "moe"], "layer_types": None},
            "without any attention block",
        ),
        ("nemotron_h", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ("nemotron_h", {"n_group": 3}, "n_group 3"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention"] * 4},
            "without any full_attention layer",
        ),
        ("qwen3_next", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
    ],
)
def test_unsupported_config_is_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference = make_hybrid(name)
    reference.config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[HYBRIDS[name][0]], **config)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path, load_format="dummy")


def test_hybrid_classifiers_are_not_offered(tmp_path: Path) -> None:
    folder = save_hybrid("qwen3_next", tmp_path)
    edit_config(folder, architectures=["Qwen3NextForSequenceClassification"])
    with pytest.raises(ModelLoadError, match="unknown architecture"):
        load_model(folder, model_impl="native")


LENGTHS, STEPS = [1, 7, 40, 100, 23], 10
GRAPHS = {
    "enable_breakable_cuda_graph": True,
    "cuda_graph_backend_decode": "full",
    "cuda_graph_bs": (2, 8),
    "piecewise_cuda_graph_tokens": (16, 64),
}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"chunked_prefill_size": 256},
    "breaks": GRAPHS,
    "captured": {**GRAPHS, "linear_attention_capture": 2},
    "chunks of 13": {"chunked_prefill_size": 13},
    "captured, chunks of 16": {
        **GRAPHS,
        "linear_attention_capture": 4,
        "chunked_prefill_size": 16,
        "piecewise_cuda_graph_tokens": (16,),
    },
    "pages, no cache": {"page_size": 16, "disable_radix_cache": True, "max_running_requests": 3},
}


def make_engine(folder: Path, **flags: Any) -> Engine:
    return make_hybrid_engine(folder, **{"chunked_prefill_size": 64, **flags})


@pytest.fixture(scope="module", params=FIRST_OF_EACH)
def generated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts, and the tokens after each by ``transformers.generate``."""
    reference, prompts = make_hybrid(request.param), random_prompts(LENGTHS)
    folder = save_checkpoint(reference, tmp_path_factory.mktemp("hybrid"))
    how = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        texts = [reference.generate(torch.tensor([p]), **how)[0, len(p) :] for p in prompts]
    return folder, prompts, [text.tolist() for text in texts]


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_generates_what_transformers_does(generated: Any, mode: str) -> None:
    folder, prompts, expected = generated
    with make_engine(folder, **MODES[mode]) as engine:
        answers = engine.generate(prompts, STEPS)
        assert [answer.token_ids for answer in answers] == expected
        assert engine.runner.requests.is_empty
        replays = engine.statistics.replays
        assert replays == (engine.statistics.prefills if "breaks" in mode or "cap" in mode else 0)


def test_a_small_pool_retracts_and_gives_the_same_texts(generated: Any) -> None:
    folder, prompts, expected = generated
    with make_engine(folder, max_total_tokens=110, **GRAPHS) as engine:
        engine._scheduler._headroom = 4
        answers = engine.generate([*prompts[:3], prompts[4]] * 2, STEPS)
        assert [a.token_ids for a in answers] == [*expected[:3], expected[4]] * 2
        assert engine.statistics.retractions > 0
        assert engine.runner.requests.is_empty


@pytest.mark.parametrize(
    "flags", [{}, {"page_size": 8, **GRAPHS, "cuda_graph_bs": (2,)}], ids=["plain", "graphs"]
)
def test_a_cached_prefix_changes_no_text(generated: Any, flags: dict[str, Any]) -> None:
    folder, prompts, _ = generated
    begin = prompts[3][:80]
    alike = [[*begin, i, 3 * i, 5] for i in range(1, 4)] + [begin[:40] + [9] * 30]
    with make_engine(folder, disable_radix_cache=True) as cold:
        expected = [answer.token_ids for answer in cold.generate(alike, 10)]
    with make_engine(folder, max_running_requests=2, **flags) as engine:
        got = [answer.token_ids for answer in engine.generate(alike * 2, 10)]
        assert got == expected * 2
        assert engine.statistics.cached_tokens > 3 * 64
        assert engine.runner.requests.is_empty


@pytest.mark.parametrize(
    "architecture", ["NemotronHForCausalLM", "NemotronHModel", "Qwen3NextModel"]
)
def test_embeddings_are_the_last_hidden_state(architecture: str, tmp_path: Path) -> None:
    name = "nemotron_h" if architecture.startswith("Nemotron") else "qwen3_next"
    reference = make_reference(architecture, **HYBRIDS[name][1])
    folder, prompts = save_checkpoint(reference, tmp_path), random_prompts([1, 30, 66])
    base = reference if architecture.endswith("Model") else reference.model
    flags = {**GRAPHS, "linear_attention_capture": 2, "piecewise_cuda_graph_tokens": (16, 128)}
    with make_engine(folder, is_embedding=True, **flags | {"chunked_prefill_size": 128}) as engine:
        vectors = engine.embed(prompts)
        assert engine.statistics.replays == engine.statistics.prefills > 0
        with pytest.raises(ValueError, match="--is-embedding"):
            engine.generate(prompts)
    for prompt, vector in zip(prompts, vectors, strict=True):
        with torch.no_grad():
            hidden = base(torch.tensor([prompt])).last_hidden_state[0, -1]
        wanted = torch.nn.functional.normalize(hidden, dim=0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=0)

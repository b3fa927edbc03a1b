"""Latent attention gives what transformers gives, whichever way its cached rows are served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decode_support import make_runner
from hybrid_support import Requests, make_hybrid_engine
from hypothesis import given
from hypothesis import strategies as st
from models_support import edit_config, make_reference, poison, random_prompts, save_checkpoint
from safetensors.torch import load_file, save_file

from breakgraph.attention import (
    FlashLatentPrefillBackend,
    LatentAttention,
    LatentPrefillBackend,
    LatentShape,
)
from breakgraph.attention.latent_plan import plan_prefixes
from breakgraph.distributed import Shard
from breakgraph.forward import ForwardBatch
from breakgraph.kernels import latent_decode, partial_attention
from breakgraph.kernels.latent_decode import latent_decode_attention_reference
from breakgraph.kernels.partial_attention import attention_with_lse, merge_attention_
from breakgraph.memory import KVPool
from breakgraph.models import ModelLoadError, load_model
from breakgraph.runner import DispatchReason, ForwardResult, ModelRunner

CONTEXT = 256
BASE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": (V2, {**BASE, "q_lora_rank": None, "topk_method": "greedy"}),
    "v2": (V2, {**BASE, "topk_method": "group_limited_greedy", "rope_parameters": YARN}),
    "v3": (V3, {**BASE, "rope_parameters": YARN}),
    "v3-other": (
        V3,
        {
            **BASE,
            "rope_interleave": False,
            "attention_bias": True,
            "v_head_dim": 16,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
}
MIXED = [1, 7, 40, 2, 23]
DEEPSEEK_V3 = LatentShape(num_heads=128, nope_dim=128, rope_dim=64, value_dim=128, rank=512)
WAYS = ["as the rule says", "up-projected", "absorbed"]


def make_deepseek(name: str, **config: Any) -> Any:
    """A random transformers model, its experts chosen by biases too."""
    architecture, settings = MODELS[name]
    model = make_reference(architecture, **settings | config)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model


def make_latent_runner(folder: Path, device: str = "cpu", **flags: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "piecewise_cuda_graph_tokens": (8, 64, 128),
        "cuda_graph_bs": (1, 4),
        "chunked_prefill_size": 128,
        "max_total_tokens": 1024,
        "max_prefill_padding": 16.0,
    }
    return make_runner(folder, device, **settings | flags)


@dataclass
class Case:
    """A reference model, and a runner of its checkpoint."""

    reference: Any
    folder: Path
    runner: ModelRunner
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @property
    def backend(self) -> LatentPrefillBackend:
        assert isinstance(self.runner.attn_backend, LatentPrefillBackend)
        return self.runner.attn_backend

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The reference's, ``[tokens, vocab]``."""
        found = self.known.get(tuple(ids))
        if found is None:
            found = self.known[tuple(ids)] = self.reference(torch.tensor([ids])).logits[0]
            assert found.std() > 0.5  # else the tolerance would mean nothing
        return found

    def extend(
        self, requests: Requests, rows: Sequence[int], new: Sequence[Sequence[int]], **how: Any
    ) -> ForwardResult:
        """Run the next tokens of ``rows``; each must have the reference's logits."""
        targets = np.concatenate([np.asarray(ids) for ids in new]) * 7 % 97
        batch = requests.batch(rows, new, logprob_targets=targets)
        result = self.run(batch, **how)
        expected = [
            self.logits(requests.ids[row])[-len(ids) :] for row, ids in zip(rows, new, strict=True)
        ]
        last = torch.stack([logits[-1] for logits in expected])
        torch.testing.assert_close(result.next_token_logits, last, atol=1e-4, rtol=0)
        wanted = torch.cat(expected).log_softmax(-1).gather(1, torch.from_numpy(targets)[:, None])
        torch.testing.assert_close(
            result.input_token_logprobs, wanted.squeeze(1), atol=1e-4, rtol=0
        )
        return result

    def run(self, batch: ForwardBatch, *, replay: bool) -> ForwardResult:
        poison(self.runner)
        result = self.runner.forward(batch, allow_graph=replay)
        reason = DispatchReason.REPLAYED if replay else DispatchReason.EAGER_ASKED
        assert result.dispatch.reason is reason
        return result


_cases: dict[str, Case] = {}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    for name in MODELS:
        reference = make_deepseek(name)
        folder = save_checkpoint(reference, tmp_path_factory.mktemp(name))
        _cases[name] = Case(reference, folder, make_latent_runner(folder))
    yield _cases
    _cases.clear()


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return fresh(cases[request.param])


@pytest.fixture
def v3(cases: dict[str, Case]) -> Case:
    return fresh(cases["v3"])


def fresh(case: Case) -> Case:
    """With NaN in every cached row: what a request has not written, it must not use."""
    for cache in case.runner.kv_pool.tensors():
        cache.fill_(float("nan"))
    return case


@pytest.fixture
def chunk_tokens(case: Case) -> Iterator[None]:
    backend = case.backend
    before = backend.chunk_tokens, backend.absorbed_tokens
    yield
    backend.chunk_tokens, backend.absorbed_tokens = before


def serve(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Serve all cached rows in one way."""
    if way != WAYS[0]:
        absorbed = way == "absorbed"
        monkeypatch.setattr(LatentShape, "prefers_absorbed", lambda *_: absorbed and _[2] > 0)


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replayed"])
def test_packed_prompts_of_mixed_lengths(case: Case, replay: bool) -> None:
    with Requests(case.runner) as requests:
        prompts = random_prompts(MIXED)
        case.extend(requests, requests.open(len(prompts)), prompts, replay=replay)
        assert case.backend.parts == []


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [3, 16, 1000])
@pytest.mark.usefixtures("chunk_tokens")
def test_prompts_with_cached_prefixes(
    case: Case, monkeypatch: pytest.MonkeyPatch, chunk: int, way: str, replay: bool
) -> None:
    serve(monkeypatch, way)
    case.backend.chunk_tokens = case.backend.absorbed_tokens = chunk
    prefixes, new = [17, 9, 0, 1, 31, 30], [13, 1, 12, 4, 2, 20]
    prompts = random_prompts([a + b for a, b in zip(prefixes, new, strict=True)], seed=1)
    with Requests(case.runner) as requests:
        rows = requests.open(len(prompts))
        begun = [i for i, prefix in enumerate(prefixes) if prefix]
        begins = [prompts[i][: prefixes[i]] for i in begun]
        case.runner.forward(requests.batch([rows[i] for i in begun], begins))
        ends = [prompt[prefix:] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        case.extend(requests, rows, ends, replay=replay)
        kinds = {part.absorbed for part in case.backend.parts}
        assert kinds == {"absorbed": {True}, "up-projected": {False}}.get(way, {True, False})
        assert max(sum(part.key_lens) for part in case.backend.parts) <= chunk


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replayed"])
@pytest.mark.usefixtures("chunk_tokens")
def test_one_prompt_in_chunks(case: Case, replay: bool) -> None:
    case.backend.chunk_tokens = case.backend.absorbed_tokens = 20
    prompt, at = random_prompts([172], seed=2)[0], 0
    with Requests(case.runner) as requests:
        rows = requests.open(1)
        for count in (1, 7, 64, 100):
            case.extend(requests, rows, [prompt[at : at + count]], replay=replay)
            at += count


@pytest.mark.parametrize("replay", [False, True], ids=["eager", "replayed"])
def test_twenty_decode_steps(case: Case, replay: bool) -> None:
    lengths, steps = [5, 31, 60], 20
    texts = random_prompts([length + steps for length in lengths], seed=3)
    with Requests(case.runner) as requests:
        prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        rows, _ = requests.prefill(prompts)
        for step in range(steps):
            tokens = [text[n + step] for text, n in zip(texts, lengths, strict=True)]
            found = case.run(requests.decode(rows, tokens), replay=replay).next_token_logits
            expected = [case.logits(t)[n + step] for t, n in zip(texts, lengths, strict=True)]
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


def test_a_decode_by_the_extend_path_is_absorbed(case: Case) -> None:
    text = random_prompts([50], seed=4)[0]
    with Requests(case.runner) as requests:
        rows, _ = requests.prefill([text[:49]])
        case.extend(requests, rows, [text[49:]], replay=False)
        assert [part.absorbed for part in case.backend.parts] == [True]


@pytest.mark.parametrize("flags", [{}, {"enable_breakable_cuda_graph": True}], ids=["eager", "on"])
@torch.no_grad()
def test_the_engine_generates_what_transformers_does(case: Case, flags: dict[str, Any]) -> None:
    begin = random_prompts([70], seed=5)[0]
    prompts = [begin, [*begin, 5, 6], [*begin[:40], 9, 8], *random_prompts([3, 90], seed=6)]
    expected = [
        case.reference.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :]
        for p in prompts
    ]
    if flags:
        flags = {**flags, "cuda_graph_backend_decode": "full", "cuda_graph_bs": (3,)}
        flags |= {"piecewise_cuda_graph_tokens": (32, 160)}
    settings = {"dtype": "float32", "max_running_requests": 3}
    with make_hybrid_engine(case.folder, **settings | flags) as engine:
        for turn in range(2):
            answers = engine.generate(prompts, 12)
            assert [a.token_ids for a in answers] == [e.tolist() for e in expected], turn
        assert engine.statistics.cached_tokens > 100
        assert engine.runner.requests.is_empty


def test_neighbours_do_not_matter(case: Case) -> None:
    prefixes, new = [20, 3, 44], [6, 14, 2]
    prompts = random_prompts([a + b for a, b in zip(prefixes, new, strict=True)], seed=7)
    begins = [p[:n] for p, n in zip(prompts, prefixes, strict=True)]
    ends = [p[n:] for p, n in zip(prompts, prefixes, strict=True)]

    def logits(which: list[int]) -> torch.Tensor | None:
        with Requests(case.runner) as requests:
            rows, _ = requests.prefill([begins[i] for i in which])
            batch = requests.batch(rows, [ends[i] for i in which])
            return case.run(batch, replay=True).next_token_logits

    together = logits([0, 1, 2])
    assert together is not None
    for i in range(3):
        torch.testing.assert_close(logits([i]), together[i : i + 1], atol=1e-5, rtol=0)


def test_the_break_chooses_by_the_live_batch(v3: Case) -> None:
    runner = v3.runner
    assert runner.graph_runner is not None
    graph = runner.graph_runner.graphs[64]
    assert graph.num_breaks == runner.model.config.num_hidden_layers
    text = random_prompts([200], seed=8)[0]
    with Requests(runner) as requests:
        few, many, new = requests.open(3)
        v3.extend(requests, [few], [text[:100]], replay=True)
        v3.extend(requests, [many], [text[:40]], replay=True)
        seen = []
        for rows, counts in (
            ([few], [9]),
            ([many], [60]),
            ([new], [50]),
            ([few, many], [2, 30]),
        ):
            ends = [text[len(requests.ids[row]) :][:n] for row, n in zip(rows, counts, strict=True)]
            result = v3.extend(requests, rows, ends, replay=True)
            assert result.graph is graph
            seen.append([part.absorbed for part in v3.backend.parts])
    assert seen == [[True], [False], [], [True, False]]


def test_decode_graphs_have_no_break(v3: Case) -> None:
    graphs = v3.runner.decode_graph_runner
    assert graphs is not None
    assert {graph.num_breaks for graph in graphs.graphs.values()} == {0}


def test_a_cached_token_is_one_latent_row_a_layer(v3: Case) -> None:
    pool, config = v3.runner.kv_pool, v3.runner.model.config
    row = config.kv_lora_rank + config.qk_rope_head_dim
    sizes = (config.num_hidden_layers, 1, row)
    per_token = KVPool.bytes_per_token(*sizes, torch.float32, with_values=False)
    assert per_token == config.num_hidden_layers * row * 4
    assert sum(t.nbytes for t in pool.tensors()) == pool.num_slots * per_token
    assert pool.v == []
    layers = [m for m in v3.runner.model.modules() if isinstance(m, LatentAttention)]
    assert [layer.k_cache.shape for layer in layers] == [(pool.num_slots, 1, row)] * len(layers)


def test_the_pool_is_planned_from_latent_rows(
    v3: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("breakgraph.runner.pools.CPU_CACHE_BYTES", 2 * 20 * 4 * 500)
    with caplog.at_level("INFO", logger="breakgraph"):
        runner = make_latent_runner(
            v3.folder, max_total_tokens=None, enable_breakable_cuda_graph=False
        )
    assert runner.kv_pool.num_tokens == 499  # and the reserved slot
    assert "160 bytes" in caplog.text


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=6),
    chunk=st.integers(1, 100),
    absorbed=st.integers(1, 100),
)
def test_every_cached_token_is_in_one_part(
    lengths: list[tuple[int, int]], chunk: int, absorbed: int
) -> None:
    shape = LatentShape(num_heads=2, nope_dim=8, rope_dim=4, value_dim=6, rank=16)
    new, old = zip(*lengths, strict=True)
    slots = [list(range(1, count + 1)) for count in old]
    ids = [[0] * count for count in new]
    batch = ForwardBatch.from_requests(ids, ids, slots)
    row_owner, key_owner = np.repeat(range(len(new)), new), np.repeat(range(len(old)), old)
    seen = np.zeros(sum(old), int)
    for part in plan_prefixes(batch, shape, chunk, absorbed):
        seen[slice(*part.keys)] += 1
        assert 0 < sum(part.key_lens) <= (absorbed if part.absorbed else chunk)
        rows, keys = row_owner[slice(*part.rows)], key_owner[slice(*part.keys)]
        owners = sorted(set(rows))
        assert [int((rows == i).sum()) for i in owners] == list(part.new_lens)
        assert [int((keys == i).sum()) for i in owners] == list(part.key_lens)
        assert list(part.new_lens) == [new[i] for i in owners]
        assert {shape.prefers_absorbed(new[i], old[i]) for i in owners} == {part.absorbed}
        assert len(owners) == 1 or not part.absorbed
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("new", "prefix", "absorbed"),
    [(1, 0, False), (1, 1, False), (1, 2, True), (170, 10**6, True), (171, 10**6, False)],
)
def test_few_new_tokens_behind_a_long_prefix_are_absorbed(
    new: int, prefix: int, absorbed: bool
) -> None:
    assert DEEPSEEK_V3.prefers_absorbed(new, prefix) is absorbed


@given(cuts=st.sets(st.integers(1, 29), max_size=5), seed=st.integers(0, 99))
def test_parts_merge_to_the_whole(cuts: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 3, 8, generator=generator) * 3 for n in (5, 30))
    v = torch.randn(30, 3, 6, generator=generator)
    whole, whole_lse = attention_with_lse(q, k, v, 0.5, causal=False)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    ends = [*sorted(cuts), 30]
    out, lse = attention_with_lse(q, k[: ends[0]], v[: ends[0]], 0.5, causal=False)
    for start, end in pairwise(ends):
        part = attention_with_lse(q, k[start:end], v[start:end], 0.5, causal=False)
        merge_attention_(out, lse, *part)
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_in_blocks_change_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 20, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = attention_with_lse(q, k, v, 0.3, causal=causal)
    monkeypatch.setattr(partial_attention, "MAX_SCORES", 3 * 2 * 20)
    for got, wanted in zip(attention_with_lse(q, k, v, 0.3, causal=causal), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    if causal:
        alone = attention_with_lse(q[:1], k[:1], v[:1], 0.3, causal=True)
        torch.testing.assert_close(alone[0][0], v[0])
        torch.testing.assert_close(expected[0][0], v[0])


def decode_operands(device: str = "cpu") -> list[Any]:
    """5 requests of 1 to 50 tokens of 48 heads, in a table of 64; unowned rows are NaN."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 50, 17, 33, 2])
    table = (torch.randperm(6 * 64, generator=generator) + 1).view(6, 64).int()
    latents = torch.full((6 * 64 + 1, 1, 144), float("nan"))
    rows = torch.tensor([4, 0, 5, 2, 1])
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        latents[table[row, :length].long()] = torch.randn(length, 1, 144, generator=generator)
    q = torch.randn(5, 48, 144, generator=generator)
    tensors = [q, latents, table, rows, lengths]
    out = torch.empty(5, 48, 128)
    return [tensor.to(device) for tensor in tensors] + [0.1, out.to(device)]


def expected_decode(operands: list[Any]) -> torch.Tensor:
    q, latents, table, rows, lengths, scale, _ = operands
    found = []
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        keys = latents[table[row, :length].long(), 0]
        found.append(((q[i] @ keys.T) * scale).softmax(-1) @ keys[:, :128])
    return torch.stack(found)


@pytest.mark.parametrize("chunk_rows", [1, 15, 1 << 15])
def test_decode_reads_its_own_rows_in_any_chunks(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_decode, "CHUNK_ROWS", chunk_rows)
    operands = decode_operands()
    operands[1][0] = float("nan")  # the reserved slot
    latent_decode_attention_reference(*operands)
    torch.testing.assert_close(operands[-1], expected_decode(operands), atol=1e-5, rtol=1e-5)
    operands[-1].zero_()
    torch.ops.breakgraph.latent_decode_attention(*operands)
    torch.testing.assert_close(operands[-1], expected_decode(operands), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ("v2", {"topk_group": 5}, "topk_group 5 are kept"),
        ("v3", {"topk_group": 1}, "num_experts_per_tok 3 is more than topk_group 1"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ("v3", {"attention_bias": True, "q_lora_rank": 0}, "attention_bias is not supported"),
        ("v3", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_unsupported_config_is_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path, cases: dict[str, Case]
) -> None:
    reference = cases[name].reference
    reference.config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[MODELS[name][0]], **config)
    if "attention_bias" in config:  # a null: edit_config would remove the field
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"q_lora_rank": 0', '"q_lora_rank": null'))
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path, load_format="dummy")


@pytest.mark.parametrize("name", ["v2", "v3"])
@torch.no_grad()
def test_embeddings_are_the_last_hidden_state(name: str, tmp_path: Path) -> None:
    architecture, settings = MODELS[name]
    reference = make_reference(architecture.replace("ForCausalLM", "Model"), **settings)
    runner = make_latent_runner(save_checkpoint(reference, tmp_path), is_embedding=True)
    prompts = random_prompts([5, 30, 66])
    slots = np.split(np.arange(1, 102), np.cumsum([5, 30]))
    result = runner.forward(ForwardBatch.from_requests(prompts, slots))
    assert result.dispatch.reason is DispatchReason.REPLAYED
    last = [reference(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
    expected = torch.nn.functional.normalize(torch.stack(last), dim=-1)
    torch.testing.assert_close(result.pooled, expected, atol=1e-4, rtol=0)


def test_layers_that_predict_further_tokens_are_left_out(v3: Case, tmp_path: Path) -> None:
    save_checkpoint(v3.reference, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    count = v3.reference.config.num_hidden_layers
    more = {f"model.layers.{count}.{name}": torch.zeros(3) for name in ("enorm.weight", "mlp.up")}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(tmp_path)
    extra = {f"model.layers.{count + 1}.enorm.weight": torch.zeros(3)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match="left over"):
        load_model(tmp_path)


def test_a_rank_has_the_keys_and_values_of_its_heads() -> None:
    sizes = {"nope_dim": 8, "rope_dim": 4, "value_dim": 6, "rank": 16}
    generator = torch.Generator().manual_seed(0)
    weight, latent = (torch.randn(n, m, generator=generator) for n, m in ((4 * 14, 16), (9, 20)))
    made = []
    for heads in (Shard(4, 0, 4), Shard(4, 0, 2), Shard(4, 2, 4)):
        layer = LatentAttention(LatentShape(num_heads=heads.size, **sizes), heads, scale=1.0)
        slot = layer.checkpoint_slots()["kv_b_proj.weight"]
        assert slot.shape == tuple(weight.shape)
        assert slot.target is not None
        slot.target.copy_(torch.cat([weight[rows] for rows in slot.rows]) if slot.rows else weight)
        made.append(layer.expand(latent, pad=False))
    whole, *parts = made
    for both, expected in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(both, dim=1), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("heads", "row_dim", "rank"), [(128, 576, 512), (16, 576, 512), (20, 48, 40)]
)
def test_the_decode_kernel_equals_its_reference_when_replayed(
    heads: int, row_dim: int, rank: int, rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    how = {"device": "cuda", "generator": generator}
    q = torch.randn(rows, heads, row_dim, **how).to(dtype)
    latents = torch.randn(8 * 2048 + 1, 1, row_dim, **how).to(dtype)
    table = (torch.randperm(8 * 2048, **how) + 1).view(8, 2048).int()
    where = torch.randperm(8, **how)[:rows]
    lengths = torch.ones(rows, dtype=torch.int64, device="cuda")
    out = torch.empty(rows, heads, rank, dtype=dtype, device="cuda")
    operands = (q, latents, table, where, lengths, row_dim**-0.5)
    torch.ops.breakgraph.latent_decode_attention(*operands, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.breakgraph.latent_decode_attention(*operands, out)
    for longest in (1, 17, 33, 700, 2048):
        lengths.random_(1, longest + 1, generator=generator)
        lengths[0] = longest
        expected = torch.empty_like(out)
        latent_decode_attention_reference(*operands, expected)
        out.fill_(float("nan"))
        graph.replay()
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_flash_attention_and_plain_ops_agree_on_cuda(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(monkeypatch, way)
    # Heads of a multiple of 8, as FlashAttention-2 wants them; weights that keep bfloat16 apart
    # from chance.
    sizes = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 64}
    folder = save_checkpoint(make_deepseek("v3", **sizes, first_k_dense_replace=2), tmp_path)
    prefixes, new = [17, 0, 31, 30], [13, 12, 2, 20]
    prompts = random_prompts([a + b for a, b in zip(prefixes, new, strict=True)], seed=1)
    found = []
    for name in ("torch_native", "torch_flash"):
        runner = make_latent_runner(folder, "cuda", attention_backend=name)
        assert isinstance(runner.attn_backend, FlashLatentPrefillBackend) is ("flash" in name)
        assert isinstance(runner.attn_backend, LatentPrefillBackend)
        runner.attn_backend.chunk_tokens = runner.attn_backend.absorbed_tokens = 16
        with Requests(runner) as requests:
            rows = requests.open(len(prompts))
            begun = [i for i, prefix in enumerate(prefixes) if prefix]
            begins = [prompts[i][: prefixes[i]] for i in begun]
            runner.forward(requests.batch([rows[i] for i in begun], begins))
            ends = [prompt[prefix:] for prompt, prefix in zip(prompts, prefixes, strict=True)]
            batch = requests.batch(rows, ends)
            for replay in (False, True):
                poison(runner)
                found.append(runner.forward(batch, allow_graph=replay).next_token_logits)
            step = requests.decode(rows, [1, 2, 3, 4])
            for replay in (False, True):
                poison(runner)
                found.append(runner.forward(step, allow_graph=replay).next_token_logits)
        del runner
    for got, expected in zip(found[4:], found[:4], strict=True):
        torch.testing.assert_close(got, expected, atol=0.2, rtol=2e-2)
    for eager, replayed in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(replayed, eager, atol=0.2, rtol=2e-2)

"""A latent layer keeps one row a token, and its break serves them as the live batch wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hybrid_support import Requests
from mla_support import (
    WAYS,
    Case,
    fresh,
    make_case,
    make_deepseek,
    make_latent_runner,
    serve,
)
from models_support import poison, random_prompts, save_checkpoint

from breakgraph.attention import (
    FlashLatentPrefillBackend,
    LatentAttention,
    LatentPrefillBackend,
    LatentShape,
)
from breakgraph.distributed import Shard
from breakgraph.memory import KVPool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("v3", tmp_path_factory.mktemp("v3"))


@pytest.fixture
def v3(made: Case) -> Case:
    return fresh(made)


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

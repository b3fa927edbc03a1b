"""DeepSeek gives what transformers gives, whichever way its cached rows are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_support import Requests, make_hybrid_engine
from mla_support import MODELS, WAYS, Case, fresh, make_case, make_latent_runner, serve
from models_support import make_reference, random_prompts, save_checkpoint

from breakgraph.forward import ForwardBatch
from breakgraph.runner import DispatchReason

MIXED = [1, 7, 40, 2, 23]
_cases: dict[str, Case] = {}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    for name in MODELS:
        _cases[name] = make_case(name, tmp_path_factory.mktemp(name))
    yield _cases
    _cases.clear()


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return fresh(cases[request.param])


@pytest.fixture
def chunk_tokens(case: Case) -> Iterator[None]:
    backend = case.backend
    before = backend.chunk_tokens, backend.absorbed_tokens
    yield
    backend.chunk_tokens, backend.absorbed_tokens = before


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

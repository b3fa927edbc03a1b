"""The engine against ``transformers``, and what it leaves behind: nothing."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_support import CONTEXT, END, VOCAB, save_byte_model
from models_support import make_reference, save_checkpoint
from transformers import Qwen3ForCausalLM

from breakgraph import Engine
from breakgraph.engine import SamplingParams
from breakgraph.engine.tokenization import PromptEncoder, end_token_ids
from breakgraph.server_args import ServerArgs

LENGTHS = (1, 5, 17, 40, 3, 31, 64, 12)
PROMPTS = [[(7 * n + 3 * i * i + i) % 250 for i in range(n)] for n in LENGTHS]
GRAPHS = {"enable_breakable_cuda_graph": True, "piecewise_cuda_graph_tokens": [16, 32, 64, 128]}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    """A random Qwen3 with a byte tokenizer: its folder, and the model in transformers."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = save_byte_model(folder)
    return folder, model


def make(folder: Path, **flags: object) -> Engine:
    defaults = {"device": "cpu", "max_total_tokens": 512, "chunked_prefill_size": 128}
    return Engine(model_path=str(folder), **defaults | flags)


@pytest.fixture(scope="module")
def engine(reference) -> Iterator[Engine]:
    with make(reference[0], **GRAPHS) as engine:
        yield engine


@pytest.fixture(autouse=True)
def pools_are_left_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").runner.requests.is_empty


@torch.no_grad()
def expected_tokens(model: Qwen3ForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


@torch.no_grad()
def expected_logits(model: Qwen3ForCausalLM, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0]


FLAGS = {
    "eager": {},
    "graphs": GRAPHS,
    "chunks of 16": {"chunked_prefill_size": 16},
    "chunks of 37, graphs": {
        "chunked_prefill_size": 37,
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": [16, 37],
    },
    "pages, few requests": {"page_size": 16, "max_running_requests": 2},
    "a full pool": {"max_total_tokens": 90, "chunked_prefill_size": 64, "page_size": 3},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_equals_transformers(reference, flags):
    folder, model = reference
    with make(folder, **flags) as engine:
        chunk = engine.runner.chunk_size
        for prompt, result in zip(PROMPTS, engine.prefill(PROMPTS, True), strict=True):
            logits = expected_logits(model, prompt)
            torch.testing.assert_close(
                result.next_token_logits, logits[-1], atol=1e-4, rtol=0, check_device=True
            )
            logprobs = logits[:-1].log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
            assert result.input_token_logprobs[0] is None
            torch.testing.assert_close(
                torch.tensor(result.input_token_logprobs[1:]), logprobs, atol=1e-4, rtol=0
            )
            assert (result.bucket is None) == (result.reason != "replayed")
        assert engine.runner.requests.is_empty
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, 12), strict=True):
            assert answer.token_ids == expected_tokens(model, prompt, 12)
            assert answer.prompt_tokens == len(prompt)
            stopped = answer.token_ids[-1] == END
            assert answer.finish_reason == ("stop" if stopped else "length")
        assert engine.runner.requests.is_empty
        stats = engine.statistics
        assert stats.prompts == 2 * len(PROMPTS)
        assert stats.prompt_tokens == 2 * sum(LENGTHS)
        assert stats.prefills >= 2 * -(-sum(LENGTHS) // chunk)
        if "enable_breakable_cuda_graph" in flags:
            assert stats.replays == stats.prefills and stats.eager_ms == 0 < stats.replayed_ms
            assert 0 <= stats.padding < 0.5
        else:
            assert stats.replays == 0 < stats.eager_ms


SHARED = [(5 * i + 1) % 250 for i in range(40)]
ALIKE = [*([*SHARED, i, 2 * i] for i in range(6)), SHARED[:20], SHARED + [9] * 30]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"page_size": 16, **GRAPHS},
        {"max_total_tokens": 128, "page_size": 4},
        {"chunked_prefill_size": 24, "max_running_requests": 3},
        {"enable_breakable_cuda_graph": True, "chunked_prefill_size": 64},
    ],
    ids=["plain", "pages and graphs", "tight", "chunks", "graphs"],
)
def test_a_cached_prefix_changes_nothing(reference, flags):
    """Tokens and log-probabilities of prompts that share a beginning, as each has them alone."""
    folder, model = reference
    params = SamplingParams(max_new_tokens=10, temperature=0, logprobs=0)
    with make(folder, **flags) as engine:
        answers = engine.generate(ALIKE, sampling_params=params)
        assert engine.statistics.cached_tokens > 3 * 32
        assert engine.runner.requests.is_empty
    with make(folder, disable_radix_cache=True) as cold:
        for prompt, answer in zip(ALIKE, answers, strict=True):
            alone = cold.generate([prompt], sampling_params=params)[0]
            assert alone.cached_tokens == 0
            assert answer.token_ids == alone.token_ids == expected_tokens(model, prompt, 10)
            torch.testing.assert_close(
                torch.tensor([one.logprob for one in answer.logprobs]),
                torch.tensor([one.logprob for one in alone.logprobs]),
                atol=1e-4,
                rtol=0,
            )


def test_a_pool_that_is_too_small_for_all_gives_the_same_texts(reference):
    params = SamplingParams(max_new_tokens=60, temperature=0.7, seed=5, ignore_eos=True)
    prompts = [[i, 1, 2, 3] for i in range(6)]
    answers, retractions = [], []
    for tokens in (512, 80):
        with make(reference[0], max_total_tokens=tokens, chunked_prefill_size=32) as engine:
            engine._scheduler._headroom = 4
            answers.append([r.token_ids for r in engine.generate(prompts, sampling_params=params)])
            retractions.append(engine.statistics.retractions)
            assert engine.runner.requests.is_empty
    assert answers[0] == answers[1] and retractions[0] == 0 < retractions[1]


def test_prompt_logprobs_of_a_generation(engine: Engine):
    params = SamplingParams(max_new_tokens=2, temperature=0, prompt_logprobs=True)
    found = engine.generate([PROMPTS[3]] * 2, sampling_params=params)
    expected = engine.prefill([PROMPTS[3]], return_logprob=True)[0].input_token_logprobs
    for result in found:
        assert result.prompt_logprobs == pytest.approx(expected, abs=1e-4, nan_ok=False)


def test_graphs_can_be_left_out_of_a_call(engine: Engine):
    replayed = engine.generate(PROMPTS, 4)
    before = engine.statistics.replays
    eager = engine.generate(PROMPTS, 4, allow_graph=False)
    assert engine.statistics.replays == before
    assert [r.token_ids for r in eager] == [r.token_ids for r in replayed]
    assert {r.reason for r in replayed} == {"replayed"} and all(r.bucket for r in replayed)
    assert {r.reason for r in eager}.isdisjoint({"replayed"})
    assert all(r.bucket is None for r in eager)


def test_logprobs_only_when_asked(engine: Engine):
    assert engine.prefill([[1, 2, 3]])[0].input_token_logprobs is None
    assert engine.prefill([[1]], return_logprob=True)[0].input_token_logprobs == [None]


def test_no_prompts_no_results(engine: Engine):
    assert engine.prefill([]) == [] and engine.generate([]) == [] and engine.explain([]) == ""


def test_texts_are_encoded_and_decoded(engine: Engine):
    text = "two and two is"
    ids = engine.tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    by_text, by_ids = engine.generate(text, 8)[0], engine.generate([ids], 8)[0]
    assert by_text == by_ids
    assert by_text.text == engine.tokenizer.decode(by_ids.token_ids, skip_special_tokens=True)


def test_generation_ends_at_the_context(engine: Engine):
    answer = engine.generate([[5] * (CONTEXT - 3)], 50)[0]
    assert len(answer.token_ids) <= 3
    assert answer.finish_reason == "length" or answer.token_ids[-1] == END


def test_generation_ends_where_the_pool_does(reference):
    with make(reference[0], max_total_tokens=24, chunked_prefill_size=16) as engine:
        for length in (20, 23):
            answer = engine.generate([[5] * length], 50)[0]
            assert len(answer.token_ids) == 24 - length + 1 or answer.finish_reason == "stop"
            assert engine.runner.requests.is_empty
        with pytest.raises(ValueError, match=r"prompt 1 .*25 tokens.*--max-total-tokens"):
            engine.generate([[5], [5] * 24], 1)
        with pytest.raises(ValueError, match="--max-total-tokens"):
            engine.prefill([[5] * 25])
        assert engine.prefill([[5] * 24])[0].next_token_logits.shape == (VOCAB,)


BAD = {
    "empty ids": ([[1], []], "prompt 1 is empty"),
    "empty text": (["a", ""], "prompt 1 is empty"),
    "token past the vocabulary": ([[1], [2], [3, VOCAB]], f"prompt 2 has token {VOCAB} at 1"),
    "negative token": ([[-1]], "prompt 0 has token -1 at 0"),
    "float": ([[1, 2.0]], r"prompt 0 has 2\.0 at 1"),
    "bool": ([[True]], "prompt 0 has True at 0"),
    "no list of lists": ([1, 2, 3], "prompt 0 is of type int"),
    "past the context": ([[1], [2] * (CONTEXT + 1)], f"prompt 1 .*{CONTEXT}"),
}


@pytest.mark.parametrize(("prompts", "message"), BAD.values(), ids=BAD)
def test_bad_prompts_are_named_and_the_next_call_is_answered(engine: Engine, prompts, message):
    for call in (engine.prefill, engine.generate, engine.explain):
        with pytest.raises(ValueError, match=message):
            call(prompts)
        assert engine.runner.requests.is_empty
    assert engine.generate([[1, 2]], 2)[0].prompt_tokens == 2


def test_generate_leaves_room_for_a_token_and_prefill_need_not(engine: Engine):
    full = [[3] * CONTEXT]
    assert engine.prefill(full)[0].next_token_logits.shape == (VOCAB,)
    with pytest.raises(ValueError, match="room for a new one"):
        engine.generate(full)


def test_bad_arguments_are_refused(engine: Engine):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.generate("a", 0)
    with pytest.raises(ValueError, match="temperature is -1"):
        engine.generate("a", 1, temperature=-1)
    with pytest.raises(ValueError, match="temperature is nan"):
        engine.generate("a", 1, temperature=math.nan)
    with pytest.raises(ValueError, match="stop string is empty"):
        engine.generate("a", 1, stop=["x", ""])


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_a_failed_forward_leaves_the_pools_empty(engine: Engine, monkeypatch, failing: int):
    forward, calls = engine.runner.forward, []

    def fail(batch, **how):
        calls.append(batch)
        if len(calls) == failing:
            raise ArithmeticError("the device is on fire")
        return forward(batch, **how)

    expected = engine.generate(PROMPTS, 6)
    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(ArithmeticError, match="on fire"):
        engine.generate(PROMPTS, 6)
    assert engine.runner.requests.is_empty
    assert engine.generate(PROMPTS, 6) == expected


def test_explain_says_how_each_forward_would_run_and_runs_none(engine: Engine):
    before = engine.statistics.prefills
    assert "64" in engine.explain([[1] * 60])
    assert engine.explain([[1] * 90] * 3).count("128") >= 3
    assert engine.statistics.prefills == before


def test_embeddings_are_the_last_hidden_state(reference):
    folder, model = reference
    with make(folder, is_embedding=True, **GRAPHS) as engine:
        vectors = engine.embed(PROMPTS)
        assert vectors.shape == (len(PROMPTS), 32) and vectors.dtype == torch.float32
        for prompt, vector in zip(PROMPTS, vectors, strict=True):
            with torch.no_grad():
                hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
            wanted = torch.nn.functional.normalize(hidden, dim=0)
            torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=0)
        assert engine.embed([]).shape[0] == 0
        assert "replay" in engine.explain([[1, 2]])
        for call in (engine.prefill, engine.generate):
            with pytest.raises(ValueError, match="--is-embedding"):
                call([[1]])
        assert engine.runner.requests.is_empty


@pytest.mark.parametrize("flags", [{}, {"is_embedding": True}], ids=["plain", "is_embedding"])
def test_a_classifier_gives_its_class_logits(tmp_path: Path, flags):
    model = make_reference("Qwen3ForSequenceClassification", num_labels=3, head_dim=8)
    folder = save_checkpoint(model, tmp_path)
    prompts = [[1, 2, 3], [4], list(range(5, 25))]
    with make(folder, skip_tokenizer_init=True, **GRAPHS, **flags) as engine:
        for prompt, scores in zip(prompts, engine.embed(prompts), strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="needs logits"):
            engine.generate([[1]])


def test_a_model_without_head_gives_no_logits(tmp_path: Path):
    folder = save_checkpoint(make_reference("Qwen3Model", head_dim=8), tmp_path)
    with make(folder, skip_tokenizer_init=True) as engine:
        with pytest.raises(ValueError, match="Qwen3Model has no language-model head"):
            engine.prefill([[1]])
        with pytest.raises(ValueError, match="--is-embedding"):
            engine.embed([[1]])


def test_an_embedding_is_made_in_one_forward(reference):
    with make(reference[0], is_embedding=True, chunked_prefill_size=16) as engine:
        with pytest.raises(ValueError, match=r"prompt 1 has 17 tokens.*--chunked-prefill-size"):
            engine.embed([[1], [2] * 17])
        assert engine.embed([[1], [2] * 16]).shape[0] == 2


def test_embed_needs_an_embedding_engine(engine: Engine):
    with pytest.raises(ValueError, match="--is-embedding"):
        engine.embed([[1]])


def test_sampling_repeats_for_a_seed(reference):
    def sample(seed: int) -> list[list[int]]:
        with make(reference[0], random_seed=seed) as engine:
            return [r.token_ids for r in engine.generate(PROMPTS[:4], 10, temperature=1.5)]

    assert sample(1) == sample(1) != sample(2)


def test_without_a_tokenizer_ids_are_served_and_texts_refused(reference):
    with make(reference[0], skip_tokenizer_init=True) as engine:
        assert engine.generate([[1, 2]], 2)[0].text is None
        with pytest.raises(ValueError, match="--skip-tokenizer-init"):
            engine.generate("two")
        with pytest.raises(ValueError, match="--skip-tokenizer-init"):
            engine.generate([[1]], stop="x")


def test_a_closed_engine_says_so(reference):
    engine = make(reference[0])
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.prefill([[1]])


def test_server_args_and_keywords_do_not_mix(reference):
    args = ServerArgs(model_path=str(reference[0]), device="cpu", max_total_tokens=64)
    with pytest.raises(TypeError, match="page_size"):
        Engine(args, page_size=2)
    with Engine(args) as engine:
        assert engine.args is args


def test_stop_strings_end_a_text_before_them(engine: Engine):
    full = engine.generate([PROMPTS[3]], 12)[0]
    stop = full.text[3:5]
    cut = engine.generate([PROMPTS[3]], 12, stop=stop)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(full.token_ids)


def test_end_tokens_are_those_of_the_generation_config_first(reference, tmp_path: Path):
    config = reference[1].config
    assert end_token_ids(str(tmp_path), config, None) == {END}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert end_token_ids(str(tmp_path), config, None) == {3, 4}


def test_a_missing_tokenizer_names_the_flags(reference, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--tokenizer-path.*--skip-tokenizer-init"):
        make(reference[0], tokenizer_path=str(tmp_path))


def test_numpy_ids_are_ids():
    import numpy as np

    assert PromptEncoder(None, 9).encode([np.array([1, 2]), (np.int32(3),)]) == [[1, 2], [3]]

"""lm-evaluation-harness over the engine: its figures against transformers', its texts against ours.

Needs the extra ``eval``. The task files, which need nothing, are tested in test_lm_eval_tasks.py.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import CONTEXT, save_byte_model

from breakgraph import Engine
from breakgraph.engine import SamplingParams
from breakgraph.evaluation.answering import Asking, EngineAnswerer
from breakgraph.evaluation.chat import Chat
from breakgraph.evaluation.command import main
from breakgraph.evaluation.protocols import PROTOCOLS
from breakgraph.evaluation.questions import read_questions
from breakgraph.evaluation.report import grade
from breakgraph.evaluation.tasks import FOLDER

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from breakgraph.evaluation.lm_eval_model import BreakgraphLM

ARITHMETIC = Path(__file__).parent.parent / "examples" / "arithmetic"
FLAGS: dict[str, Any] = {
    "device": "cpu",
    "max_total_tokens": 8192,
    "max_running_requests": 8,
    "enable_breakable_cuda_graph": True,
    "chunked_prefill_size": 256,
    "piecewise_cuda_graph_tokens": (64, 256),
    "prefill_dispatch": "always",
}
QUESTION = read_questions(ARITHMETIC / "test.jsonl")[0]
LANGUAGES = ("de", "en", "es", "fr", "zh")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model_path=str(ARITHMETIC / "qwen3"), **FLAGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BreakgraphLM, Any]]:
    """A random model of bytes in windows of ``CONTEXT``, and the same in transformers."""
    folder = tmp_path_factory.mktemp("model")
    reference = save_byte_model(folder)
    flags = {"device": "cpu", "max_total_tokens": 512, "max_running_requests": 4}
    with Engine(model_path=str(folder), **flags) as engine:
        yield BreakgraphLM(engine=engine), reference


def asked(*arguments: Any) -> list[Any]:
    """Requests as the harness hands them over."""
    return [SimpleNamespace(args=one) for one in arguments]


# The same transcripts as the other harness.


class Heard:
    """What an engine was asked and what it said, in tokens."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        self.tokens: list[list[int]] = []
        generate = engine.generate

        def listen(prompts: Any, *args: Any, **options: Any) -> Any:
            self.prompts += engine.encoder.encode(prompts)
            results = generate(prompts, *args, **options)
            self.tokens += [list(result.token_ids) for result in results]
            return results

        monkeypatch.setattr(engine, "generate", listen)


@pytest.mark.parametrize(
    ("task", "names", "files", "count"),
    [
        ("gsm8k", ["gsm8k"], ["test.jsonl"], 16),
        (
            "mgsm",
            [f"mgsm_{language}" for language in LANGUAGES],
            [f"mgsm_{language}.tsv" for language in LANGUAGES],
            4,
        ),
    ],
)
def test_both_harnesses_agree(engine, monkeypatch, task, names, files, count):
    def refuse(*address: Any) -> None:
        raise AssertionError(f"a connection to {address}: the tasks are to work offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    protocol = PROTOCOLS[task]
    ours = Heard(engine, monkeypatch)
    items = protocol.items([ARITHMETIC / name for name in files], count, protocol.shots)
    asking = Asking(max_new_tokens=protocol.max_new_tokens, stop=protocol.stop)
    answers = EngineAnswerer(engine, asking).answer([item.prompt for item in items], "ours")
    graded = grade(protocol, items, answers)
    monkeypatch.undo()

    monkeypatch.setattr(socket.socket, "connect", refuse)
    theirs = Heard(engine, monkeypatch)
    replays = engine.statistics.replays
    manager = TaskManager(
        include_path=str(FOLDER),
        include_defaults=False,
        metadata={"data_path": str(ARITHMETIC)},
    )
    report = simple_evaluate(
        BreakgraphLM(engine=engine),
        tasks=[f"breakgraph_{name}" for name in names],
        task_manager=manager,
        limit=count,
        bootstrap_iters=0,
    )
    assert report is not None and engine.statistics.replays > replays

    assert theirs.prompts == ours.prompts
    assert theirs.tokens == ours.tokens
    samples = [one for name in names for one in report["samples"][f"breakgraph_{name}"]]
    assert len(samples) == len(graded) == count * len(names)
    for sample, one in zip(samples, graded, strict=True):
        assert sample["doc"]["prompt"] == sample["arguments"][0][0] == one.item.prompt
        assert sample["resps"] == [[one.answer.text]]
        assert sample["exact_match"] == (one.verdict == "right")
        assert sample["invalid"] == (one.verdict == "invalid")
    for name in names:
        share = [one.verdict == "right" for one in graded if one.item.group == name]
        result = report["results"][f"breakgraph_{name}"]["exact_match,none"]
        assert result == pytest.approx(sum(share) / len(share))
        assert result >= 0.8


def test_chat_prompts_agree(engine: Engine, tmp_path: Path, monkeypatch):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ word }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(engine, "args", SimpleNamespace(chat_template=str(template)))
    model = BreakgraphLM(engine=engine, chat_template_args={"word": "!"}, enable_thinking=False)
    text = model.apply_chat_template([{"role": "user", "content": "Why?"}])
    assert text == "user: Why?!\nassistant:"
    assert [model.tok_encode(text)] == Chat({"word": "!"}).encode(engine, ["Why?"])
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"}]
    assert model.apply_chat_template(turns, add_generation_prompt=False).endswith("assistant: So")
    assert model.chat_template(True) == template.read_text()
    assert model.chat_template(False) is None


def test_a_model_without_a_chat_template_says_so(bytes_model):
    with pytest.raises(ValueError, match=r"no chat template.*chat_template=FILE"):
        bytes_model[0].apply_chat_template([{"role": "user", "content": "Why?"}])


# Log-probabilities against transformers.


@torch.inference_mode()
def reference_logprobs(reference: Any, ids: list[int]) -> tuple[list[float], list[int]]:
    """Of each token but the first its log-probability, and the likeliest in its place."""
    logits = reference(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    chosen = logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    return chosen.tolist(), logits.argmax(-1).tolist()


def expected(reference: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    chosen, likeliest = reference_logprobs(reference, context + continuation)
    start = len(context) - 1
    return sum(chosen[start:]), likeliest[start:] == continuation


def test_loglikelihood_is_of_transformers(bytes_model):
    model, reference = bytes_model
    greedy = model.engine.generate(["abc", "xyz"], max_new_tokens=4, temperature=0.0)
    pairs = [("abc", "d"), ("abc", "defg"), ("xyz ", "abc"), ("", "hello"), ("q" * 40, "r" * 30)]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), (total, flag) in zip(pairs, found, strict=True):
        # The harness counts spaces between the two to the continuation.
        spaces = context[len(context.rstrip()) :]
        before = model.tok_encode(context.rstrip()) or [model.prefix_token_id]
        want = expected(reference, before, model.tok_encode(spaces + continuation))
        assert total == pytest.approx(want[0], abs=1e-4) and flag == want[1]

    # The likeliest bytes need not be a text, so these are given as tokens.
    requests = []
    for context, result in zip(("abc", "xyz"), greedy, strict=True):
        ids = result.token_ids
        for end in range(1, 5):
            wrong = [*ids[: end - 1], (ids[end - 1] + 1) % 256]
            requests += [(("", ""), model.tok_encode(context), one) for one in (ids[:end], wrong)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [flag for _, flag in found] == [True, False] * 8
    for (_, before, after), (total, flag) in zip(requests, found, strict=True):
        want = expected(reference, before, after)
        assert total == pytest.approx(want[0], abs=1e-4) and flag == want[1]


def test_the_flag_of_a_sure_model(engine: Engine):
    """Where log-probabilities tell most of it, and where they do not."""
    model = BreakgraphLM(engine=engine)
    question = QUESTION.prompt
    (right,) = engine.generate([question], max_new_tokens=96)
    prefills = engine.statistics.prefills
    pairs = [(question, right.text), (question, right.text.replace("#", "7")), ("A", " zebra")]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert [flag for _, flag in found] == [True, False, False]
    assert found[0][0] > -1 > found[1][0]
    assert engine.statistics.prefills - prefills < 12
    assert model.loglikelihood(asked((question, "")), disable_tqdm=True) == [(0.0, True)]


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused(bytes_model):
    model, reference = bytes_model
    context, continuation = "abcdefgh" * 16, "ijkl"
    ((total, _),) = model.loglikelihood(asked((context, continuation)), disable_tqdm=True)
    kept = model.tok_encode(context)[-(CONTEXT - 4) :]
    want = expected(reference, kept, model.tok_encode(continuation))
    assert total == pytest.approx(want[0], abs=1e-4)
    with pytest.raises(ValueError, match="leaves no room for its context"):
        model.loglikelihood(asked(("a", "b" * CONTEXT)), disable_tqdm=True)


@pytest.mark.parametrize("length", [1, 50, CONTEXT - 1, CONTEXT, 200, 2 * (CONTEXT - 1)])
def test_rolling_scores_every_token_once_in_full_windows(bytes_model, length: int):
    model, reference = bytes_model
    assert model.max_length == CONTEXT
    text = ("The quick brown fox jumps over the lazy dog. " * 5)[:length]
    ids = [model.prefix_token_id, *model.tok_encode(text)]
    step, total, done = CONTEXT - 1, 0.0, 1
    while done < len(ids):
        end = min(done + step, len(ids))
        window = ids[max(0, end - CONTEXT) : end]
        chosen, _ = reference_logprobs(reference, window)
        total += sum(chosen[-(end - done) :])
        done = end
    found = model.loglikelihood_rolling(asked((text,), ("ab",)), disable_tqdm=True)
    assert found[0] == pytest.approx(total, abs=1e-3)
    assert found[1] == pytest.approx(model.loglikelihood(asked(("", "ab")))[0][0], abs=1e-4)


def test_the_harness_own_kinds_of_task_run(bytes_model):
    from datasets import Dataset

    rows = [{"text": "abc", "choices": ["x", "yz", "w"], "answer": i} for i in range(2)]
    kinds: list[dict[str, Any]] = [
        {
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
        },
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "num_fewshot": 0,
        },
    ]
    common = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test"}
    tasks = [common | kind | {"task": kind["output_type"]} for kind in kinds]
    model, reference = bytes_model
    manager = TaskManager(include_defaults=False)
    report = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert report is not None
    results = report["results"]
    before = model.tok_encode("abc")
    totals = [expected(reference, before, model.tok_encode(f" {c}"))[0] for c in ("x", "yz", "w")]
    best = totals.index(max(totals))
    assert results["multiple_choice"]["acc,none"] == (0.5 if best < 2 else 0.0)
    whole, _ = expected(reference, [model.prefix_token_id], before)
    bits = results["loglikelihood_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-whole / 3 / 0.6931472, abs=1e-4)


# Texts.


def test_a_text_ends_where_its_task_says(engine: Engine):
    model = BreakgraphLM(engine=engine)
    prompt, answer = QUESTION.prompt, f"#### {QUESTION.answer:.0f}"
    whole, cut, short, two, none = model.generate_until(
        asked(
            (prompt, {"until": ["Question"], "max_gen_toks": 96, "do_sample": False}),
            (prompt, {"until": "####", "max_gen_toks": 96}),
            (prompt, {"until": [], "max_new_tokens": 2}),
            (prompt, {"until": ["nothing", "####"], "temperature": 0.0}),
            (prompt, {"until": ["", "<|endoftext|>"], "max_gen_toks": 96, "num_beams": 1}),
        ),
        disable_tqdm=True,
    )
    assert answer in whole and whole.startswith(cut) and cut and "####" not in cut
    assert whole.startswith(short) and len(engine.tokenizer(short)["input_ids"]) == 2
    assert two == cut and none == whole


def test_until_a_special_token_is_until_its_id(engine: Engine):
    model = BreakgraphLM(engine=engine)
    params = model._sampling_params({"until": ["<|endoftext|>", "\n"], "max_gen_toks": 5})
    assert params.stop_token_ids == (engine.tokenizer.eos_token_id,) and params.stop == ("\n",)


def test_sampling_follows_the_task(bytes_model):
    model, _ = bytes_model
    assert model._sampling_params({"do_sample": True}).temperature == 1.0
    assert model._sampling_params({"do_sample": False, "temperature": 0.7}).is_greedy
    assert model._sampling_params({}) == SamplingParams(max_new_tokens=256, temperature=0.0)
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3, "max_gen_toks": 8}
    first, again, other = model.generate_until(
        asked(("abc", how), ("abc", how), ("abc", how | {"seed": 4})), disable_tqdm=True
    )
    assert first == again != other
    with pytest.raises(ValueError, match=r"num_beams=4 is nothing this engine can do"):
        model.generate_until(asked(("abc", {"num_beams": 4})), disable_tqdm=True)


def test_a_prompt_is_cut_only_where_it_leaves_no_room(bytes_model, monkeypatch):
    model, _ = bytes_model
    heard = Heard(model.engine, monkeypatch)
    prompts = ["a" * (CONTEXT - 1), "b" * CONTEXT, ""]
    how = {"max_gen_toks": 8}
    model.generate_until(asked(*((prompt, how) for prompt in prompts)), disable_tqdm=True)
    assert [len(ids) for ids in heard.prompts] == [CONTEXT - 1, CONTEXT - 8, 1]
    assert heard.prompts[2] == [model.prefix_token_id]


def test_answers_are_kept_for_the_harness_cache(bytes_model):
    model, _ = bytes_model
    kept: list[tuple[str, Any, Any]] = []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *what: kept.append(what)))
    model.generate_until(asked(("abc", {"max_gen_toks": 2})), disable_tqdm=True)
    model.loglikelihood(asked(("abc", "d")), disable_tqdm=True)
    model.loglikelihood_rolling(asked(("abc",)), disable_tqdm=True)
    assert [one[:2] for one in kept] == [
        ("generate_until", ("abc", {"max_gen_toks": 2})),
        ("loglikelihood", ("abc", "d")),
        ("loglikelihood_rolling", ("abc",)),
    ]


# How it is made.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pretrained": "m"}, "unknown model argument pretrained; did you mean model_path"),
        ({"model_path": "m", "page_sizes": 2}, "unknown model argument page_sizes; did you mean"),
        ({"device": "cpu"}, "model_path is required"),
        ({"model_path": "m", "page_size": 0}, "--page-size must be at least 1"),
        (
            {"model_path": str(ARITHMETIC / "qwen3"), "skip_tokenizer_init": True}
            | {"max_total_tokens": 64, "device": "cpu"},
            "leave out --skip-tokenizer-init",
        ),
    ],
)
def test_a_wrong_model_argument_is_named(flags: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        get_model("breakgraph")(batch_size=1, **flags)


def test_the_command_line_finds_model_and_tasks(tmp_path: Path, capsys):
    flags = ["max_total_tokens=2048", "enable_breakable_cuda_graph=True"]
    flags += ["chunked_prefill_size=64", "piecewise_cuda_graph_tokens=[32,64]"]
    argv = ["lm-eval", "--tasks", "breakgraph_mgsm_fr", "--limit", "2", "--log_samples"]
    argv += ["--metadata", f"data_path={ARITHMETIC}", "--output_path", str(tmp_path)]
    argv += ["--model_args", ",".join([f"model_path={ARITHMETIC / 'qwen3'}", *flags])]
    assert main([*argv, "--gen_kwargs", "max_gen_toks=128"]) == 0
    assert "breakgraph_mgsm_fr" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results_*.json")
    report = json.loads(path.read_text())
    assert report["results"]["breakgraph_mgsm_fr"]["exact_match,none"] == 1.0
    assert report["config"]["prefills_replayed"] > 0

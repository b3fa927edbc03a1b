"""The arithmetic example: problems right, splits apart, tokenizer lossless, checkpoints able."""

import importlib.util
import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"


def _load(name: str) -> ModuleType:
    """A module of the example, which is no package."""
    spec = importlib.util.spec_from_file_location(f"arithmetic_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


problems = _load("problems")

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", text))))


def _check_answer(question: str, answer: str) -> int:
    """Work the answer's calculations out anew; returns how many steps it has."""
    *lines, last = answer.split("\n")
    known = {*_numbers(question), 2}  # 2: "half" and "twice"
    for line in lines:
        found = CALCULATION.findall(line)
        assert len(found) == 1, line
        x, operator, y, result = int(found[0][0]), found[0][1], int(found[0][2]), int(found[0][3])
        assert {x, y} <= known, f"a number from nowhere in {answer!r} to {question!r}"
        assert 2 <= result < problems.LIMIT
        right = {"+": x + y, "-": x - y, "*": x * y, "/": Fraction(x, y)}[operator]
        assert right == result, line
        known.add(result)
    assert last == f"#### {result}"
    return len(lines)


LANGUAGES = ("de", "en", "es", "fr", "zh")


def test_every_language_tells_every_story() -> None:
    assert sorted(problems.LANGUAGES) == list(LANGUAGES)
    for language, words in problems.LANGUAGES.items():
        assert set(words.stories) == set(problems.STORIES), language
        assert len(set(words.names)) == len(words.names) >= 3
        for choices in words.nouns.values():
            assert len(set(choices)) == len(choices) and all(choices), language


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", sorted(problems.STORIES))
def test_every_story_evaluates_right(kind: str, language: str) -> None:
    rng = random.Random(kind)
    seen = set()
    for _ in range(200):
        problem = problems.draw(rng, kind, language)
        steps = _check_answer(problem["question"], problem["answer"])
        assert steps == len(problems.STORIES[kind].steps)
        given = len(problems.STORIES[kind].draws)
        assert len(_numbers(problem["question"])) == given, problem["question"]
        assert not re.search(r"[{}]|step\d", problem["question"] + problem["answer"])
        seen.add(problem["question"])
    assert len(seen) > 100


def test_splits_share_no_question_and_no_set_of_numbers() -> None:
    train = [p["question"] for p in problems.generate("train", 20_000, seed=1)]
    test = [p["question"] for p in problems.generate("test", 2_000, seed=1)]
    assert len(set(train)) == 20_000 and len(set(test)) == 2_000
    assert not set(train) & set(test)
    assert not set(map(_numbers, train)) & set(map(_numbers, test))


def test_a_seed_gives_the_same_problems_again() -> None:
    first = list(problems.generate("train", 50, seed=3))
    assert first == list(problems.generate("train", 50, seed=3))
    assert first != list(problems.generate("train", 50, seed=4))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test'"):
        next(problems.generate("valid", 1))


def test_the_held_out_file_is_what_the_generator_writes() -> None:
    lines = (EXAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    assert held_out == list(problems.generate("test", 200))
    steps = [_check_answer(p["question"], p["answer"]) for p in held_out]
    assert set(steps) == {1, 2, 3}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_held_out_tables_are_what_the_generator_writes(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = EXAMPLE / f"mgsm_{language}.tsv"
    again = tmp_path / held_out.name
    options = ["--count", "100", "--seed", "1", "--language", language, "--out", str(again)]
    monkeypatch.setattr(sys, "argv", ["problems.py", *options])
    problems.main()
    assert held_out.read_bytes() == again.read_bytes()
    rows = [line.split("\t") for line in held_out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({question for question, _ in rows}) == 100
    for question, number in rows:
        assert problems.split_of(question) == "test" and number.isdecimal()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_style_frames_the_question_and_closes_the_answer(language: str) -> None:
    problem = next(problems.generate("test", 1, language=language))
    question, answer = problem["question"], problem["answer"]
    asked = {style: problems.prompt(question, language, style) for style in problems.STYLES}
    told = {style: problems.completion(answer, language, style) for style in problems.STYLES}
    assert question in asked["plain"] and told["plain"] == f" {answer}"
    assert asked["mgsm"].endswith(f"\n\n{question}")
    assert asked["mgsm_framed"].endswith(f"\n\n{asked['plain']}")
    assert told["mgsm"].startswith(f"\n{answer}\n")
    assert told["mgsm_framed"].startswith(f" {answer}\n")
    answer_word = asked["plain"].splitlines()[-1].rstrip(":： ")
    for style in ("mgsm", "mgsm_framed"):
        last = told[style].splitlines()[-1]
        assert last.startswith(answer_word)
        assert last.endswith(f": {problems.final_number(answer)}")


def test_english_is_asked_as_in_gsm8k() -> None:
    assert problems.prompt("Why?") == "Question: Why?\nAnswer:"
    assert problems.completion("So.\n#### 3") == " So.\n#### 3"


def test_the_tokenizer_is_lossless_and_splits_digits() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(EXAMPLE / "qwen3" / "tokenizer.json"))
    texts = ["", " a\t b\n\n\n", "naïve Füße, 数学 42 🙂", "don't  stop\r\n", "\x00\x7f~"]
    for language in LANGUAGES:
        for style in problems.STYLES:
            for problem in problems.generate("train", 100, seed=5, language=language):
                texts.append(
                    problems.prompt(problem["question"], language, style)
                    + problems.completion(problem["answer"], language, style)
                )
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert tokenizer.token_to_id("<|endoftext|>") == 0


CHECKPOINTS = ("qwen3", "nemotron_h")


def test_the_checkpoints_share_a_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files = {(EXAMPLE / folder / name).read_bytes() for folder in CHECKPOINTS}
        assert len(files) == 1, name


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_answers_held_out_questions_in_every_language(checkpoint: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = EXAMPLE / checkpoint
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12e6
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [
        (language, next(problems.generate("test", 1, seed=7, language=language)))
        for language in LANGUAGES
    ]
    prompts = [problems.prompt(problem["question"], language) for language, problem in asked]
    inputs = tokenizer(prompts, padding=True).convert_to_tensors("pt")
    with torch.inference_mode():
        output = model.eval().generate(**inputs, max_new_tokens=80, do_sample=False)
    written = output[:, inputs["input_ids"].shape[1] :]
    for text, (_, problem) in zip(
        tokenizer.batch_decode(written, skip_special_tokens=True), asked, strict=True
    ):
        assert text.endswith(f"\n#### {problems.final_number(problem['answer'])}"), text


@pytest.mark.parametrize("length", [5, 16, 40])
def test_the_training_scan_is_what_transformers_computes(length: int) -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    mamba2 = _load("mamba2")
    draw = torch.Generator().manual_seed(length)
    rows, heads, groups, dim, state = 2, 4, 2, 16, 8
    x, dt = (torch.randn(rows, length, heads, *last, generator=draw) for last in ((dim,), ()))
    b, c = (torch.randn(rows, length, groups, state, generator=draw) for _ in range(2))
    decay, skip = -4 * torch.rand(heads, generator=draw), torch.randn(heads, generator=draw)
    weights = [x, dt, decay, b, c, skip, torch.randn(heads, generator=draw) - 3]
    results = []
    with mamba2.matrix_product_scan():
        assert modeling.mamba2_chunk_scan is mamba2.chunk_scan
    for scan in (modeling.mamba2_chunk_scan, mamba2.chunk_scan):
        for weight in weights:
            weight.requires_grad_()
        x, dt, decay, b, c, skip, dt_bias = weights
        options = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": (1e-3, float("inf"))}
        y = scan(x, dt, decay, b, c, chunk_size=16, D=skip, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), weights)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

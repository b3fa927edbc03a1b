"""What is asked and what counts, to the letter: a change here is another protocol."""

import json
from pathlib import Path

import pytest

from breakgraph.evaluation.protocols import LANGUAGES, PROTOCOLS

GSM8K, MGSM = PROTOCOLS["gsm8k"], PROTOCOLS["mgsm"]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    file = tmp_path / "test.jsonl"
    lines = [{"question": f"Q{i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def mgsm_file(tmp_path: Path, language: str) -> Path:
    file = tmp_path / f"mgsm_{language}.tsv"
    file.write_text("Q0?\t18\nQ1?\t1,080\n", encoding="utf-8")
    return file


def test_gsm8k_is_asked_behind_the_first_questions_which_are_not_scored(gsm8k: Path):
    items = GSM8K.items([gsm8k], None, 2)
    assert [item.index for item in items] == [2, 3]
    assert items[0].prompt == (
        "Question: Q0?\nAnswer: It is 0.\n#### 0\n\n"
        "Question: Q1?\nAnswer: It is 1.\n#### 1\n\n"
        "Question: Q2?\nAnswer:"
    )
    assert items[0].shots == items[1].shots and items[0].prompt.startswith(items[0].shots)
    assert [item.index for item in GSM8K.items([gsm8k], 1, 0)] == [0]
    assert (GSM8K.name, GSM8K.shots, GSM8K.max_new_tokens) == ("sglang-gsm8k-v1", 5, 512)
    assert GSM8K.stop == ("Question", "Assistant:", "<|separator|>")


def test_the_last_number_of_a_gsm8k_answer_wins(gsm8k: Path):
    (item,) = GSM8K.items([gsm8k], 1, 0)
    assert GSM8K.number(item, " 3 + 4 = 7\n#### 7\nThat is $1,200.") == 1200
    assert GSM8K.number(item, " I do not know.") is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_mgsm_names_its_answer_word_and_reads_behind_the_last_one(tmp_path: Path, language: str):
    word, instruction = LANGUAGES[language].answer_word, LANGUAGES[language].instruction
    assert word in instruction
    item, other = MGSM.items([mgsm_file(tmp_path, language)], None, 0)
    assert item.prompt == f"{instruction}\n\nQ0?" and item.group == f"mgsm_{language}"
    assert (item.question.answer, other.question.answer) == (18, 1080)
    assert MGSM.number(item, f"9 + 9\n{word}: 4\n{word}: **18**.") == 18
    assert MGSM.number(item, f"{word}：1,080") == 1080
    assert MGSM.number(item, "the number is 18") is None
    assert MGSM.number(item, f"18\n{word}: ?") is None


def test_mgsm_reads_its_languages_separators_and_spellings(tmp_path: Path):
    (de, *_), (fr, *_), (bn, *_) = (
        MGSM.items([mgsm_file(tmp_path, language)], None, 0) for language in ("de", "fr", "bn")
    )
    assert MGSM.number(de, "Antwort: 70.000 €") == 70000
    assert MGSM.number(fr, "Re\u0301ponse : 70 000") == 70000
    assert MGSM.number(bn, "উত্তর: ৭০,০০০") == 70000


def test_all_eleven_languages_are_there():
    assert list(LANGUAGES) == ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]
    assert (MGSM.name, MGSM.stop, MGSM.shots) == ("simple-evals-mgsm-v1", (), 0)


def test_mistakes_are_named(gsm8k: Path, tmp_path: Path):
    file = mgsm_file(tmp_path, "en")
    for protocol, files, shots, message in (
        (GSM8K, [gsm8k, gsm8k], 0, "one file, not 2"),
        (GSM8K, [gsm8k], 4, "lower it"),
        (MGSM, [file], 3, "zero-shot; leave out --num-shots"),
        (MGSM, [file, file], 0, "names mgsm_en twice"),
        (MGSM, [mgsm_file(tmp_path, "xx")], 0, "not in 'xx'"),
    ):
        with pytest.raises(ValueError, match=message):
            protocol.items(files, None, shots)

"""Questions from files, and the number that an answer ends in."""

import json
from pathlib import Path

import pytest

from breakgraph.evaluation.questions import (
    Question,
    final_number,
    is_right,
    read_mgsm,
    read_questions,
)


def test_questions_are_read_or_the_line_is_named(tmp_path: Path):
    file = tmp_path / "q.jsonl"
    good = json.dumps({"question": "How many?", "answer": "2 + 1,200 = 1,202\n#### 1,202"})
    file.write_text(good + "\n\n")
    (question,) = read_questions(str(file))
    assert question.answer == 1202
    assert question.prompt == "Question: How many?\nAnswer:"
    for bad in ("{", "[]", '{"question": "?"}', '{"question": "?", "answer": "none"}'):
        file.write_text(good + "\n" + bad)
        with pytest.raises(ValueError, match=r"q\.jsonl, line 2"):
            read_questions(str(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        read_questions(str(file))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5.\n#### 5", 5),
        ("#### 7\n\nQuestion: next? Answer: 9 #### 11", 7),
        ("it is 3 and then -4.", -4),
        ("#### $1,234.50", 1234.5),
        ("#### 18.", 18),
    ],
)
def test_the_answer_is_the_number_behind_the_mark_or_the_last(text: str, number: float):
    assert final_number(text) == number


def test_no_number_is_wrong():
    question = Question("?", 4)
    assert is_right(question, "#### 4.0")
    assert not is_right(question, "none") and not is_right(question, None)


def test_mgsm_files_are_named_by_their_language(tmp_path: Path):
    file = tmp_path / "mgsm_th.tsv"
    file.write_text("กี่ตัว?\t1,080\nอีก?\t5\n")
    assert read_mgsm(file) == ("th", [Question("กี่ตัว?", 1080), Question("อีก?", 5)])
    file.write_text("no tab")
    with pytest.raises(ValueError, match=r"mgsm_th\.tsv, line 1: not a question, a tab"):
        read_mgsm(file)
    with pytest.raises(ValueError, match="named by its language"):
        read_mgsm(tmp_path / "questions.tsv")

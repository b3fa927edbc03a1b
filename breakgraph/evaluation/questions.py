"""Word problems with their right answers, from files; a bad line is named, never skipped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from breakgraph.evaluation.numbers import find_numbers

LANGUAGE = re.compile(r"(?:^|_)([a-z]{2})\.tsv$")


@dataclass(frozen=True, slots=True)
class Question:
    """A word problem, its right answer and, where the file has it, the worked solution."""

    question: str
    answer: float
    worked: str = ""

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


def read_questions(path: str | Path) -> list[Question]:
    """The problems of a GSM8K-format file. Raises ValueError, naming the line, or OSError."""

    def parse(line: str) -> Question:
        entry = json.loads(line)
        return Question(str(entry["question"]), final_number(entry["answer"]), entry["answer"])

    return _read(path, parse, '{"question": …, "answer": "… #### N"}')


def read_mgsm(path: str | Path) -> tuple[str, list[Question]]:
    """The language in a file's name and its problems, a ``question<TAB>answer`` a line.

    Raises:
        ValueError: the name has no language, or a line is not of this form; the message names it.
        OSError: the file cannot be read.
    """
    language = LANGUAGE.search(Path(path).name)
    if language is None:
        raise ValueError(f"{path}: a file of MGSM is named by its language, such as mgsm_en.tsv")

    def parse(line: str) -> Question:
        question, answer = line.rstrip("\n").split("\t")
        return Question(question, final_number(answer))

    return language[1], _read(path, parse, "a question, a tab and a number")


def _read(path: str | Path, parse: Callable[[str], Question], form: str) -> list[Question]:
    questions = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                questions.append(parse(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not {form} ({error})") from error
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def final_number(text: str) -> float:
    """The number an answer ends in: behind its first ``####`` if any, else its last one.

    Raises:
        ValueError: there is none.
    """
    _, marked, tail = text.partition("####")
    numbers = find_numbers(tail if marked else text)
    if not numbers:
        raise ValueError("the answer has no number")
    return numbers[0 if marked else -1]


def is_right(question: Question, text: str | None) -> bool:
    """Whether the text ends in the question's answer."""
    try:
        return final_number(text or "") == question.answer
    except ValueError:
        return False

"""How questions are asked and graded. A name stands for one way: what changes an answer or a grade
gets a new name.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from breakgraph.evaluation.numbers import find_numbers
from breakgraph.evaluation.questions import Question, read_mgsm, read_questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question as it is asked.

    Attributes:
        group: what it is counted in: ``gsm8k``, or ``mgsm_`` and its language.
        index: its place in its file, from 0.
        question: with the right answer.
        shots: what stands before it, the same for every question of the file.
        prompt: the whole prompt.
    """

    group: str
    index: int
    question: Question
    shots: str
    prompt: str


class Protocol(ABC):
    """A named way of asking and grading; decoding is greedy in all."""

    name: ClassVar[str]
    stop: ClassVar[tuple[str, ...]]
    shots: ClassVar[int]
    max_new_tokens: ClassVar[int]

    @abstractmethod
    def items(self, paths: Sequence[Path], count: int | None, shots: int) -> list[Item]:
        """The first ``count`` questions of each file. Raises ValueError or OSError."""

    @abstractmethod
    def number(self, item: Item, text: str) -> float | None:
        """The number that ``text`` answers ``item`` with; None where it is invalid."""


class Gsm8k(Protocol):
    """SGLang's few-shot GSM8K: worked questions first, and the last number of the text wins."""

    name = "sglang-gsm8k-v1"
    stop = ("Question", "Assistant:", "<|separator|>")
    shots = 5
    max_new_tokens = 512

    def items(self, paths: Sequence[Path], count: int | None, shots: int) -> list[Item]:
        if len(paths) != 1:
            raise ValueError(f"--data-path: gsm8k is one file, not {len(paths)}")
        questions = read_questions(paths[0])
        if len(questions) <= shots:
            raise ValueError(
                f"{paths[0]} has {len(questions)} questions, all of them taken by --num-shots "
                f"{shots}; lower it"
            )
        before = "".join(f"{q.prompt} {q.worked}\n\n" for q in questions[:shots])
        asked = list(enumerate(questions))[shots:][:count]
        return [
            Item(group="gsm8k", index=i, question=q, shots=before, prompt=before + q.prompt)
            for i, q in asked
        ]

    def number(self, item: Item, text: str) -> float | None:
        return next(reversed(find_numbers(text)), None)


@dataclass(frozen=True, slots=True)
class Language:
    """What MGSM's protocol says in a language; the instruction names the answer word."""

    answer_word: str
    instruction: str
    decimal_comma: bool = False


LANGUAGES = {
    "bn": Language(
        "উত্তর",
        'এই অঙ্কটি ধাপে ধাপে সমাধান করুন। শেষ লাইনে "উত্তর:" লিখে তার পরে শুধু চূড়ান্ত সংখ্যাটি লিখুন।',
    ),
    "de": Language(
        "Antwort",
        "Löse diese Aufgabe Schritt für Schritt. Schreibe die gesuchte Zahl in die letzte Zeile, "
        'hinter "Antwort:".',
        decimal_comma=True,
    ),
    "en": Language(
        "Answer",
        "Solve this problem step by step. Write the final number on the last line, after "
        '"Answer:".',
    ),
    "es": Language(
        "Respuesta",
        "Resuelve este problema paso a paso. Escribe el número final en la última línea, después "
        'de "Respuesta:".',
        decimal_comma=True,
    ),
    "fr": Language(
        "Réponse",
        "Résous ce problème étape par étape. Écris le nombre final sur la dernière ligne, après "
        "« Réponse : ».",
        decimal_comma=True,
    ),
    "ja": Language(
        "答え",
        "この問題を順を追って解いてください。最後の行に「答え:」と書き、その後に最終的な数だけを書いてください。",
    ),
    "ru": Language(
        "Ответ",
        "Решите эту задачу шаг за шагом. В последней строке напишите итоговое число после слова "
        "«Ответ:».",
        decimal_comma=True,
    ),
    "sw": Language(
        "Jibu",
        "Tatua swali hili hatua kwa hatua. Andika nambari ya mwisho kwenye mstari wa mwisho, baada "
        'ya "Jibu:".',
    ),
    "te": Language(
        "సమాధానం",
        'ఈ లెక్కను దశల వారీగా పరిష్కరించండి. చివరి పంక్తిలో "సమాధానం:" తర్వాత తుది సంఖ్యను మాత్రమే రాయండి.',
    ),
    "th": Language("คำตอบ", 'แก้โจทย์ข้อนี้ทีละขั้นตอน แล้วเขียนตัวเลขสุดท้ายไว้ในบรรทัดสุดท้าย หลังคำว่า "คำตอบ:"'),
    "zh": Language("答案", "请一步一步地解答这道题。在最后一行的“答案:”后面写出最终的数字。"),
}


class Mgsm(Protocol):
    """simple-evals' MGSM: zero-shot, the last number behind the language's last answer word."""

    name = "simple-evals-mgsm-v1"
    stop = ()
    shots = 0
    max_new_tokens = 2048

    def items(self, paths: Sequence[Path], count: int | None, shots: int) -> list[Item]:
        if shots:
            raise ValueError(f"{self.name} is zero-shot; leave out --num-shots")
        items: list[Item] = []
        for path in paths:
            code, questions = read_mgsm(path)
            if code not in LANGUAGES:
                raise ValueError(f"{path}: MGSM is in {', '.join(LANGUAGES)}, not in {code!r}")
            group, ask = f"mgsm_{code}", LANGUAGES[code].instruction
            if any(item.group == group for item in items):
                raise ValueError(f"--data-path names {group} twice; keep one")
            items += [
                Item(group=group, index=i, question=q, shots="", prompt=f"{ask}\n\n{q.question}")
                for i, q in enumerate(questions[:count])
            ]
        return items

    def number(self, item: Item, text: str) -> float | None:
        language = LANGUAGES[item.group.removeprefix("mgsm_")]
        text, word = (unicodedata.normalize("NFC", one) for one in (text, language.answer_word))
        _, found, tail = text.rpartition(word)
        numbers = find_numbers(tail, decimal_comma=language.decimal_comma) if found else []
        return next(reversed(numbers), None)


PROTOCOLS: dict[str, Protocol] = {"gsm8k": Gsm8k(), "mgsm": Mgsm()}

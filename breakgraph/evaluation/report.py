"""What a run found: graded answers, their shares, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from breakgraph.evaluation.answering import Answer
from breakgraph.evaluation.protocols import Item, Protocol
from breakgraph.evaluation.significance import wilson_interval

REPORTED = ("text", "completion_tokens", "finish_reason", "seconds", "prefill")
Verdict = Literal["right", "wrong", "invalid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """A question, an answer and a verdict; an answer without a number is invalid, and not right."""

    item: Item
    answer: Answer
    number: float | None
    verdict: Verdict


def grade(protocol: Protocol, items: Sequence[Item], answers: Sequence[Answer]) -> list[Graded]:
    """A verdict for each answer."""
    graded = []
    for item, answer in zip(items, answers, strict=True):
        number = protocol.number(item, answer.text)
        right = number == item.question.answer
        verdict: Verdict = "invalid" if number is None else "right" if right else "wrong"
        graded.append(Graded(item=item, answer=answer, number=number, verdict=verdict))
    return graded


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One way over all questions.

    Attributes:
        name: of the way, such as ``graphs``.
        graded: in the order of the questions.
        seconds: from the first request to the last answer.
    """

    name: str
    graded: list[Graded]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Shares by group and of all, and how fast it went."""
        groups = {one.item.group: None for one in self.graded}
        tokens = sum(one.answer.completion_tokens for one in self.graded)
        each = [one.answer.seconds for one in self.graded if one.answer.seconds is not None]
        return {
            "name": self.name,
            **_shares(self.graded),
            "groups": {
                group: _shares([one for one in self.graded if one.item.group == group])
                for group in groups
            },
            "latency_seconds": round(self.seconds, 3),
            "median_answer_seconds": round(median(each), 3) if each else None,
            "completion_tokens": tokens,
            "tokens_per_second": round(tokens / self.seconds, 1) if self.seconds else None,
        }

    def lines(self) -> list[str]:
        """What to print."""
        summary = self.summary()
        groups = summary["groups"]
        rows = [*groups.items()] if len(groups) > 1 else []
        width = max(len(name) for name in (*groups, self.name))
        lines = []
        for name, share in [*rows, (self.name, summary)]:
            low, high = share["interval_95"]
            lines.append(
                f"{name:<{width}}  accuracy {share['accuracy']:.3f} "
                f"[{low:.3f}, {high:.3f}]  {share['right']}/{share['questions']} right, "
                f"{share['invalid']} invalid"
            )
        speed = f"latency {summary['latency_seconds']:.1f} s, "
        return [*lines, speed + f"{summary['tokens_per_second']} tokens a second"]


def _shares(graded: Sequence[Graded]) -> dict[str, Any]:
    right = sum(one.verdict == "right" for one in graded)
    low, high = wilson_interval(right, len(graded))
    return {
        "questions": len(graded),
        "right": right,
        "invalid": sum(one.verdict == "invalid" for one in graded),
        "accuracy": right / len(graded),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def write_report(path: Path, head: dict[str, Any], runs: Sequence[Run]) -> None:
    """Every question with every way's answer and verdict, as JSON. Raises OSError."""
    questions = []
    for ways in zip(*(run.graded for run in runs), strict=True):
        item = ways[0].item
        entry: dict[str, Any] = {
            "group": item.group,
            "index": item.index,
            "question": item.question.question,
            "prompt": item.prompt[len(item.shots) :],
            "right_answer": item.question.answer,
        }
        for run, one in zip(runs, ways, strict=True):
            answer = {name: getattr(one.answer, name) for name in REPORTED}
            entry[run.name] = {"verdict": one.verdict, "number": one.number} | answer
        questions.append(entry)
    report = head | {
        "runs": [run.summary() for run in runs],
        "shots": runs[0].graded[0].item.shots,
        "questions": questions,
    }
    text = json.dumps(report, ensure_ascii=False, indent=1, default=str)
    path.write_text(text + "\n", encoding="utf-8")

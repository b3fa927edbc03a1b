"""Whether graphs change answers: the same questions both ways, judged in pairs.

Rounding alone makes ways differ, but only where two tokens are almost as likely as each other. So
a difference is a bug's if it changes how many answers are right by more than chance, or if one way
chose a token, or gave one a log-probability, that is further from the other way's than rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from breakgraph.evaluation.answering import Answer, Token
from breakgraph.evaluation.significance import mcnemar_exact

ALPHA = 0.05
# Nats. In bfloat16 two logits near 20 are at least 0.125 apart, and several layers' rounding adds.
MAX_GAP = {"float32": 0.01, "bfloat16": 1.0, "float16": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstDifference:
    """Where two answers part.

    Attributes:
        question: which of those compared.
        position: of the token, from 0.
        first: the token of the first way; None where it had ended.
        second: the same of the second way.
        gap: by how many nats the two ways together preferred their own token: the larger of the
            first way's log-probability of its token over the other's, and the second way's.
            Infinite where one way had ended; a lower bound where the other's token was not among
            the likeliest; None where no log-probabilities are known.
    """

    question: int
    position: int
    first: Token | None
    second: Token | None
    gap: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two ways over the same questions.

    Attributes:
        questions: how many.
        only_first: questions that the first way alone got right.
        only_second: questions that the second way alone got right.
        p_value: McNemar's exact test.
        same_text: answers with the same text.
        differences: where the others part.
        disagreement: the most nats between the two log-probabilities of a token, likely or not,
            behind texts that are the same so far; None where they are not known.
        max_gap: what is still rounding.
    """

    questions: int
    only_first: int
    only_second: int
    p_value: float
    same_text: int
    differences: list[FirstDifference]
    disagreement: float | None
    max_gap: float

    @property
    def beyond_rounding(self) -> list[FirstDifference]:
        return [one for one in self.differences if one.gap is not None and one.gap > self.max_gap]

    @property
    def significant(self) -> bool:
        """Whether it is more than chance and rounding."""
        disagree = self.disagreement is not None and self.disagreement > self.max_gap
        return self.p_value < ALPHA or bool(self.beyond_rounding) or disagree

    def lines(self, first: str, second: str) -> list[str]:
        """What to print."""
        shares = f"{first} alone right {self.only_first}, {second} alone {self.only_second}"
        lines = [
            f"{first} against {second}: {shares}, McNemar's exact p = {self.p_value:.3g}",
            f"the same text: {self.same_text} of {self.questions}",
        ]
        if self.disagreement is not None:
            lines.append(
                f"largest disagreement on a log-probability: {self.disagreement:.2g} "
                f"(rounding is at most {self.max_gap:g})"
            )
        for one in sorted(self.differences, key=lambda d: -(d.gap or 0.0))[:10]:
            gap = "unknown" if one.gap is None else f"{one.gap:.3g}"
            tokens = f"{one.first!r} became {one.second!r}"
            lines.append(f"  question {one.question}, token {one.position}: {tokens}, gap {gap}")
        verdict = "more than chance and rounding: a bug" if self.significant else "no difference"
        return [*lines, f"verdict: {verdict}" + ("" if self.significant else " but rounding")]


def compare(
    first: Sequence[Answer],
    second: Sequence[Answer],
    right: Sequence[tuple[bool, bool]],
    max_gap: float,
) -> Comparison:
    """Judge two ways.

    Args:
        first: its answers.
        second: the other's, to the same questions.
        right: per question whether the first and whether the second is right.
        max_gap: nats that rounding may make.
    """
    differences: list[FirstDifference] = []
    disagreement: float | None = None
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        part, apart = _pair(number, one, other)
        if part is not None:
            differences.append(part)
        if apart is not None:
            disagreement = max(apart, disagreement or 0.0)
    only_first = sum(a and not b for a, b in right)
    only_second = sum(b and not a for a, b in right)
    return Comparison(
        questions=len(first),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_exact(only_first, only_second),
        same_text=sum(a.text == b.text for a, b in zip(first, second, strict=True)),
        differences=differences,
        disagreement=disagreement,
        max_gap=max_gap,
    )


def _pair(
    number: int, first: Answer, second: Answer
) -> tuple[FirstDifference | None, float | None]:
    """Where two answers part, and how far their log-probabilities are apart up to there."""
    if first.tokens is None or second.tokens is None:
        if first.text == second.text:
            return None, None
        place = next(
            (i for i, (a, b) in enumerate(zip(first.text, second.text, strict=False)) if a != b),
            min(len(first.text), len(second.text)),
        )
        parted = FirstDifference(question=number, position=place, first=None, second=None, gap=None)
        return parted, None
    ids = zip(first.tokens, second.tokens, strict=False)
    shorter = min(len(first.tokens), len(second.tokens))
    place = next((i for i, (a, b) in enumerate(ids) if a != b), shorter)
    apart = _apart(first, second, place)
    if place == len(first.tokens) == len(second.tokens):
        return None, apart
    a = first.tokens[place] if place < len(first.tokens) else None
    b = second.tokens[place] if place < len(second.tokens) else None
    gap = float("inf")
    if a is not None and b is not None:
        gap = max(_gap(first, place, b), _gap(second, place, a))
    return FirstDifference(question=number, position=place, first=a, second=b, gap=gap), apart


def _apart(first: Answer, second: Answer, place: int) -> float | None:
    """How far the two are apart on a token that both give a log-probability, up to ``place``.

    The unlikely ones tell most: a sure model is as sure of its choice when its attention is wrong.
    """
    if first.top is None or second.top is None:
        return None
    tops = zip(first.top[: place + 1], second.top[: place + 1], strict=False)
    return max((abs(a[t] - b[t]) for a, b in tops for t in a.keys() & b.keys()), default=None)


def _gap(answer: Answer, place: int, other: Token) -> float:
    """How much likelier an answer's token was than ``other``, in its own eyes; at least 0."""
    if answer.top is None or answer.logprobs is None:
        return 0.0
    top = answer.top[place]
    value = top.get(other, min(top.values(), default=answer.logprobs[place]))
    return max(0.0, answer.logprobs[place] - value)

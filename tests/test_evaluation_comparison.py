"""Intervals, McNemar's test, and what tells rounding from a bug."""

import math

import pytest

from breakgraph.evaluation.answering import Answer
from breakgraph.evaluation.comparison import Comparison, compare
from breakgraph.evaluation.significance import mcnemar_exact, wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_interval(right: int, total: int, low: float, high: float):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1), (5, 5, 1), (0, 5, 0.0625), (0, 6, 0.03125), (10, 2, 0.03857), (2, 10, 0.03857)],
)
def test_mcnemar(first: int, second: int, p: float):
    assert mcnemar_exact(first, second) == pytest.approx(p, abs=5e-6)
    assert mcnemar_exact(4000, 4000) == 1


def answer(tokens: list[int], logprobs: list[float], top: list[dict[int, float]]) -> Answer:
    return Answer(
        text=str(tokens),
        completion_tokens=len(tokens),
        finish_reason="stop",
        tokens=list(tokens),
        logprobs=logprobs,
        top=top,
    )


def judged(first: Answer, second: Answer, max_gap: float = 0.5) -> Comparison:
    return compare([first], [second], [(True, True)], max_gap)


def test_a_tie_decided_otherwise_is_rounding():
    one = answer([5, 6], [-0.1, -0.69], [{5: -0.1}, {6: -0.69, 7: -0.70}])
    other = answer([5, 7, 9], [-0.1, -0.68, 0.0], [{5: -0.1}, {7: -0.68, 6: -0.71}, {9: 0.0}])
    result = judged(one, other)
    (difference,) = result.differences
    assert (difference.position, difference.first, difference.second) == (1, 6, 7)
    assert difference.gap == pytest.approx(0.03)
    assert result.disagreement == pytest.approx(0.02)
    assert not result.significant
    assert judged(one, other, 0.01).significant


def test_a_sure_choice_changed_is_a_bug():
    one = answer([5], [-0.01], [{5: -0.01, 8: -6.0}])
    other = answer([7], [-0.1], [{7: -0.1, 8: -6.0}])
    result = judged(one, other)
    assert result.differences[0].gap == pytest.approx(5.99)  # at least: 7 is not in the first's
    assert result.significant and result.lines("a", "b")[-1].endswith("a bug")


def test_the_same_text_with_other_probabilities_is_a_bug():
    one = answer([5], [-0.01], [{5: -0.01, 8: -6.0}])
    other = answer([5], [-0.01], [{5: -0.01, 8: -9.0}])
    result = judged(one, other)
    assert result.same_text == 1 and not result.differences
    assert result.disagreement == pytest.approx(3) and result.significant


def test_an_early_end_is_a_bug():
    one = answer([5], [-0.01], [{5: -0.01}])
    other = answer([5, 6], [-0.01, -0.3], [{5: -0.01}, {6: -0.3}])
    (difference,) = judged(one, other).differences
    assert (difference.first, difference.second, difference.gap) == (None, 6, math.inf)


def test_without_log_probabilities_the_verdicts_alone_decide():
    def plain(text: str) -> Answer:
        return Answer(text=text, completion_tokens=1, finish_reason="stop")

    one, other = [plain("abc")] * 6, [plain("abd")] * 6
    result = compare(one, other, [(True, True)] * 6, 0.5)
    assert [d.position for d in result.differences] == [2] * 6 and result.disagreement is None
    assert not result.significant
    assert compare(one, other, [(True, False)] * 6, 0.5).significant
    assert not compare(one, other, [(True, False)] * 5 + [(True, True)], 0.5).significant

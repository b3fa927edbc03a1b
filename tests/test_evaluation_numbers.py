"""Numbers as people write them, in every script."""

import sys
import unicodedata

import pytest

from breakgraph.evaluation.numbers import find_numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("18", [18]),
        ("1,234,567 and 1,234", [1234567, 1234]),
        ("1,00,000", [100000]),
        ("lists: 1,2 and 12,34", [1, 2, 12, 34]),
        ("3.50, then 4.", [3.5, 4]),
        ("$1,234.50 €5 £6", [1234.5, 5, 6]),
        ("-4 −5 －6 -$7 $-8", [-4, -5, -6, -7, -8]),
        ("16-3 = 13, 9 - 2", [16, 3, 13, 9, 2]),
        ("**18**, $18$, \\boxed{18}", [18, 18, 18]),
        ("70\u00a0000 70\u202f000", [70000, 70000]),
        ("7 000", [7, 0]),
        ("১২,৩৪৫ টাকা", [12345]),
        ("౧౨ మరియు ३४", [12, 34]),
        ("๑๘ บาท", [18]),
        ("٤٢ ١٬٢٣٤ ٣٫٥", [42, 1234, 3.5]),
        ("１，２３４．５円", [1234.5]),
        ("x² ½ 十八", []),
        ("none", []),
    ],
)
def test_numbers_with_a_decimal_point(text: str, numbers: list[float]):
    assert find_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1.234,5", [1234.5]),
        ("1.234.567", [1234567]),
        ("70 000 €, 70\u202f000 €", [70000, 70000]),
        ("3,5 und 3.5", [3.5, 3.5]),
        ("12,50", [12.5]),
        ("1,234 und 1,234.5", [1234, 1234.5]),
        ("-1.500", [-1500]),
        ("3 + 4 = 7", [3, 4, 7]),
        ("18.", [18]),
    ],
)
def test_numbers_with_a_decimal_comma(text: str, numbers: list[float]):
    assert find_numbers(text, decimal_comma=True) == numbers


def test_every_decimal_digit_of_unicode_counts():
    digits = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Nd"]
    assert len(digits) > 500
    for zero in digits[::10]:
        assert unicodedata.decimal(zero) == 0
        ten = chr(ord(zero) + 1) + zero
        assert find_numbers(f"({ten})") == [10], hex(ord(zero))

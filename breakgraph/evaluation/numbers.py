"""Numbers in text, as people of eleven languages write them.

Whatever the script, a number is compared by value: digits of every script are read, separators of
thousands are dropped, and a separator that could be either is decided by the language alone.
"""

from __future__ import annotations

import re

CURRENCY = "$€£¥₹৳฿₽￥"
# Of other scripts, those that mean the same; every other decimal digit is mapped by its value.
SIGNS = str.maketrans(
    {"−": "-", "－": "-", "﹣": "-", "‐": "-", "‑": "-", "，": ",", "．": ".", "٬": ",", "٫": "."}
    | {"＄": "$", "\u2009": "\u00a0", "\u202f": "\u00a0", "\u066a": "%"}
)
# A sign belongs to the number unless it stands between two terms, as in "5-3".
SIGN = rf"(?<![\w.,)])-(?:[{CURRENCY}]\s?)?"
POINT = re.compile(  # thousands by commas, also the Indian 1,00,000
    rf"(?:{SIGN})?(?:\d{{1,3}}(?:[,\u00a0]\d{{2,3}})*[,\u00a0]\d{{3}}(?!\d)|\d+)(?:\.\d+)?"
)
COMMA = re.compile(  # thousands by points or spaces; by commas where that is all it can be
    rf"(?:{SIGN})?(?:\d{{1,3}}(?:[. \u00a0]\d{{3}})+(?!\d)(?:,\d+)?"
    r"|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.,]\d+)?)"
)


def find_numbers(text: str, *, decimal_comma: bool = False) -> list[float]:
    """Every number in ``text``, in order.

    Args:
        text: in any script.
        decimal_comma: read as in Berlin or Paris: ``1.234,5`` for ``1,234.5``. ``1,234`` is a
            thousand and more there too, since models mix the two.
    """
    pattern = COMMA if decimal_comma else POINT
    return [_value(match[0], decimal_comma) for match in pattern.finditer(_plain(text))]


def _plain(text: str) -> str:
    text = text.translate(SIGNS)
    if text.isascii():
        return text
    return "".join(str(int(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def _value(number: str, decimal_comma: bool) -> float:
    number = re.sub(rf"[{CURRENCY}\s]", "", number)
    if decimal_comma and not re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        if re.fullmatch(r"-?\d{1,3}(?:\.\d{3})+(?:,\d+)?", number):
            number = number.replace(".", "")
        number = number.replace(",", ".")
    return float(number.replace(",", ""))

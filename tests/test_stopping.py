"""Text comes in whole characters, ends before its stop string, and is never taken back."""

from engine_support import END, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.engine.stopping import StopRule, TextStream

TOKENIZER = byte_tokenizer()
TEXT = st.text("ab #é漢🙂", max_size=30)


def pieces(ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(TOKENIZER, StopRule(TOKENIZER, {END}, stop))
    ends = sorted({cut for cut in cuts if cut < len(ids)})
    parts = [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]
    return [stream.push(part, part is parts[-1]) for part in parts]


@settings(max_examples=200)
@given(TEXT, st.lists(st.integers(1, 100)))
def test_no_character_is_split_and_none_is_lost(text: str, cuts: list[int]):
    found = pieces(TOKENIZER(text)["input_ids"], cuts)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)


@settings(max_examples=200)
@given(TEXT, st.lists(st.text("ab #é漢", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]):
    ids = TOKENIZER(text)["input_ids"]
    rule = StopRule(TOKENIZER, {END}, stops)
    stream = TextStream(TOKENIZER, rule)
    shown, reason = "", None
    for count, token in enumerate(ids, start=1):
        reason = rule.check(ids[:count], count, count == len(ids))
        shown += stream.push([token], reason is not None)
        assert text.startswith(shown)
        if reason == "stop":
            break
    if any(stop in text for stop in stops):
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        end = text[:first]
        assert reason == "stop" and TOKENIZER.decode(ids[:count]).startswith(end[:-1])
        assert shown == text[: min(end.find(s) for s in stops if s in end)]
    else:
        assert shown == text and reason in (None, "length")


def test_a_merged_read_shows_all_that_is_complete():
    ids = TOKENIZER("x" * 30 + "漢")["input_ids"]
    stream = TextStream(TOKENIZER, StopRule(TOKENIZER, {END}))
    assert stream.push(ids[:-1]) == "x" * 30
    assert stream.push(ids[-1:], finished=True) == "漢"


def test_what_is_no_text_is_not_held_for_ever():
    lone = TOKENIZER("é")["input_ids"][1]
    stream = TextStream(TOKENIZER, StopRule(TOKENIZER, {END}))
    shown = [stream.push([lone]) for _ in range(40)]
    assert len("".join(shown)) > 25
    text = "".join(stream.push([token]) for token in TOKENIZER("漢字")["input_ids"])
    assert text.endswith("漢字")


def test_an_end_token_shows_nothing_and_hidden_tokens_hide_nothing():
    rule = StopRule(TOKENIZER, {END, ord("!")})
    ids = TOKENIZER("ok!")["input_ids"]
    rule = StopRule(TOKENIZER, {ids[-1]})
    assert rule.check(ids, 3, False) == "stop"
    assert TextStream(TOKENIZER, rule).push(ids, finished=True) == "ok"
    stream = TextStream(TOKENIZER, StopRule(TOKENIZER, set()))
    assert [stream.push([END]) for _ in range(100)] == [""] * 100
    assert stream.push(ids[:1]) == "o"


def test_half_a_character_at_the_end_is_shown_as_such():
    ids = TOKENIZER("a漢")["input_ids"][:-1]
    assert "".join(pieces(ids, [1, 2])) == "a\ufffd"


def test_the_rule_looks_at_the_new_end_only():
    rule = StopRule(TOKENIZER, {END}, ["##"])
    prompt, text = TOKENIZER("##")["input_ids"], TOKENIZER("abc" * 20 + "##")["input_ids"]
    assert rule.check([*prompt, *text[:1]], 1, False) is None
    assert rule.check([*prompt, *text[:-1]], len(text) - 1, False) is None
    assert rule.check([*prompt, *text], len(text), False) == "stop"
    assert rule.check([1, END], 1, True) == "stop"
    assert rule.check([1, 2], 1, True) == "length"

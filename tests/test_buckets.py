"""The ladder's promises hold for every token count, and a decision says what would change it."""

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from breakgraph.runner.buckets import (
    BUCKET_FLOOR,
    Dispatch,
    DispatchReason,
    bucket_for,
    check_buckets,
    decide,
    derive_buckets,
)
from breakgraph.runner.costs import ForwardTimes, Line, PrefillCosts, anchors

ladders = st.lists(st.integers(1, 9000), min_size=1).map(lambda b: tuple(sorted(set(b))))


@given(st.integers(1, 20_000))
@example(1)
@example(16)
@example(17)
@example(128)
@example(129)
@example(8192)
def test_derived_ladder_pads_at_most_an_eighth(max_tokens: int) -> None:
    ladder = derive_buckets(max_tokens)
    assert ladder[-1] == max_tokens
    assert all(a < b for a, b in pairwise(ladder))
    assert all(b % BUCKET_FLOOR == 0 for b in ladder[:-1])
    for below, bucket in pairwise((0, *ladder)):
        worst = bucket - (below + 1)  # padding of the fewest tokens that this bucket serves
        assert worst < 16 or worst / bucket < 0.125
        assert below < 128 or worst / bucket < 0.125


def test_derived_ladder_to_8192() -> None:
    ladder = derive_buckets(8192)
    assert len(ladder) == 56
    assert ladder[:9] == (16, 32, 48, 64, 80, 96, 112, 128, 144)
    assert ladder[-3:] == (7168, 7680, 8192)


def test_derived_ladder_is_a_prefix_of_a_longer_one() -> None:
    assert derive_buckets(1000) == (*derive_buckets(8192)[: len(derive_buckets(960))], 1000)


def test_no_ladder_for_an_empty_chunk() -> None:
    with pytest.raises(ValueError, match="--chunked-prefill-size"):
        derive_buckets(0)


@given(st.lists(st.integers(1, 100), min_size=1))
def test_given_list_is_sorted_and_deduplicated_and_it_is_said(tokens: list[int]) -> None:
    ladder, notes = check_buckets(tokens, 100)
    assert list(ladder) == sorted(set(tokens))
    assert any("sorted" in note for note in notes) == (tokens != sorted(tokens))
    assert any("repeated" in note for note in notes) == (len(set(tokens)) < len(tokens))
    assert check_buckets(ladder, 100) == (ladder, [])


@pytest.mark.parametrize("bad", [[], [0], [-16], [16, 1.5], ["16"], [True], [16, 101]])
def test_bad_list_names_the_flag(bad: list) -> None:
    with pytest.raises(ValueError, match="--piecewise-cuda-graph-tokens"):
        check_buckets(bad, 100)


@given(ladders, st.integers(1, 10_000))
def test_bucket_for_is_the_smallest_that_holds(ladder: tuple[int, ...], num_tokens: int) -> None:
    assert bucket_for(ladder, num_tokens) == min(
        (b for b in ladder if b >= num_tokens), default=None
    )


@given(ladders, st.integers(1, 10_000), st.floats(1, 4))
def test_decision_is_sound(ladder: tuple[int, ...], num_tokens: int, max_padding: float) -> None:
    decision = decide(num_tokens, ladder, max_padding)
    bucket = bucket_for(ladder, num_tokens)
    if bucket is None:
        assert decision.reason is DispatchReason.TOO_MANY_TOKENS
        assert decision.refused == ladder[-1]
    elif decision.bucket is None:
        assert decision.reason is DispatchReason.PADDING
        assert decision.refused == bucket > max_padding * num_tokens
    else:
        assert decision.reason is DispatchReason.REPLAYED
        assert decision.bucket == bucket
        assert decision.padding is not None
        assert decision.padding <= max_padding or bucket <= max_padding * BUCKET_FLOOR
    assert (decision.padding is None) == (decision.bucket is None)


@given(st.integers(1, 8192))
def test_derived_ladder_replays_every_batch_at_the_default_limit(num_tokens: int) -> None:
    assert decide(num_tokens, derive_buckets(8192), 2.0).reason is DispatchReason.REPLAYED


def test_limits() -> None:
    assert decide(5, (16,), 1.0).bucket == 16  # up to 16 tokens, rows cost nothing
    assert decide(17, (32,), 1.0).reason is DispatchReason.PADDING
    assert decide(32, (64,), 2.0).bucket == 64
    assert decide(31, (64,), 2.0).reason is DispatchReason.PADDING
    assert decide(31, (64,), math.inf).bucket == 64
    assert decide(10, (), 2.0).reason is DispatchReason.DISABLED
    with pytest.raises(ValueError, match="0 tokens"):
        decide(0, (16,), 2.0)


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        (decide(20, (32,), 2.0), "20 tokens replay in bucket 32 (12 rows of padding)"),
        (decide(20, (), 2.0), "--enable-breakable-cuda-graph"),
        (decide(40, (32,), 2.0), "the largest bucket is 32: raise --chunked-prefill-size"),
        (decide(17, (64,), 2.0), "bucket 64 would pad them beyond the limit: raise --max-prefill"),
        (Dispatch(None, DispatchReason.NO_LAYER_STACK, 9), "get_layer_stack()"),
    ],
)
def test_describe_names_the_cause_and_the_flag(decision: Dispatch, said: str) -> None:
    assert said in decision.describe()


def test_every_eager_reason_has_its_own_sentence() -> None:
    for reason in set(DispatchReason) - {DispatchReason.REPLAYED}:
        assert not Dispatch(None, reason, 1).describe().endswith(reason.value)


def test_reasons_are_stable_metric_labels() -> None:
    assert [str(reason) for reason in DispatchReason] == [
        "replayed",
        "graphs_disabled",
        "eager_asked_for",
        "no_layer_stack",
        "more_tokens_than_largest_bucket",
        "padding_over_limit",
        "eager_measured_faster",
        "more_requests_than_largest_bucket",
        "no_request_rows",
        "bucket_out_of_service",
        "model_not_capturable",
        "more_requests_than_graph_slots",
        "cached_prefix_in_full_graph",
        "bucket_over_memory_budget",
    ]


def test_costs_are_measured_at_both_ends_and_once_an_octave() -> None:
    assert anchors(derive_buckets(8192)) == [16 << octave for octave in range(10)]
    assert anchors((16,)) == [16]
    assert anchors((100, 150, 300, 310)) == [100, 300, 310]


@given(tokens=st.integers(1, 8192))
def test_a_replay_is_chosen_where_its_cost_is_below_the_eager_one(tokens: int) -> None:
    """Launch-bound below 1000 tokens, then 1 ms a 100 tokens; a replay saves half a millisecond."""
    sizes = (16, 1000, 8192)
    eager, replay = (Line(sizes, ms) for ms in ((10.5, 10.5, 82.42), (0.66, 10, 81.92)))
    costs = PrefillCosts(ForwardTimes(eager), ForwardTimes(replay))
    buckets = derive_buckets(8192)
    bucket = bucket_for(buckets, tokens)
    chosen = decide(tokens, buckets, 2.0, costs)
    gain = max(10.5, tokens / 100 + 0.5) / (bucket / 100)
    if tokens == bucket or gain > 1.05:
        assert chosen.bucket == bucket
    elif gain < 1:
        assert chosen.reason is DispatchReason.EAGER_FASTER
        assert chosen.refused == bucket and "--prefill-dispatch" in chosen.describe()

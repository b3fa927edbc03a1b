"""The bucket ladders, of tokens and of requests, and which bucket serves a batch.

A decision depends on its arguments alone: the batch's counts of tokens and requests, the ladder,
the padding limit and the costs measured at start-up, facts which every rank holds alike. So ranks
that decide apart decide the same, and no decision is hidden: each carries its reason and can say
which flag would change it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from breakgraph.forward import ForwardMode
from breakgraph.runner.costs import PrefillCosts

BUCKET_FLOOR = 16  # the smallest derived bucket; the others, but for the last, are multiples
_FLAG = "--piecewise-cuda-graph-tokens"
_DECODE_FLAG = "--cuda-graph-bs"


def derive_buckets(max_tokens: int) -> tuple[int, ...]:
    """The ladder used where no list is given: ascending, ending exactly at `max_tokens`.

    The step above bucket `b` is the power of two in `(b / 16, b / 8]`, and at least 16: eight
    buckets to an octave, 56 up to 8192. For every `1 <= n <= max_tokens` the smallest bucket
    `b >= n` has `b - n < 16` or `(b - n) / b < 1 / 8`; above 128 tokens the second always holds.
    """
    if max_tokens < 1:
        raise ValueError(
            f"the token-bucket ladder ends at the chunk size, which is {max_tokens}; "
            "set --chunked-prefill-size to at least 1"
        )
    return _ladder(BUCKET_FLOOR, max_tokens)


def derive_batch_sizes(max_requests: int) -> tuple[int, ...]:
    """The decode ladder used where no list is given: 1, 2, 4, then in steps of 8 up to 128."""
    small = [size for size in (1, 2, 4) if size < max_requests]
    return (*small, *_ladder(8, max_requests))


def _ladder(floor: int, last: int) -> tuple[int, ...]:
    buckets = []
    bucket = floor
    while bucket < last:
        buckets.append(bucket)
        bucket += max(floor, 1 << (bucket.bit_length() - 4))
    return (*buckets, last)


def check_buckets(
    tokens: Iterable[int], max_tokens: int | None = None
) -> tuple[tuple[int, ...], list[str]]:
    """A given list as a ladder, and a sentence for each thing that had to be put right.

    Unsorted and repeated buckets are put right. An empty list, a bucket that is no positive
    integer, and one over `max_tokens` (the chunk size; None: not known yet) raise ValueError.
    """
    return _check(_FLAG, "token", tokens, max_tokens, "--chunked-prefill-size")


def check_batch_sizes(sizes: Iterable[int], max_requests: int) -> tuple[tuple[int, ...], list[str]]:
    """As `check_buckets`, for decode; no size may be over `max_requests`."""
    return _check(_DECODE_FLAG, "request", sizes, max_requests, "--max-running-requests")


def _check(
    flag: str, unit: str, sizes: Iterable[int], most: int | None, limit_flag: str
) -> tuple[tuple[int, ...], list[str]]:
    given = list(sizes)
    if not given:
        raise ValueError(
            f"{flag} is an empty list; name at least one bucket, or leave the flag "
            "out for the derived ladder"
        )
    for bucket in given:
        if not isinstance(bucket, int) or isinstance(bucket, bool) or bucket < 1:
            raise ValueError(
                f"{flag}: {bucket!r} is no bucket; each is a {unit} count of at least 1"
            )
        if most is not None and bucket > most:
            raise ValueError(
                f"{flag}: bucket {bucket} exceeds the largest forward of {most} {unit}s, so "
                f"nothing would ever use it; remove it or raise {limit_flag}"
            )
    ladder = tuple(sorted(set(given)))
    notes = []
    if len(ladder) < len(given):
        repeated = sorted({b for b in given if given.count(b) > 1})
        notes.append(f"{flag}: repeated buckets were dropped: {repeated}")
    if given != sorted(given):
        notes.append(f"{flag}: the buckets were sorted: {list(ladder)}")
    return ladder, notes


def bucket_for(buckets: Sequence[int], num_tokens: int) -> int | None:
    """The smallest of the ascending `buckets` that holds `num_tokens`; None if none does."""
    index = bisect_left(buckets, num_tokens)
    return buckets[index] if index < len(buckets) else None


class DispatchReason(str, Enum):
    """Why a batch was replayed or run eagerly; the values are metric labels and stay stable."""

    REPLAYED = "replayed"
    DISABLED = "graphs_disabled"
    EAGER_ASKED = "eager_asked_for"
    NO_LAYER_STACK = "no_layer_stack"
    TOO_MANY_TOKENS = "more_tokens_than_largest_bucket"
    PADDING = "padding_over_limit"
    EAGER_FASTER = "eager_measured_faster"
    TOO_MANY_REQUESTS = "more_requests_than_largest_bucket"
    NO_ROWS = "no_request_rows"
    OUT_OF_SERVICE = "bucket_out_of_service"
    NOT_CAPTURABLE = "model_not_capturable"
    TOO_MANY_FOR_SLOTS = "more_requests_than_graph_slots"
    PREFIX = "cached_prefix_in_full_graph"
    OVER_BUDGET = "bucket_over_memory_budget"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How one batch runs: in `bucket`, or eagerly when that is None."""

    bucket: int | None
    reason: DispatchReason
    num_tokens: int
    refused: int | None = None
    """The bucket that came nearest, where its size is the reason it was not used; or the request
    slots that are too few."""
    mode: ForwardMode = ForwardMode.PREFILL
    """A decode's tokens are its requests."""
    kind: str = "breakable"
    """Of a prefill: which graphs replay it, or are the last that could have."""
    passed_over: tuple[Dispatch, ...] = ()
    """What graphs without a break, or with fewer, said to it."""

    @property
    def padding(self) -> float | None:
        """Rows computed per row asked for, `bucket / num_tokens`; None when eager."""
        return None if self.bucket is None else self.bucket / self.num_tokens

    def describe(self) -> str:
        """One sentence: the decision, its cause, and the flag that would change it."""
        decode = self.mode is ForwardMode.DECODE
        one = self.num_tokens == 1
        what = f"{self.num_tokens} {'decoding request' if decode else 'token'}{'' if one else 's'}"
        if self.bucket is not None:
            graphs = "" if decode else f" of the {self.kind} graphs"
            said = (
                f"{what} replay{'s' if one else ''} in bucket {self.bucket} "
                f"({self.bucket - self.num_tokens} rows of padding){graphs}"
            )
            return "; ".join([said, *(f"not {one.kind}: {one.why()}" for one in self.passed_over)])
        return f"{what} run{'s' if one else ''} eagerly: {self.why()}"

    def why(self) -> str:
        """Why no graph of its kind replays the batch, and the flag that would change that."""
        decode = self.mode is ForwardMode.DECODE
        if self.bucket is not None:
            return f"bucket {self.bucket} was measured to be slower"
        flag = "--cuda-graph-backend-decode" if decode else "--enable-breakable-cuda-graph"
        captured = self.kind == "captured"
        slots_flag = "--linear-attention-capture" if captured else "--prefill-graph-requests"
        reasons = {
            DispatchReason.DISABLED: f"graphs are off: pass {flag}{' full' * decode}",
            DispatchReason.EAGER_ASKED: "the caller asked for it",
            DispatchReason.NO_LAYER_STACK: "the model offers no get_layer_stack(), which "
            f"{flag} needs to know what to capture",
            DispatchReason.TOO_MANY_REQUESTS: f"the largest bucket is {self.refused}: add a larger "
            f"one with {_DECODE_FLAG}",
            DispatchReason.NOT_CAPTURABLE: "the model does what no graph can hold; the log says "
            "what and where",
            DispatchReason.NO_ROWS: "the batch names no rows of the request table, in which a "
            "decode graph finds its requests' tokens",
            DispatchReason.OUT_OF_SERVICE: f"bucket {self.refused} is out of service, since "
            "--verify-prefill-graph found that it gave other results than an eager forward; the "
            "log says where",
            DispatchReason.TOO_MANY_TOKENS: f"the largest bucket is {self.refused}: raise "
            f"--chunked-prefill-size, or add a bucket with {_FLAG}",
            DispatchReason.EAGER_FASTER: f"padding them to bucket {self.refused} was measured to "
            f"cost more than a replay saves: add a nearer bucket with {_FLAG}, or replay anyway "
            "with --prefill-dispatch always",
            DispatchReason.TOO_MANY_FOR_SLOTS: f"its graphs have {self.refused} request slots, and "
            f"the batch is of more requests: raise {slots_flag}",
            DispatchReason.PREFIX: "some are behind a cached prefix, which the full graphs of this "
            "attention backend cannot find: --cuda-graph-backend-prefill auto replays them in "
            "breakable graphs",
            DispatchReason.OVER_BUDGET: "the graph that would serve them was dropped to keep the "
            "memory budget: raise --cuda-graph-memory-budget",
            DispatchReason.PADDING: f"bucket {self.refused} would pad them beyond the limit: raise "
            f"--max-prefill-padding, or add a nearer bucket with {_FLAG}",
        }
        return reasons.get(self.reason, self.reason.value)


def decide(
    num_tokens: int,
    buckets: Sequence[int],
    max_padding: float,
    costs: PrefillCosts | None = None,
    requests: int = 1,
    *,
    kind: str = "breakable",
) -> Dispatch:
    """Pick the bucket for a batch of ``requests``, or the reason for none.

    `buckets` ascend; none at all means that graphs are off. `max_padding` bounds
    `bucket / num_tokens`, where fewer than 16 tokens count as 16. `costs` refuses a bucket
    where an eager forward was measured to be faster; None replays whatever fits.
    """
    if num_tokens < 1:
        raise ValueError(f"a prefill batch of {num_tokens} tokens has nothing to run")

    def refuse(reason: DispatchReason, bucket: int) -> Dispatch:
        return Dispatch(None, reason, num_tokens, refused=bucket, kind=kind)

    if not buckets:
        return Dispatch(None, DispatchReason.DISABLED, num_tokens, kind=kind)
    bucket = bucket_for(buckets, num_tokens)
    if bucket is None:
        return refuse(DispatchReason.TOO_MANY_TOKENS, buckets[-1])
    # Up to 16 tokens the launches are the cost, not the rows: on an H200 16 rows of Qwen3-0.6B
    # take 6.9 ms eagerly and 2.6 ms replayed, so a short tail is never too padded for bucket 16.
    if bucket > max_padding * max(num_tokens, BUCKET_FLOOR):
        return refuse(DispatchReason.PADDING, bucket)
    if costs is not None and not costs.replay_pays(num_tokens, bucket, requests):
        return refuse(DispatchReason.EAGER_FASTER, bucket)
    return Dispatch(bucket, DispatchReason.REPLAYED, num_tokens, kind=kind)


def decide_decode(num_requests: int, buckets: Sequence[int], *, has_rows: bool) -> Dispatch:
    """Pick the bucket for a decode, or the reason for none.

    A decode is bound by launches and by reading the weights, so padding is never refused.
    """
    mode = ForwardMode.DECODE
    if not has_rows:
        return Dispatch(None, DispatchReason.NO_ROWS, num_requests, mode=mode)
    bucket = bucket_for(buckets, num_requests)
    if bucket is None:
        reason, refused = DispatchReason.TOO_MANY_REQUESTS, buckets[-1]
        return Dispatch(None, reason, num_requests, refused=refused, mode=mode)
    return Dispatch(bucket, DispatchReason.REPLAYED, num_requests, mode=mode)

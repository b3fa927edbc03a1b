"""The next token of each request from its logits: one device-to-host copy a step.

A draw is one uniform number, made on the host from the request's seed and the token's number, and
looked up in the cumulative distribution in vocabulary order. So it depends on no neighbour, no
batching and no device's generator, and a request that is interrupted goes on with the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from breakgraph.engine.request import Request, TokenLogprob
from breakgraph.engine.sampling_params import SamplingParams

UNIFORM_BITS = 23  # a float32 below 1, and below any total after the product is rounded
TOPK_LIMIT = 1024  # up to here the k likeliest are selected, beyond that all are sorted
_MASK = (1 << 64) - 1


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for a seed and a step, by two rounds of splitmix64."""
    return (_mix(_mix(seed & _MASK) + step) >> (64 - UNIFORM_BITS)) * 2.0**-UNIFORM_BITS


def _mix(state: int) -> int:
    # Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def sample(
    logits: torch.Tensor, requests: Sequence[Request]
) -> list[tuple[int, TokenLogprob | None]]:
    """Choose a token per row, and its log-probabilities where the request wants them.

    Args:
        logits: float32 ``[batch_size, vocab_size]``; not kept.
        requests: one per row.
    """
    logprobs = [request.params.logprobs for request in requests]
    penalised = penalise(logits, requests)
    if all(request.params.is_greedy for request in requests):
        tokens = penalised.argmax(dim=-1)
    else:
        tokens = draw(penalised, requests)
    if all(wanted is None for wanted in logprobs):
        return [(token, None) for token in tokens.tolist()]
    top = min(max(wanted or 0 for wanted in logprobs), logits.shape[1])
    return _with_logprobs(logits, tokens, top, requests)


def penalise(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """The logits less what each request takes off its generated tokens; a copy if anything."""
    rows: list[int] = []
    tokens: list[int] = []
    amounts: list[float] = []
    for row, request in enumerate(requests):
        frequency, presence = request.params.frequency_penalty, request.params.presence_penalty
        if frequency or presence:
            rows += [row] * len(request.counts)
            tokens += request.counts
            amounts += [frequency * count + presence for count in request.counts.values()]
    if not rows:
        return logits
    where = torch.tensor([rows, tokens]).to(logits.device, non_blocking=True)
    less = torch.tensor(amounts, dtype=logits.dtype).to(logits.device, non_blocking=True)
    logits = logits.clone()
    logits[where[0], where[1]] -= less
    return logits


def draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """A token per row, int64 ``[batch_size]``: the likeliest for greedy requests, else drawn."""
    settings = [
        (
            0.0 if request.params.is_greedy else request.params.temperature,
            uniform(request.seed, request.num_new),
            request.params.min_p,
        )
        for request in requests
    ]
    temperature, chance, min_p = (
        torch.tensor(settings, dtype=torch.float32).to(logits.device, non_blocking=True).unbind(1)
    )
    greedy = temperature == 0
    largest, likeliest = logits.max(-1)
    # Less the largest first: a low temperature cannot overflow then.
    divisor = temperature.masked_fill(greedy, 1).unsqueeze(1)
    probs = ((logits - largest.unsqueeze(1)) / divisor).softmax(-1)
    least = min_p * probs.amax(-1)
    narrowed = [row for row, request in enumerate(requests) if _is_narrowed(request.params)]
    if narrowed:
        params = [requests[row].params for row in narrowed]
        some = torch.tensor(narrowed).to(logits.device, non_blocking=True)
        limits = _smallest_kept(probs.index_select(0, some), params)
        least = least.index_copy(0, some, torch.maximum(least.index_select(0, some), limits))
    kept = probs.masked_fill_(probs < least.unsqueeze(1), 0)
    cumulative = kept.cumsum(-1)
    target = (chance * cumulative[:, -1]).unsqueeze(1)
    tokens = torch.searchsorted(cumulative, target, right=True)
    tokens = tokens.clamp_(max=logits.shape[1] - 1)
    # A parallel sum may rise by its rounding where a token left out adds nothing.
    missed = kept.gather(1, tokens).squeeze(1) == 0
    return torch.where(greedy | missed, likeliest, tokens.squeeze(1))


def _is_narrowed(params: SamplingParams) -> bool:
    return not params.is_greedy and (params.top_p < 1 or params.top_k > 0)


def _smallest_kept(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Per row the probability of the least likely token that top-k, then top-p, leave in.

    Tokens as likely as that one stay in too, so that a tie is not broken by chance.
    """
    vocab = probs.shape[1]
    ks = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    few = max(ks) <= TOPK_LIMIT
    ranked = probs.topk(max(ks)).values if few else probs.sort(-1, descending=True).values
    settings = torch.tensor([(k, p.top_p) for k, p in zip(ks, params, strict=True)])
    k, top_p = settings.to(probs.device, non_blocking=True).unbind(1)
    place = torch.arange(ranked.shape[1], device=probs.device)
    within = ranked.masked_fill(place >= k.unsqueeze(1), 0)
    before = within.cumsum(-1) - within  # the probability of those ahead of each
    total = within.sum(-1, keepdim=True)
    kept = (before < top_p.unsqueeze(1) * total) & (within > 0)
    last = (kept.sum(-1, keepdim=True) - 1).clamp_(min=0)
    return ranked.gather(1, last).squeeze(1)


def _with_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, top: int, requests: Sequence[Request]
) -> list[tuple[int, TokenLogprob | None]]:
    """The tokens and, of those that want them, log-probabilities: all in one copy to the host."""
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens.unsqueeze(1)) - norm
    values, ids = logits.topk(top)
    # Doubles hold token ids and float32 values alike, exactly.
    packed = torch.cat([tokens.unsqueeze(1).double(), chosen, values - norm, ids.double()], dim=1)
    results: list[tuple[int, TokenLogprob | None]] = []
    for request, (token, logprob, *rest) in zip(requests, packed.tolist(), strict=True):
        wanted = request.params.logprobs
        if wanted is None:
            results.append((int(token), None))
            continue
        pairs = zip(map(int, rest[top:]), rest[:top], strict=True)
        results.append((int(token), TokenLogprob(int(token), logprob, list(pairs)[:wanted])))
    return results

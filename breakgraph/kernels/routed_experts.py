"""Routed experts in four kernels: sort; gather, product, activation; product; weighted sum.

What goes nowhere (padding, another rank's expert) has no place: it is neither read nor written,
and counts 0 in the sum. All orders are fixed, so equal inputs give equal bits.

Each kernel is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU
the op is its plain-torch reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from breakgraph.kernels.routed_experts_cuda import (
    routed_down_on_cuda,
    routed_up_on_cuda,
    sort_routes_on_cuda,
    sum_routed_on_cuda,
)

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "sort_routes(Tensor experts, Tensor? num_token_non_padded, int first, int num_experts) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "routed_up(Tensor x, Tensor rows, Tensor offsets, Tensor weight, bool gated, int spread) "
    "-> Tensor"
)
_library.define("routed_down(Tensor hidden, Tensor offsets, Tensor weight, int spread) -> Tensor")
_library.define("sum_routed(Tensor routed, Tensor places, Tensor weights) -> Tensor")


class Routes(NamedTuple):
    """Assignments (row, choice) in the order of their experts, then rows.

    Attributes:
        rows: int32 ``[assignments]``, the row of each; anything behind the last offset.
        offsets: int32 ``[num_experts]``, where each expert's assignments end.
        places: int32 ``[rows, top_k]``, where each was sorted to; -1 is nowhere.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor


def sort_routes(
    experts: torch.Tensor,
    num_token_non_padded: torch.Tensor | None,
    first: int,
    num_experts: int,
) -> Routes:
    """Sort what each row was routed to.

    Args:
        experts: int64 ``[rows, top_k]``, contiguous, different ones in a row.
        num_token_non_padded: int32 ``[1]``, how many leading rows are real; None is all.
        first: the expert that is here called 0.
        num_experts: of these; what is routed to others goes nowhere.
    """
    return Routes(
        *torch.ops.breakgraph.sort_routes(experts, num_token_non_padded, first, num_experts)
    )


def routed_up(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    *,
    gated: bool,
    spread: int,
) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, or ``relu(x @ up.T)²``, of each assignment's expert.

    Args:
        x: ``[num_rows, size]``, its rows dense.
        rows: int32 ``[assignments]``, rows of ``x`` in the order of their experts.
        offsets: int32 ``[experts]``, where each expert's assignments end.
        weight: ``[experts, 2 * intermediate (gate, then up) or intermediate, size]``, contiguous.
        gated: which of the two.
        spread: experts that the assignments are divided among, by which blocks are chosen: with
            several ranks, those of all.

    Returns:
        ``[assignments, intermediate]``, uninitialised behind the last offset.
    """
    return torch.ops.breakgraph.routed_up(x, rows, offsets, weight, gated, spread)


def routed_down(
    hidden: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, *, spread: int
) -> torch.Tensor:
    """``hidden @ weight[expert].T`` of each assignment; uninitialised behind the last offset.

    Args:
        hidden: ``[assignments, intermediate]``, contiguous.
        offsets: int32 ``[experts]``, where each expert's assignments end.
        weight: ``[experts, size, intermediate]``, contiguous.
        spread: as in ``routed_up``.

    Returns:
        ``[assignments, size]``.
    """
    return torch.ops.breakgraph.routed_down(hidden, offsets, weight, spread)


def sum_routed(routed: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each row's assignments, added up in float32 and rounded once.

    Args:
        routed: ``[assignments, size]``, contiguous.
        places: int32 ``[rows, top_k]``, the row of ``routed`` of each assignment; -1 is none.
        weights: float32 ``[rows, top_k]``, contiguous.

    Returns:
        ``[rows, size]``, exactly 0 where a row has no assignment.
    """
    return torch.ops.breakgraph.sum_routed(routed, places, weights)


def sort_routes_reference(
    experts: torch.Tensor,
    num_token_non_padded: torch.Tensor | None,
    first: int,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``sort_routes`` in plain torch ops of static shapes."""
    keys = experts - first
    here = (keys >= 0) & (keys < num_experts)
    if num_token_non_padded is not None:
        row = torch.arange(len(experts), device=experts.device)
        here &= (row < num_token_non_padded)[:, None]
    ordered, order = torch.where(here, keys, num_experts).flatten().sort(stable=True)
    ids = torch.arange(num_experts, device=experts.device)
    offsets = torch.searchsorted(ordered, ids, right=True, out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    rows = order.div(experts.shape[1], rounding_mode="floor")
    places = torch.where(here, places.view_as(experts), -1)
    return rows.to(torch.int32), offsets, places.to(torch.int32)


def routed_up_reference(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    gated: bool,
    spread: int,
) -> torch.Tensor:
    """``routed_up`` expert by expert; reads the offsets back."""
    hidden = x.new_full((len(rows), weight.shape[1] // (2 if gated else 1)), float("nan"))
    for expert, (begin, end) in enumerate(_spans(offsets)):
        if begin == end:
            continue
        projected = F.linear(x[rows[begin:end]], weight[expert]).float()
        if gated:
            gate, up = projected.chunk(2, dim=1)
            hidden[begin:end] = F.silu(gate).mul_(up)
        else:
            hidden[begin:end] = projected.relu_().square_()
    return hidden


def routed_down_reference(
    hidden: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, spread: int
) -> torch.Tensor:
    """``routed_down`` expert by expert; reads the offsets back."""
    routed = hidden.new_full((len(hidden), weight.shape[1]), float("nan"))
    for expert, (begin, end) in enumerate(_spans(offsets)):
        if begin == end:
            continue
        routed[begin:end] = F.linear(hidden[begin:end], weight[expert])
    return routed


def sum_routed_reference(
    routed: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``sum_routed`` in plain torch ops of static shapes."""
    chosen = routed.index_select(0, places.clamp(min=0).flatten()).float()
    shares = chosen.view(*places.shape, -1) * weights.unsqueeze(-1)
    # Not a product with 0: what lies behind the last offset may be NaN.
    return torch.where(places.unsqueeze(-1) < 0, 0, shares).sum(1).to(routed.dtype)


def _spans(offsets: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


_library.impl("sort_routes", sort_routes_reference, "CPU")
_library.impl("sort_routes", sort_routes_on_cuda, "CUDA")
_library.impl("routed_up", routed_up_reference, "CPU")
_library.impl("routed_up", routed_up_on_cuda, "CUDA")
_library.impl("routed_down", routed_down_reference, "CPU")
_library.impl("routed_down", routed_down_on_cuda, "CUDA")
_library.impl("sum_routed", sum_routed_reference, "CPU")
_library.impl("sum_routed", sum_routed_on_cuda, "CUDA")

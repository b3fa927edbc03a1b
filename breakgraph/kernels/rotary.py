"""From the fused projection to attention: head norm, rotation and cache store in one pass.

The plain chain reads and writes the query and key heads five times; here each byte of the
projection is read once, and written once for attention and once for the cache. Values are rounded
to the activations' dtype at the points where the chain of torch ops rounds them: after the
normalisation, after its weight, after the product with the cosine and at the end. With an
``offset`` the norm is rounded once, after its weight, as in the models that have one.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op is
its plain-torch reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from breakgraph.kernels.direct_launch import DirectLaunch, specialized
from breakgraph.kernels.launch import check_rows, import_triton, launches_early, power_of_two
from breakgraph.kernels.row_factor import row_factor, row_factor_function

BLOCK, WARPS = 1024, 4
"""Elements of whole heads that a program holds, at least one head; its warps. On an H200 in
bfloat16, 32 and 8 heads of 128 take 1.6 µs at 16 rows and 15.6 at 2048 (3.5 TB/s); with a quarter
of the heads and warps 1.7 and 31.5, with half the warps 1.9 and 16.3, with twice the heads 1.7 and
16.5."""

tl: Any = None  # triton.language, once the kernels are made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "qk_norm_rope_store(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, "
    "float eps, float offset, Tensor cos_sin, Tensor out_cache_loc, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> (Tensor, Tensor)"
)
_library.define(
    "qkv_norm_rope_store(Tensor(c!) qkv, Tensor? normed, float normed_eps, "
    "Tensor? q_weight, Tensor? k_weight, "
    "float eps, float offset, Tensor cos_sin, Tensor out_cache_loc, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> (Tensor, Tensor, Tensor(c!))"
)


def qk_norm_rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the query and key heads, rotate them, and store keys and values.

    Args:
        q: ``[rows, num_heads, head_dim]``, a view of the fused projection: any strides with a
            dense last dimension.
        k: ``[rows, num_kv_heads, head_dim]``, likewise.
        v: as ``k``; stored as it is.
        cos_sin: ``[rows, 2, rotated / 2]``, contiguous. The first ``rotated`` elements of a head
            are rotated, half against half; the others pass.
        out_cache_loc: int64 ``[rows]``, the cache slot of each row.
        k_cache: ``[num_slots, num_kv_heads, head_dim]``, contiguous; written at the slots.
        v_cache: as ``k_cache``.
        q_weight: ``[head_dim]`` of the query norm; without weights there is no norm.
        k_weight: of the key norm, in the dtype of ``q_weight``.
        eps: of the norm.
        offset: added to the norm's weights; 1 for models that keep weights around zero.

    Returns:
        The query ``[rows, num_heads, head_dim]`` and key ``[rows, num_kv_heads, head_dim]`` for
        attention, contiguous.

    Raises:
        ValueError: shapes do not fit each other, a layout has gaps, or one weight is missing.
    """
    _check(q, k, v, q_weight, k_weight, cos_sin, out_cache_loc, k_cache, v_cache)
    return torch.ops.breakgraph.qk_norm_rope_store(
        q, k, v, q_weight, k_weight, eps, offset, cos_sin, out_cache_loc, k_cache, v_cache
    )


def qkv_norm_rope_store(
    qkv: torch.Tensor,
    *,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    normed: torch.Tensor | None = None,
    normed_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``qk_norm_rope_store`` of a fused projection, as one op: a capture has no views to look at.

    Args:
        qkv: ``[rows, (num_heads + 2 * num_kv_heads) * head_dim]``, rows strided: the query heads,
            then as many key and value heads as the caches have.
        cos_sin: these and the others as for ``qk_norm_rope_store``.
        normed: ``[rows, hidden]``, rows strided: ``qkv`` is first multiplied with its
            ``row_factor``, in float32, its values in place.
        normed_eps: of that.

    Returns:
        The query and key for attention, contiguous, and the value, a view of ``qkv``.

    Raises:
        ValueError: as ``qk_norm_rope_store``, or ``qkv`` has no such heads.
    """
    return torch.ops.breakgraph.qkv_norm_rope_store(
        *(qkv, normed, normed_eps),
        *(q_weight, k_weight, eps, offset, cos_sin, out_cache_loc, k_cache, v_cache),
    )


def qk_norm_rope_store_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    normed: torch.Tensor | None = None,
    normed_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``qk_norm_rope_store`` in plain torch ops."""
    if normed is not None:
        factor = row_factor(normed, normed_eps)[..., None]
        q, k = ((x.float() * factor).to(x.dtype) for x in (q, k))
        v.copy_(v.float() * factor)
    if q_weight is not None and k_weight is not None:
        q, k = _normalised(q, q_weight, eps, offset), _normalised(k, k_weight, eps, offset)
    q, k = _rotated(q, cos_sin), _rotated(k, cos_sin)
    k_cache.index_copy_(0, out_cache_loc, k)
    v_cache.index_copy_(0, out_cache_loc, v)
    return q, k


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        wide = wide.to(x.dtype).float()
    return (wide * (weight.float() + offset)).to(x.dtype)


def _rotated(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    half = cos_sin.shape[2]
    cos, sin = cos_sin.float().unsqueeze(2).unbind(1)
    first, second, rest = x.float().split([half, half, x.shape[2] - 2 * half], dim=2)
    turned = (first * cos).to(x.dtype).float() - second * sin
    other = (second * cos).to(x.dtype).float() + first * sin
    return torch.cat([turned, other, rest], dim=2).to(x.dtype)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    rows, _, head_dim = q.shape
    kv_shape = (rows, k.shape[1], head_dim)
    if k.shape != kv_shape or v.shape != kv_shape:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must have the rows and the head size of "
            f"q {list(q.shape)}, and the same heads"
        )
    if any(x.stride(2) != 1 for x in (q, k, v) if head_dim > 1):
        raise ValueError("the last dimension of q, k and v must be dense: call .contiguous() first")
    if cos_sin.shape[:2] != (rows, 2) or 2 * cos_sin.shape[2] > head_dim:
        raise ValueError(
            f"cos_sin {list(cos_sin.shape)} must be [{rows}, 2, half], with two halves inside of "
            f"a head of {head_dim}"
        )
    caches = (k_cache, v_cache)
    if any(x.shape[1:] != kv_shape[1:] for x in caches) or out_cache_loc.shape != (rows,):
        raise ValueError(
            f"the caches {list(k_cache.shape)} and {list(v_cache.shape)} must hold heads "
            f"{list(kv_shape[1:])}, and out_cache_loc {list(out_cache_loc.shape)} {rows} slots"
        )
    if not all(x.is_contiguous() for x in (cos_sin, out_cache_loc, *caches)):
        raise ValueError("cos_sin, out_cache_loc and the caches must be contiguous")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together: one was given and one was not")
    if q_weight is not None and k_weight is not None:
        same = q_weight.dtype == k_weight.dtype
        if not same or not q_weight.shape == k_weight.shape == (head_dim,):
            raise ValueError(
                f"q_weight {list(q_weight.shape)} {q_weight.dtype} and k_weight "
                f"{list(k_weight.shape)} {k_weight.dtype} must be [{head_dim}] of one dtype"
            )


def _on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    normed: torch.Tensor | None = None,
    normed_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, heads, head_dim), kv_heads, half = q.shape, k.shape[1], cos_sin.shape[2]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    block_h = max(1, BLOCK // power_of_two(head_dim))
    block_h = min(block_h, power_of_two(max(heads, kv_heads)))
    blocks = -(-heads // block_h) + 2 * -(-kv_heads // block_h)
    if rows:
        weights = (q if q_weight is None else q_weight, k if k_weight is None else k_weight)
        early = launches_early(q.device)
        rows_of = q[:, 0] if normed is None else normed
        _kernels().qk_norm_rope_store(
            (rows, blocks, 1),
            (q, k, v, rows_of, *weights, cos_sin, out_cache_loc, q_out, k_out, k_cache, v_cache),
            (),
            specialized(
                (
                    *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], rows_of.stride(0)),
                    *(normed is not None, normed_eps, rows_of.shape[1]),
                    *(eps, offset, q_weight is not None, heads, kv_heads, head_dim, half, block_h),
                    *(power_of_two(size) for size in (half, head_dim - 2 * half, head_dim)),
                    power_of_two(rows_of.shape[1]),
                    early,
                ),
                WARPS,
                early,
            ),
        )
    return q_out, k_out


_library.impl("qk_norm_rope_store", qk_norm_rope_store_reference, "CPU")
_library.impl("qk_norm_rope_store", _on_cuda, "CUDA")


def _of_heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of q, k, v and the rest as one of the fused projection and the rest."""

    def of_projection(
        qkv: torch.Tensor,
        normed: torch.Tensor | None,
        normed_eps: float,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        offset: float,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kv_heads, head_dim = others[-1].shape[1:]
        heads = qkv.shape[-1] // head_dim - 2 * kv_heads
        if qkv.dim() != 2 or qkv.shape[1] % head_dim or heads < 1:
            raise ValueError(
                f"qkv {list(qkv.shape)} must be [rows, features], and the features heads of "
                f"{head_dim}: queries, and {kv_heads} of keys and of values each, as in the caches"
            )
        q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
        _check(q, k, v, q_weight, k_weight, *others)
        if normed is not None:
            check_rows(normed=normed)
            if len(normed) != len(qkv):
                raise ValueError(f"normed has {len(normed)} rows and qkv {len(qkv)}")
        norms = (q_weight, k_weight, eps, offset)
        return *function(q, k, v, *norms, *others, normed, normed_eps), v

    return of_projection


_library.impl("qkv_norm_rope_store", _of_heads(qk_norm_rope_store_reference), "CPU")
_library.impl("qkv_norm_rope_store", _of_heads(_on_cuda), "CUDA")


class _Kernels(NamedTuple):
    qk_norm_rope_store: DirectLaunch


@cache
def _kernels() -> _Kernels:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()
    row_factor_of = row_factor_function()

    @triton.jit
    def load_heads(  # type: ignore[no-untyped-def]
        source, held, factor, weight, cos, sin,
        SCALE: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr,
        HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
        BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """The first and second rotated half and the rest of a block of heads, in float32."""
        part = tl.arange(0, BLOCK_HALF)[None, :]
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        low = held & (part < HALF)
        high = held & (rest < HEAD_DIM)
        first = tl.load(source + part, mask=low, other=0.0)
        second = tl.load(source + HALF + part, mask=low, other=0.0)
        dtype = first.dtype
        first, second = first.to(tl.float32), second.to(tl.float32)
        if HEAD_DIM > 2 * HALF:
            third = tl.load(source + rest, mask=high, other=0.0).to(tl.float32)
        else:
            third = first
        if SCALE:
            first, second, third = first * factor, second * factor, third * factor
        if NORM:
            total = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            if HEAD_DIM > 2 * HALF:
                total += tl.sum(third * third, 1)
            scale = tl.rsqrt(total / HEAD_DIM + EPS)[:, None]
            first, second, third = first * scale, second * scale, third * scale
            if OFFSET == 0.0:
                first = first.to(dtype).to(tl.float32)
                second = second.to(dtype).to(tl.float32)
                third = third.to(dtype).to(tl.float32)
            first *= tl.load(weight + part, mask=part < HALF, other=0.0).to(tl.float32) + OFFSET
            second *= (
                tl.load(weight + HALF + part, mask=part < HALF, other=0.0).to(tl.float32) + OFFSET
            )
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            if HEAD_DIM > 2 * HALF:
                third *= (
                    tl.load(weight + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32) + OFFSET
                )
        turned = (first * cos).to(dtype).to(tl.float32) - second * sin
        other = (second * cos).to(dtype).to(tl.float32) + first * sin
        return turned.to(dtype), other.to(dtype), third.to(dtype)

    @triton.jit
    def store_heads(  # type: ignore[no-untyped-def]
        to, held, first, second, third,
        HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
        BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        part = tl.arange(0, BLOCK_HALF)[None, :]
        low = held & (part < HALF)
        tl.store(to + part, first, mask=low)
        tl.store(to + HALF + part, second, mask=low)
        if HEAD_DIM > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            tl.store(to + rest, third, mask=held & (rest < HEAD_DIM))

    @triton.jit
    def qk_norm_rope_store(  # type: ignore[no-untyped-def]
        q, k, v, normed, q_weight, k_weight, cos_sin, out_cache_loc, q_out, k_out, k_cache, v_cache,
        Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
        V_ROW: tl.constexpr, V_HEAD: tl.constexpr, NORMED_ROW: tl.constexpr,
        SCALE: tl.constexpr, SCALE_EPS: tl.constexpr, HIDDEN: tl.constexpr,
        EPS: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """One row's block of query, key or value heads; a block never mixes the three."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
        KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1)
        within = tl.arange(0, BLOCK_H)[:, None]
        part = tl.arange(0, BLOCK_HALF)[None, :]
        angles = cos_sin + row * (2 * HALF) + part
        factor = 1.0
        if SCALE:
            factor = row_factor_of(normed + row * NORMED_ROW, SCALE_EPS, HIDDEN, BLOCK_HIDDEN)
        if block < Q_BLOCKS:
            head = block * BLOCK_H + within
            held = head < HEADS
            cos = tl.load(angles, mask=part < HALF, other=0.0).to(tl.float32)
            sin = tl.load(angles + HALF, mask=part < HALF, other=0.0).to(tl.float32)
            first, second, third = load_heads(
                q + row * Q_ROW + head * Q_HEAD, held, factor, q_weight, cos, sin,
                SCALE, EPS, OFFSET, NORM, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            store_heads(
                q_out + row * (HEADS * HEAD_DIM) + head * HEAD_DIM, held, first, second, third,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        elif block < Q_BLOCKS + KV_BLOCKS:
            head = (block - Q_BLOCKS) * BLOCK_H + within
            held = head < KV_HEADS
            slot = tl.load(out_cache_loc + row)
            cos = tl.load(angles, mask=part < HALF, other=0.0).to(tl.float32)
            sin = tl.load(angles + HALF, mask=part < HALF, other=0.0).to(tl.float32)
            first, second, third = load_heads(
                k + row * K_ROW + head * K_HEAD, held, factor, k_weight, cos, sin,
                SCALE, EPS, OFFSET, NORM, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            store_heads(
                k_out + row * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM, held, first, second, third,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            store_heads(
                k_cache + slot * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM,
                held, first, second, third,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        else:
            head = (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_H + within
            slot = tl.load(out_cache_loc + row)
            dim = tl.arange(0, BLOCK_D)[None, :]
            inside = (head < KV_HEADS) & (dim < HEAD_DIM)
            at = v + row * V_ROW + head * V_HEAD + dim
            value = tl.load(at, mask=inside, other=0.0)
            if SCALE:
                value = (value.to(tl.float32) * factor).to(v.dtype.element_ty)
                tl.store(at, value, mask=inside)
            tl.store(
                v_cache + slot * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM + dim, value, mask=inside
            )

    return _Kernels(qk_norm_rope_store=DirectLaunch(qk_norm_rope_store))

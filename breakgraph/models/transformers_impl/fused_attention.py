"""Attention modules of a transformers class, from input to cache in a product and a kernel.

Such a module multiplies, normalises heads perhaps, rotates them by the ``position_embeddings`` it
is given, and attends. What would take its place is run beside it over caches of their own, at
positions all over the context, and does so only if queries, keys, values, what is stored, and the
module's result are the same.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from breakgraph.models.transformers_impl.attention import WrappedAttention
from breakgraph.models.transformers_impl.fused import LARGEST_ERROR, SCALES, FusedNorm, row_error
from breakgraph.models.transformers_impl.interface import LayerCalls, Switches, current_call
from breakgraph.models.transformers_impl.packing import Products, is_unhooked
from breakgraph.models.transformers_impl.plan import PlanCache
from breakgraph.models.transformers_impl.reach import Reach

if TYPE_CHECKING:
    from breakgraph.models.transformers_impl.model import Parts

logger = logging.getLogger(__name__)

HIDDEN, ANGLES, MASK = "hidden_states", "position_embeddings", "attention_mask"
"""What the library calls the arguments of an attention module."""

Called = dict[nn.Module, inspect.BoundArguments]


class FusedAttention:
    """An attention module's forward.

    Args:
        module: of the class.
        products: of queries, keys and values.
        out: the linear after attention.
        norms: of query and key heads, one epsilon and offset, or of all heads at once; None for
            none.
        halved: whether cosines are given for half of what is rotated, not for both halves.
    """

    def __init__(
        self,
        module: nn.Module,
        products: Products,
        out: nn.Linear,
        norms: tuple[FusedNorm, FusedNorm] | None,
        *,
        head_dim: int,
        halved: bool,
    ) -> None:
        self._module, self._plain = module, module.forward
        self._signature = inspect.signature(module.forward)
        self.products, self._out, self._norms = products, out, norms
        self._head_dim, self._halved = head_dim, halved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module; in any forward but ours, the module itself."""
        call, given = current_call(), self._signature.bind(*args, **kwargs).arguments
        if not isinstance(call, LayerCalls) or given.get(MASK) is not None:
            return self._plain(*args, **kwargs)
        q, k, v = self.products(given[HIDDEN][0])
        norm: dict[str, Any] = {}
        if self._norms is not None:
            of_q, of_k = self._norms
            if len(of_q.weight) == self._head_dim:
                norm = {"q_weight": of_q.weight, "k_weight": of_k.weight}
                norm |= {"eps": of_q.eps, "offset": of_q.offset}
            else:
                q, k = of_q(q), of_k(k)
        q, k, v = (rows.unflatten(1, (-1, self._head_dim)) for rows in (q, k, v))
        cos_sin = call.angles(*given[ANGLES], halved=self._halved)
        mixed = call.rotated(self._module, q, k, v, cos_sin=cos_sin, **norm)
        return self._out(mixed.flatten(1)).unsqueeze(0), None


@contextmanager
def called_attention(parts: Parts) -> Iterator[Called]:
    """While this lasts, note how attention modules are called that can be given angles."""
    called: Called = {}

    def spread(value: Any) -> Any:
        """Positions over the whole context: some classes scale what lies far behind."""
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            return value
        last = parts.context_length - 1
        return torch.linspace(0, last, value.shape[-1], device=value.device).long().expand_as(value)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = inspect.signature(module.forward).parameters
        if {HIDDEN, ANGLES, MASK} <= parameters.keys():
            args, kwargs = tree_map(spread, (args, kwargs))
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            given.arguments[MASK] = None  # at load it is one that no later forward makes
            called[module] = given

    modules = {module for module in parts.modules if "forward" not in vars(module)}
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def fused_attention(
    parts: Parts, called: Called, norms: Mapping[nn.Module, FusedNorm]
) -> dict[nn.Module, FusedAttention]:
    """What takes the place of the attention modules of ``called``.

    Args:
        parts: the model.
        called: how each was called.
        norms: the norms known.
    """
    layers = dict(zip(parts.modules, parts.layers, strict=True))
    found = {}
    for module, given in called.items():
        if not _are_angles(given.arguments.get(ANGLES)):
            continue
        least = float("inf")
        for candidate in _candidates(module, layers[module], norms, given.arguments[ANGLES][0]):
            error = _error(candidate, module, layers[module], given, parts.switches)
            if error <= LARGEST_ERROR.get(given.arguments[HIDDEN].dtype, 0.0):
                found[module] = candidate
                break
            least = min(least, error)
        else:
            said = type(module).__name__, least
            logger.debug("%s stays as it is: fused, a row is off by %.2g of its length", *said)
    return found


def _are_angles(value: Any) -> bool:
    """Whether these are cosines and sines ``[1, rows, size]``."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(one, torch.Tensor) and one.dim() == 3 for one in value)
    )


def _candidates(
    module: nn.Module,
    layer: WrappedAttention,
    norms: Mapping[nn.Module, FusedNorm],
    cos: torch.Tensor,
) -> Iterator[FusedAttention]:
    """The ways to take linears, in their order, for those of queries, keys, values and output."""
    width = layer.head_dim
    sizes = [width * heads for heads in (layer.num_heads, *[layer.num_kv_heads] * 2)]
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    known = [norms[child] for child in module.children() if child in norms and is_unhooked(child)]
    pair, lengths = None, [len(norm.weight) for norm in known]
    alike = len({(norm.eps, norm.offset) for norm in known}) == 1
    if (lengths == [width] * 2 and alike) or lengths == sizes[:2]:
        pair = known[0], known[1]
    if layer.value_dim != width or len(linears) not in (2, 4):
        return
    ways = [halved for halved in (False, True) if (1 + halved) * cos.shape[2] <= width]
    for (*into, out), halved in product((linears, [*linears[1:], linears[0]]), ways):
        given = [linear.out_features for linear in into]
        if given in (sizes, [sum(sizes)]) and out.in_features == sizes[0]:
            products = Products(into, sizes)
            yield FusedAttention(module, products, out, pair, head_dim=width, halved=halved)


class _Noting(WrappedAttention):
    """A layer with a small cache that attends to nothing: it notes what it is given."""

    def __init__(self, like: WrappedAttention, result: torch.Tensor) -> None:
        super().__init__(
            num_heads=like.num_heads,
            num_kv_heads=like.num_kv_heads,
            head_dim=like.head_dim,
            value_dim=like.value_dim,
            scale=like.scale,
            reach=Reach(),
            plans=PlanCache(),
        )
        self.given: list[torch.Tensor] = []
        self._result = result
        shape = (len(result) + 1, like.num_kv_heads, like.head_dim)
        self.k_cache, self.v_cache = result.new_zeros(shape), result.new_zeros(shape)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.given += [q, k, v]
        return self._result


def _error(
    candidate: FusedAttention,
    module: nn.Module,
    layer: WrappedAttention,
    given: inspect.BoundArguments,
    switches: Switches,
) -> float:
    """How far a row of anything that a candidate computes is from the class's own, at most."""
    hidden = given.arguments[HIDDEN]
    generator = torch.Generator(hidden.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=hidden.dtype, device=hidden.device, generator=generator)

    slots = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    largest = 0.0
    for scale in SCALES:
        mixed = draw(len(slots), layer.num_heads, layer.head_dim)
        given.arguments[HIDDEN] = draw(*hidden.shape).mul_(scale)
        sides = []
        for forward in (candidate, module.forward):
            noting = _Noting(layer, mixed)
            calls = LayerCalls([module], [noting], slots)
            try:
                with switches.ours(calls):
                    output = forward(*given.args, **given.kwargs)
                calls.check_complete()
            except Exception as error:  # whatever a kernel, its compiler or a class raises
                logger.debug("%s stays as it is: %s", type(module).__name__, error)
                return float("inf")
            if not isinstance(output, tuple) or output[1:] != (None,):
                return float("inf")
            heads = (*noting.given, noting.k_cache[1:], noting.v_cache[1:])
            sides.append([output[0], *(head.flatten(1) for head in heads)])
        largest = max(largest, *map(row_error, *sides))
    given.arguments[HIDDEN] = hidden
    return largest

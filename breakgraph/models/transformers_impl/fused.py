"""Norms and feed-forward blocks of a transformers class, computed by fused kernels.

Nothing is taken for what its name says. A module that has the shape of one of these is run beside
what would take its place, on random inputs of several sizes, and replaced only if each row of the
result is the class's own up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import permutations, product
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from breakgraph.kernels.layer_norm import layer_norm
from breakgraph.kernels.norms import rms_norm
from breakgraph.kernels.pointwise import silu_mul
from breakgraph.models.transformers_impl.packing import Products, is_unhooked
from breakgraph.models.transformers_impl.token_wise import PROBE_ROWS, Part

logger = logging.getLogger(__name__)

LARGEST_ERROR = {
    torch.float32: 1e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}
"""Of a row, relative to its length, for each dtype that is replaced.

In half precision a class rounds an element up to five times and a kernel fewer times, each time by
at most half of an eps: rows of 8 elements differ by up to one eps, longer ones by less, and by ten
times that with another activation, offset or rotation. In float32 only sums of another order
differ."""

SCALES = (1.0, 30.0)
"""Deviations of the inputs compared: ordinary ones, and such as meet a clamp."""

SMALL = 1e-3
"""And for norms, whose epsilon is here about the mean of squares, or more."""

Fused = TypeVar("Fused", bound=Callable[..., torch.Tensor])


class FusedNorm:
    """``rms_norm`` with the weight that is the parameter ``name`` of ``module``."""

    def __init__(self, module: nn.Module, name: str, eps: float, offset: float) -> None:
        self._module, self._name = module, name
        self.eps, self.offset = eps, offset

    @property
    def weight(self) -> torch.Tensor:
        """``[size]``."""
        weight: torch.Tensor = getattr(self._module, self._name)
        return weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[..., size]``."""
        rows = x.reshape(-1, x.shape[-1])
        return rms_norm(rows, self.weight, self.eps, self.offset).view(x.shape)


class FusedLayerNorm:
    """``layer_norm`` with the parameters ``weight`` and ``bias`` of ``module``, by their names."""

    def __init__(self, module: nn.Module, eps: float, weight: str, bias: str | None = None) -> None:
        self._module, self._eps = module, eps
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Of ``[..., size]``, or of the sum of two such."""
        weight = getattr(self._module, self._weight)
        bias = None if self._bias is None else getattr(self._module, self._bias)
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return layer_norm(rows, weight, bias, self._eps, added).view(x.shape)


Norm: TypeAlias = FusedNorm | FusedLayerNorm


class FusedAddNorm:
    """``norm(linear(x) + residual)``."""

    def __init__(self, linear: nn.Linear, norm: FusedLayerNorm) -> None:
        self._linear, self._norm = linear, norm

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Of ``[..., in_features]`` and ``[..., out_features]``."""
        return self._norm(self._linear(x), residual)


class FusedFeedForward:
    """``down(silu(gate(x)) * up(x))``; ``swapped`` where ``products`` gives ``up`` first."""

    def __init__(self, products: Products, down: nn.Linear, *, swapped: bool) -> None:
        self.products, self._down, self._swapped = products, down, swapped

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[..., size]``."""
        first, second = self.products(x.reshape(-1, x.shape[-1]))
        gate, up = (second, first) if self._swapped else (first, second)
        rows: torch.Tensor = self._down(silu_mul(gate, up))
        return rows.view(x.shape)


def fused_norm(part: Part) -> Norm | None:
    """What computes a module that is a norm of rows, about zero or about their mean."""
    return _checked(part, _norms(part), (SMALL, *SCALES))


def fused_add_norm(part: Part, norms: Mapping[nn.Module, Norm]) -> FusedAddNorm | None:
    """What computes a module that adds a product to its second input and normalises the sum.

    Args:
        part: the module.
        norms: the norms known.
    """
    return _checked(part, _add_norms(part, norms), SCALES)


def fused_feed_forward(part: Part) -> FusedFeedForward | None:
    """What computes a module that is a feed-forward block gated by SiLU, if it is one."""
    return _checked(part, _feed_forwards(part), SCALES)


def row_error(ours: torch.Tensor, own: torch.Tensor) -> float:
    """The largest error of a row, relative to its length; infinite for another shape or dtype."""
    if ours.shape != own.shape or ours.dtype != own.dtype:
        return float("inf")
    ours, own = ours.double(), own.double()
    errors = (ours - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-20)
    return float(errors.nan_to_num(nan=float("inf")).max())


def _norms(part: Part) -> Iterator[Norm]:
    """Every epsilon that the module keeps: about zero, with a weight as it is and one that is kept
    around zero; then about the mean, with a bias if there are two parameters."""
    parameters = dict(part.module.named_parameters())
    ((shape, _), *others) = part.inputs
    if others or len(parameters) not in (1, 2) or next(part.module.children(), None) is not None:
        return
    if any(parameter.shape != shape[-1:] for parameter in parameters.values()):
        return
    kept = vars(part.module).values()
    epsilons = sorted({value for value in kept if isinstance(value, float) and 0 <= value < 1})
    weight, *bias = parameters
    if not bias:
        for offset, eps in product((0.0, 1.0), epsilons):
            yield FusedNorm(part.module, weight, eps, offset)
    for eps in epsilons:
        yield FusedLayerNorm(part.module, eps, weight, *bias)


def _add_norms(part: Part, norms: Mapping[nn.Module, Norm]) -> Iterator[FusedAddNorm]:
    """The one way to take a linear and a norm, where there is nothing else but dropout."""
    children = [child for child in part.module.children() if not isinstance(child, nn.Dropout)]
    linears = [child for child in children if isinstance(child, nn.Linear)]
    known = [norms[child] for child in children if child in norms and is_unhooked(child)]
    layer_norms = [norm for norm in known if isinstance(norm, FusedLayerNorm)]
    if next(part.module.parameters(recurse=False), None) is not None or len(part.inputs) != 2:
        return
    if (len(children), len(linears), len(layer_norms)) == (2, 1, 1):
        yield FusedAddNorm(linears[0], layer_norms[0])


def _feed_forwards(part: Part) -> Iterator[FusedFeedForward]:
    """Every way to take three linears, or two, for gate, up and down."""
    linears = [child for child in part.module.children() if isinstance(child, nn.Linear)]
    own = sum(1 for linear in linears for _ in linear.parameters())
    others = sum(1 for _ in part.module.parameters()) - own
    if others or len(part.inputs) != 1 or len(linears) not in (2, 3):
        return
    size = part.inputs[0][0][-1]
    for *into, down in permutations(linears):
        inner = [down.in_features] * 2
        shapes = {(linear.in_features, linear.out_features) for linear in into}
        wanted = (size, inner[0] if len(into) == 2 else sum(inner))
        if shapes == {wanted} and down.out_features == size:
            yield FusedFeedForward(Products(into, inner), down, swapped=False)
            if len(into) == 1:
                yield FusedFeedForward(Products(into, inner), down, swapped=True)


def _checked(part: Part, candidates: Iterable[Fused], scales: tuple[float, ...]) -> Fused | None:
    """The first that gives what the class gives."""
    module, errors = part.module, []
    for candidate in candidates:
        device = next(module.parameters()).device
        dtype = part.inputs[0][1]
        try:
            draws = [part.draw(PROBE_ROWS, device, scale) for scale in scales]
            errors.append(max(row_error(candidate(*x), module.forward(*x)) for x in draws))
        except Exception as error:  # whatever a kernel, its compiler or a class raises
            logger.debug("%s stays as it is: %s", type(module).__name__, error)
            return None
        if errors[-1] <= LARGEST_ERROR.get(dtype, 0.0):
            return candidate
    if errors:
        said = type(module).__name__, min(errors)
        logger.debug("%s stays as it is: fused, a row is off by %.2g of its length", *said)
    return None

"""Token-wise parts of a transformers class under torch.compile, each as one op.

A compiled call is an op of ours, so a capture sees what it reads and a CPU tape runs it again at
each replay. All compiling is done here, before anything is captured: a size that no compiled code
serves later runs as the class does, for a capture cannot wait for a compiler.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from breakgraph.models.transformers_impl.record import record_calls

if TYPE_CHECKING:
    from breakgraph.models.transformers_impl.model import Parts, TransformersModel

logger = logging.getLogger(__name__)

Backend: TypeAlias = str | Callable[..., Any]

PROBE_ROWS = 23
"""Rows to find token-wise parts with: prime, so that no other dimension is taken for them."""

WARM_ROWS = (1021, 1)
"""Sizes to compile for: one for all from 2 on, by which kernels are tuned, and 1, which torch
compiles for itself."""

LARGEST_ERROR = {torch.float32: 1e-4}
"""Relative to what the class gives; other types are allowed 0.02."""

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("compiled(Tensor[] inputs, int key) -> Tensor")

_calls: weakref.WeakValueDictionary[int, CompiledCall] = weakref.WeakValueDictionary()
_keys = count()


class CompiledCall:
    """One module's forward: called as the module is, through an op."""

    def __init__(self, module: nn.Module, backend: Backend) -> None:
        self.plain = module.forward
        self._compiled = torch.compile(module.forward, backend=backend, fullgraph=True)
        self._key = next(_keys)
        _calls[self._key] = self

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.breakgraph.compiled(list(inputs), self._key)
        return result

    def warm_up(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compile for inputs of this many rows, and run."""
        if inputs[0].shape[1] > 1:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 1)
        result: torch.Tensor = self._compiled(*inputs)
        return result

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Without compiling anything."""
        with torch.compiler.set_stance("eager_on_recompile"):
            result: torch.Tensor = self._compiled(*inputs)
        return result


def _run(inputs: Sequence[torch.Tensor], key: int) -> torch.Tensor:
    return _calls[key].run(inputs)


_library.impl("compiled", _run, "CompositeExplicitAutograd")


@dataclass(frozen=True, slots=True)
class _Part:
    """A token-wise module, and the shapes and types of its inputs ``[1, rows, ...]``."""

    module: nn.Module
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]

    def draw(self, rows: int, device: torch.device) -> list[torch.Tensor]:
        return [
            torch.randn(1, rows, *shape[2:], dtype=dtype, device=device)
            for shape, dtype in self.inputs
        ]


def compile_token_wise(model: TransformersModel, backend: Backend = "inductor") -> int:
    """Compile what maps rows to rows, module by module, and use it in every later forward.

    Modules of one class and shape share their code. A module that the compiler refuses, or whose
    compiled code gives other results, stays as it is.

    Args:
        model: wrapped.
        backend: of torch.compile.

    Returns:
        How many modules are compiled.
    """
    began, parts = time.perf_counter(), model.parts
    device = parts.embedding.weight.device
    calls: dict[nn.Module, CompiledCall] = {}
    refused: set[type[nn.Module]] = set()
    with torch.no_grad():
        for part in _token_wise(parts):
            kind = type(part.module)
            if kind in refused:
                continue
            call = CompiledCall(part.module, backend)
            try:
                _check(call, part, device)
            except Exception as error:  # whatever a compiler raises
                refused.add(kind)
                said = str(error).partition("\n")[0]
                logger.warning("%s stays uncompiled: %s", kind.__name__, said)
                continue
            calls[part.module] = call
    parts.switches.forwards |= calls
    logger.info(
        "compiled %d token-wise modules of %s in %.1f s",
        *(len(calls), model.architecture, time.perf_counter() - began),
    )
    return len(calls)


def _check(call: CompiledCall, part: _Part, device: torch.device) -> None:
    """Compile; raises ValueError where that gives something else than the class."""
    for rows in WARM_ROWS:
        inputs = part.draw(rows, device)
        own, ours = call.plain(*inputs).float(), call.warm_up(inputs).float()
        limit = LARGEST_ERROR.get(inputs[0].dtype, 0.02)
        error = float((ours - own).norm() / own.norm().clamp(min=1e-20))
        if not error <= limit:
            raise ValueError(f"compiled, it is off by {error:.2g} of its result")


def _token_wise(parts: Parts) -> list[_Part]:
    """The outermost modules that were called with tensors of rows alone and gave one such tensor.

    Seen in one forward over ``PROBE_ROWS`` rows. A module with attention or experts in it is none,
    nor one of torch's own, which are a kernel each, nor one that changes its inputs.
    """
    seen: dict[nn.Module, _Part] = {}
    excluded = _excluded(parts)
    hooks = []

    def watch(module: nn.Module) -> None:
        versions: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            versions[:] = [tensor._version for tensor in args if isinstance(tensor, torch.Tensor)]

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if kwargs or not args or not all(map(_is_rows, (*args, output))):
                return
            storages = {tensor.untyped_storage()._cdata for tensor in args}
            same = output.untyped_storage()._cdata in storages
            if not same and versions == [tensor._version for tensor in args]:
                seen[module] = _Part(module, tuple((t.shape, t.dtype) for t in args))

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))

    for module in parts.decoder.modules():
        if module not in excluded and not type(module).__module__.startswith("torch.nn."):
            watch(module)
    try:
        weight = parts.embedding.weight
        embeds = torch.randn(
            1, PROBE_ROWS, parts.hidden_size, dtype=weight.dtype, device=weight.device
        )
        positions = torch.arange(PROBE_ROWS, device=weight.device).unsqueeze(0)
        arguments = {**parts.arguments, "position_ids": positions}
        record_calls(parts.decoder, parts.switches, embeds, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return list(_outermost(parts.decoder, seen))


def _excluded(parts: Parts) -> set[nn.Module]:
    """Modules with attention in them, with a weight of three dimensions (experts, convolutions), or
    whose forward somebody has replaced."""
    stops = set(parts.modules)
    for module in parts.decoder.modules():
        if any(weight.dim() > 2 for weight in module.parameters(recurse=False)):
            stops.add(module)
    return {
        module
        for module in parts.decoder.modules()
        if "forward" in vars(module) or any(inner in stops for inner in module.modules())
    }


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 3
        and value.shape[:2] == (1, PROBE_ROWS)
        and value.is_floating_point()
    )


def _outermost(module: nn.Module, seen: dict[nn.Module, _Part]) -> Iterator[_Part]:
    if module in seen:
        yield seen[module]
        return
    for child in module.children():
        yield from _outermost(child, seen)

"""Token-wise parts of a transformers class under torch.compile, each as one op.

A compiled call is an op of ours, so a capture sees what it reads and a CPU tape runs it again at
each replay. All compiling is done here, before anything is captured: a size that no compiled code
serves later runs as the class does, for a capture cannot wait for a compiler.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from breakgraph.models.transformers_impl.token_wise import Part, token_wise_parts

if TYPE_CHECKING:
    from breakgraph.models.transformers_impl.model import Parts, TransformersModel

logger = logging.getLogger(__name__)

Backend: TypeAlias = str | Callable[..., Any]

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


def compile_token_wise(model: TransformersModel, backend: Backend = "inductor") -> int:
    """Compile what maps rows to rows, module by module, and use it in every later forward.

    Modules of one class and shape share their code. A module that the compiler refuses, or whose
    compiled code gives other results, stays as it is, and so does what fused kernels compute.

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


def _check(call: CompiledCall, part: Part, device: torch.device) -> None:
    """Compile; raises ValueError where that gives something else than the class."""
    for rows in WARM_ROWS:
        inputs = part.draw(rows, device)
        own, ours = call.plain(*inputs).float(), call.warm_up(inputs).float()
        limit = LARGEST_ERROR.get(inputs[0].dtype, 0.02)
        error = float((ours - own).norm() / own.norm().clamp(min=1e-20))
        if not error <= limit:
            raise ValueError(f"compiled, it is off by {error:.2g} of its result")


def _token_wise(parts: Parts) -> list[Part]:
    """The outermost token-wise modules without any in them that is computed otherwise already."""
    seen = token_wise_parts(parts)
    seen = {module: part for module, part in seen.items() if part.row_dim == 1}
    return list(_outermost(parts.decoder, seen, parts.switches.forwards))


def _outermost(
    module: nn.Module, seen: Mapping[nn.Module, Part], replaced: Container[nn.Module]
) -> Iterator[Part]:
    if module in replaced:
        return
    if module in seen and not any(inner in replaced for inner in module.modules()):
        yield seen[module]
        return
    for child in module.children():
        yield from _outermost(child, seen, replaced)

"""Sees every op of a segment, and so knows whose each tensor is.

A tensor is the pool's if an op of this capture made it and its address lies in the graph's
pool; such a tensor is held by address only. Every other tensor that a segment reads is
held strongly for the life of the graph. Storages are told apart by identity, kept unique by
a weak reference, because an address alone is reused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from breakgraph.graph.arguments import tensors_in
from breakgraph.graph.audit import CaptureAudit
from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import BreakableGraphError, RefusedOpError
from breakgraph.graph.segments import SegmentBackend


class Ownership:
    """Which storages this capture made, and the outside tensors it holds."""

    def __init__(self, audit: CaptureAudit | None) -> None:
        self.audit = audit
        self.held: dict[int, torch.Tensor] = {}
        self._made: dict[int, StorageWeakRef] = {}

    def note_made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage)

    def is_made(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._made

    def note_read(self, reader: str, tensor: torch.Tensor) -> None:
        """Audit and hold ``tensor`` if it is not this capture's own."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._made or storage._cdata in self.held or not storage.nbytes():
            return
        if self.audit is not None:
            self.audit.check_read(reader, tensor)
        self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        self.held[tensor.untyped_storage()._cdata] = tensor.detach()


class SegmentMode(TorchDispatchMode):
    """Active for a whole capture; watches while ``segment`` is set, that is, between breaks."""

    def __init__(self, ownership: Ownership, backend: SegmentBackend) -> None:
        super().__init__()
        self._ownership = ownership
        self._backend = backend
        self.watching = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first op of a capture imports torch's compiler, which takes 0.9 s."""
        return False

    def check_op(self, name: str) -> None:
        if self._ownership.audit is not None:
            self._ownership.audit.check_op(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.watching:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            raise BreakableGraphError(
                f"torch.inference_mode hides ops from the capture ({call_site()}); use "
                "torch.no_grad() there"
            )
        self.check_op(func.name())
        ownership = self._ownership
        inputs = tensors_in(args) + tensors_in(kwargs)
        self._backend.refuse(func, args, kwargs)
        for tensor in inputs:
            ownership.note_read(str(func), tensor)
        result = func(*args, **kwargs)
        read = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in read]
        return self._backend.record(func, args, kwargs, result, fresh, ownership)


class FunctionMode(TorchFunctionMode):
    """Refuses what shows in no op: host reads of a CPU tensor, attention by plain products."""

    _READS = (
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__repr__,
        torch.Tensor.cpu,
    )

    def __init__(self, mode: SegmentMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._mode.watching:
            return func(*args, **(kwargs or {}))
        self._mode.check_op(f"aten::{getattr(func, '__name__', '')}")
        if func in self._READS:
            raise RefusedOpError(
                f"Tensor.{func.__name__}() copies to the host and waits ({call_site()}); a graph "
                "segment cannot hold it. Move it into an eager_on_graph break."
            )
        return func(*args, **(kwargs or {}))

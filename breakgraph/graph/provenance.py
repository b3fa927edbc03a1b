"""Sees every op of a segment that reads or makes memory, and so knows whose each tensor is.

A tensor is the pool's if an op of this capture made it and its address lies in the graph's
pool; such a tensor is held by address only. The storage of every other tensor that a segment
reads is held for the life of the graph. Storages are told apart by identity, kept unique by
a weak reference, because an address alone is reused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from breakgraph.graph.arguments import tensors_in
from breakgraph.graph.audit import CaptureAudit
from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import BreakableGraphError
from breakgraph.graph.op_traits import traits_of
from breakgraph.graph.segments import SegmentBackend
from breakgraph.graph.tape import refuse_uncapturable


class Ownership:
    """Which storages this capture made, and the outside ones it holds, by their identity.

    Those that the audit allows are held from the start.
    """

    def __init__(self, audit: CaptureAudit | None) -> None:
        self.audit = audit
        self.held: dict[int, torch.UntypedStorage] = {} if audit is None else dict(audit.allowed)
        self.made: dict[int, StorageWeakRef] = {}

    def note_made(self, storage: torch.UntypedStorage) -> bool:
        """Note that this capture made ``storage``; whether that is news."""
        if storage._cdata in self.made:
            return False
        self.made[storage._cdata] = StorageWeakRef(storage)
        return True

    def is_made(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.made

    def note_read(self, reader: object, tensor: torch.Tensor) -> None:
        """Audit and hold ``tensor`` if it is not this capture's own.

        Args:
            reader: an op, or what else reads, for an error to name.
            tensor: what it reads.
        """
        storage = tensor.untyped_storage()
        if storage._cdata in self.made or storage._cdata in self.held or not storage.nbytes():
            return
        if self.audit is not None:
            self.audit.check_read(reader, tensor)
        self.held[storage._cdata] = storage

    def hold(self, storage: torch.UntypedStorage) -> None:
        self.held[storage._cdata] = storage


class SegmentMode(TorchDispatchMode):
    """On the stack of modes between breaks, and off it within them, where each op would take 5 µs
    more without being looked at."""

    def __init__(self, ownership: Ownership, backend: SegmentBackend) -> None:
        super().__init__()
        self._ownership = ownership
        self._backend = backend
        self._entered = False
        self.watching = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first op of a capture imports torch's compiler, which takes 0.9 s."""
        return False

    def watch(self) -> None:
        """A segment begins."""
        if not self._entered:
            self.__enter__()
            self._entered = True
        self.watching = True

    def unwatch(self) -> None:
        """A segment ended. Below a mode that the captured code entered, this one stays."""
        self.watching = False
        if self._entered and _get_current_dispatch_mode_stack()[-1:] == [self]:
            self.close()

    def close(self) -> None:
        """Leave the stack, on top of which no other mode is any more."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)

    def sees(self) -> bool:
        """Whether an op called now is one of the segment, and not one that such an op calls."""
        return self.watching and self in _get_current_dispatch_mode_stack()

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
        traits = traits_of(func)
        if traits.gives_views:
            return func(*args, **kwargs)
        ownership, backend = self._ownership, self._backend
        if ownership.audit is not None:
            ownership.audit.check_op(traits.name)
        backend.check_stream(func)
        if traits.refusable:
            refuse_uncapturable(func, args, kwargs, allow_random=backend.allows_random)
        made, held, read = ownership.made, ownership.held, set()
        for tensor in tensors_in((args, kwargs)) if kwargs else tensors_in(args):
            identity = tensor.untyped_storage()._cdata
            read.add(identity)
            if identity not in made and identity not in held:
                ownership.note_read(func, tensor)
        result = func(*args, **kwargs)
        fresh = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in read]
        return backend.record(func, args, kwargs, result, fresh, ownership)

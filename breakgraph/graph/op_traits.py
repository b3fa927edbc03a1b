"""What an op's name, tags and schema say, whatever its arguments; learnt once for each op.

A capture looks this up for each op it sees, by the op's identity: to hash an op runs Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class OpTraits:
    """Of one op.

    Attributes:
        op: held, so that no other op can have its identity.
        name: as torch registers it, ``aten::mm``.
        gives_views: whether all it does is to describe its argument's memory anew. It reads
            nothing, launches nothing and makes no storage, so a capture need not look at it:
            whoever reads the views is asked for their storage.
        refusable: whether there are arguments with which no graph can hold it.
    """

    op: Any
    name: str
    gives_views: bool
    refusable: bool


REALLOCATING = (torch.ops.aten.resize_, torch.ops.aten.resize_as_, torch.ops.aten.set_)
INDEXING = tuple(
    getattr(torch.ops.aten, name)
    for name in ("index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put")
)
_SUSPECT = frozenset(
    (
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.nondeterministic_seeded,
    )
)

_known: dict[int, OpTraits] = {}


def traits_of(op: Any) -> OpTraits:
    """Of an ``OpOverload``."""
    found = _known.get(id(op))
    if found is None:
        packet, tags = op.overloadpacket, op.tags
        refusable = packet in REALLOCATING + INDEXING or not _SUSPECT.isdisjoint(tags)
        views = not refusable and _gives_views(op)
        found = _known[id(op)] = OpTraits(op, op.name(), gives_views=views, refusable=refusable)
    return found


def _gives_views(op: Any) -> bool:
    """By its schema, which for torch's own ops is kept; a composite op may also copy."""
    results = [result.alias_info for result in op._schema.returns]
    aliases = bool(results) and all(alias and not alias.is_write for alias in results)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"
    )
    return op.name().startswith("aten::") and op.is_view and aliases and not composite

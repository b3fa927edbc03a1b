"""Which keys a query sees, read off a class's own mask functions.

A mask of transformers is a function of two indices. It is evaluated here once, at load, on indices
around every multiple of its window, and must be one of the shapes below; the class's later
forwards build no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class MaskShapeError(ValueError):
    """A mask is none of the shapes known here."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a query sees; the default is causal attention over the whole sequence.

    Attributes:
        left: most tokens before its own that it sees; None for all.
        right: most tokens after its own; 0 is causal, None is all.
        chunk: it sees only its own chunk of the sequence, of so many tokens; None for no chunks.
    """

    left: int | None = None
    right: int | None = 0
    chunk: int | None = None

    def within(self, context_length: int) -> Reach:
        """The same for sequences of at most ``context_length`` tokens, limits that none meets
        left out."""
        longest = context_length - 1
        left = None if self.left is not None and self.left >= longest else self.left
        right = None if self.right is not None and self.right >= max(longest, 1) else self.right
        chunk = None if self.chunk is not None and self.chunk > longest else self.chunk
        return replace(self, left=left, right=right, chunk=chunk)

    def visible(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        """bool ``[queries, keys]`` for int64 positions ``[queries]`` and ``[keys]``."""
        q, k = q_positions.unsqueeze(1), k_positions.unsqueeze(0)
        seen = torch.ones(len(q_positions), len(k_positions), dtype=torch.bool, device=q.device)
        if self.right is not None:
            seen &= k <= q + self.right
        if self.left is not None:
            seen &= k >= q - self.left
        if self.chunk is not None:
            seen &= k // self.chunk == q // self.chunk
        return seen

    def keys_of(self, first: int, end: int, num_keys: int) -> tuple[int, int]:
        """The range of keys that queries at positions ``first`` to ``end - 1`` can see."""
        begin = 0 if self.left is None else max(0, first - self.left)
        if self.chunk is not None:
            begin = max(begin, first // self.chunk * self.chunk)
        return begin, num_keys if self.right is None else min(num_keys, end + self.right)

    def __str__(self) -> str:
        said = "bidirectional" if self.right is None else "causal"
        if self.left is not None:
            said = f"window of {self.left + 1}" if self.right == 0 else f"{self.left} to each side"
        return said if self.chunk is None else f"chunks of {self.chunk}"


def reach_of(mask_function: MaskFunction, size: int | None, device: torch.device) -> Reach:
    """The shape of a mask function.

    Args:
        mask_function: whether a query sees a key, of indices of batch, head, query and key.
        size: the window or chunk that the class asks for; None for neither.
        device: where the tensors are that the function may hold.

    Raises:
        MaskShapeError: it is no shape known here.
    """
    points = set(range(12))
    for multiple in (1, 2, 3):
        points |= set(range(max(0, multiple * (size or 0) - 2), multiple * (size or 0) + 3))
    at = torch.tensor(sorted(points), device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        found = mask_function(zero, zero, at.unsqueeze(1), at.unsqueeze(0))
    except Exception as error:  # it reads tensors of the length of a batch, or expects vmap
        raise MaskShapeError(f"its mask depends on the batch ({error})") from error
    found = torch.broadcast_to(torch.as_tensor(found, device=device), (len(at), len(at)))
    known = [Reach(), Reach(right=None)]
    if size is not None:
        known += [
            Reach(left=size - 1),
            Reach(left=size, right=size),
            Reach(chunk=size),
            Reach(left=size - 1, right=size - 1),
        ]
    for reach in known:
        if torch.equal(reach.visible(at, at), found.bool()):
            return reach
    raise MaskShapeError("its mask is neither causal, bidirectional, a window nor chunks")

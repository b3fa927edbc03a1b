"""What of a transformers class runs by fused kernels, decided once at load.

The class itself is left as it is: replacements are in its place only within our forwards, and
weights that become views of one tensor are parameters with the same values.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.models.transformers_impl.fused import (
    LARGEST_ERROR,
    FusedAddNorm,
    FusedFeedForward,
    FusedNorm,
    Norm,
    fused_add_norm,
    fused_feed_forward,
    fused_norm,
)
from breakgraph.models.transformers_impl.fused_attention import called_attention, fused_attention
from breakgraph.models.transformers_impl.token_wise import token_wise_parts

if TYPE_CHECKING:
    from breakgraph.models.transformers_impl.model import Parts

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # its tensors keep no versions, and could not become weights
@torch.no_grad()
def fuse(parts: Parts) -> None:
    """Let fused kernels compute what they can of a class, in every later forward."""
    weight = parts.embedding.weight
    if weight.dtype not in LARGEST_ERROR or weight.device.type not in ("cpu", "cuda"):
        return
    with called_attention(parts) as called:
        seen = token_wise_parts(parts, also=(nn.LayerNorm,))
    norms: dict[nn.Module, Norm] = {}
    add_norms: dict[nn.Module, FusedAddNorm] = {}
    blocks: dict[nn.Module, FusedFeedForward] = {}
    for module, part in seen.items():  # a module comes after those in it
        if (norm := fused_norm(part)) is not None:
            norms[module] = norm
        elif (add_norm := fused_add_norm(part, norms)) is not None:
            add_norms[module] = add_norm
        elif (block := fused_feed_forward(part)) is not None:
            blocks[module] = block
    of_heads = {module: norm for module, norm in norms.items() if isinstance(norm, FusedNorm)}
    attention = fused_attention(parts, called, of_heads)
    for module in (*add_norms, *attention):
        for inner in module.children():
            norms.pop(inner, None)  # the module's own kernel has it
    products = [block.products for block in blocks.values()]
    for one in (*products, *(module.products for module in attention.values())):
        one.pack()
    if weight.is_cuda:
        torch.cuda.empty_cache()  # the weights where they lay before
    parts.switches.forwards |= {**norms, **add_norms, **blocks, **attention}
    logger.info(
        "%d norms, %d feed-forward blocks and %d attention modules of %s run by fused kernels",
        *(len(norms) + len(add_norms), len(blocks), len(attention), type(parts.model).__name__),
    )

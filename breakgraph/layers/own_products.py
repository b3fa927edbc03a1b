"""Which matrix products our own kernels make: those that they gain by, as measured."""

from __future__ import annotations

import logging
import sys
import time

from torch import nn

from breakgraph.kernels.gated_products import serves_gated
from breakgraph.kernels.small_products import serves
from breakgraph.layers.linear import GatedLinear, Linear, VocabularyLinear

logger = logging.getLogger(__name__)

GATED_ROWS = 512
"""From so many rows on a gated product is ours: prefills of Qwen3-8B on an H200 take 12.2 and 46.1
ms at 512 and 2048 tokens so, and 12.8 and 48.3 by cuBLAS with an activation behind it. Fewer rows
were not measured."""


def use_own_products(model: nn.Module, wanted: bool = True) -> int:
    """Let our own kernels multiply where they serve, or none; how many layers they do.

    They are compiled here, for a capture cannot wait for that.
    """
    start, kinds, count = time.perf_counter(), {}, 0
    for layer in model.modules():
        if not isinstance(layer, Linear) or isinstance(layer, VocabularyLinear):
            continue
        layer.small_products = wanted and serves(layer.weight, layer.activation)
        count += layer.small_products
        if isinstance(layer, GatedLinear):
            gains = wanted and layer.bias is None and serves_gated(layer.weight)
            layer.gated_rows = GATED_ROWS if gains else sys.maxsize
        if layer.weight.is_cuda:
            kinds[type(layer), layer.activation, layer.weight.shape] = layer
    for layer in kinds.values():
        layer.warm_up()
    if count:
        took = time.perf_counter() - start
        logger.info("our own kernels for few rows serve %d layers, ready in %.1f s", count, took)
    return count

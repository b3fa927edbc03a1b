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

NARROW, NARROW_ROWS, ROWS = 2048, 2048, 4097
"""A gated product of up to ``NARROW`` input features is ours from ``NARROW_ROWS`` rows on, a wider
one from ``ROWS`` on.

Qwen3-0.6B, of 1024 features, gains 2 % of a prefill on an H200 from 2048 tokens on, and would lose
as much at 1024. Qwen3-8B, of 4096, is bound by the chip's power and neither gains nor loses: there
the kernel saves memory, 400 MB of 8192 rows."""


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
            layer.gated_rows = gated_rows(layer.weight.shape[1]) if gains else sys.maxsize
        if layer.weight.is_cuda:
            kinds[type(layer), layer.activation, layer.weight.shape] = layer
    for layer in kinds.values():
        layer.warm_up()
    if count:
        took = time.perf_counter() - start
        logger.info("our own kernels for few rows serve %d layers, ready in %.1f s", count, took)
    return count


def gated_rows(in_features: int) -> int:
    """From how many rows on our own kernel makes a gated product of ``in_features``."""
    return NARROW_ROWS if in_features <= NARROW else ROWS

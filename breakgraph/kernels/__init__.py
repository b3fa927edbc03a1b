"""Kernels of our own, each beside its plain-torch reference."""

from breakgraph.kernels.decode_attention import decode_attention, decode_attention_reference

__all__ = ["decode_attention", "decode_attention_reference"]

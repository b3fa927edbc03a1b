"""The next token of each request from its logits: one device-to-host copy a step."""

from __future__ import annotations

import torch


class Sampler:
    """Greedy, or from the softmax at a temperature; draws are repeatable for a seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor, temperature: float) -> list[int]:
        """Choose a token per row.

        Args:
            logits: float32 ``[batch_size, vocab_size]``.
            temperature: 0 takes the largest logit; above 0 the logits are divided by it.
        """
        if temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            probs = torch.softmax(logits / temperature, dim=-1)
            tokens = torch.multinomial(probs, 1, generator=self._generator).squeeze(1)
        return tokens.tolist()

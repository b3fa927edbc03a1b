"""A random Qwen3 with a byte tokenizer, and a runner without a model, for tests of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_support import make_reference, save_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from breakgraph.engine.request import Request
from breakgraph.engine.sampling import sample
from breakgraph.forward import ForwardBatch
from breakgraph.memory import MambaPool, RankMemory, RequestTable, SlotAllocator
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.forward_result import ForwardResult

CONTEXT, VOCAB, END = 96, 300, 256


def save_byte_model(
    folder: Path, architecture: str = "Qwen3ForCausalLM", **config: Any
) -> PreTrainedModel:
    """Save a checkpoint in which token ``i`` below 256 is a byte and 256 the end."""
    model = make_reference(
        architecture,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        **config,
    )
    save_checkpoint(model, folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte a token, in the order of the byte-level alphabet; 256 is ``<end>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


class HistoryRunner:
    """Takes a ``ModelRunner``'s place: its logits are a function of all tokens in the slots.

    A forward that is given a wrong slot, a stale prefix or tokens out of order therefore changes
    what is generated, as with a real model, and it costs microseconds.
    """

    def __init__(
        self,
        *,
        chunk_size: int = 16,
        max_running_requests: int = 8,
        num_tokens: int = 256,
        page_size: int = 1,
        context: int = 512,
        vocab: int = 32,
    ) -> None:
        self.chunk_size, self.context_length, self.vocab_size = chunk_size, context, vocab
        self.device = torch.device("cpu")
        self.mamba_pool: MambaPool | None = None
        self.slots = SlotAllocator(num_tokens, page_size)
        self.requests = RequestTable(max_running_requests, context, self.slots)
        self.rank_memory, self.ranked = [RankMemory(self.requests)], None
        self.stored = np.full(num_tokens + page_size, -1)
        self.batches: list[ForwardBatch] = []
        self.fail: BaseException | None = None

    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        assert batch.num_tokens <= self.chunk_size
        assert len(set(batch.out_cache_loc)) == batch.num_tokens
        assert batch.out_cache_loc.min() >= self.slots.page_size
        self.batches.append(batch)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.stored[batch.out_cache_loc] = batch.input_ids
        prefixes = np.split(batch.prefix_slots, np.cumsum(batch.prefix_lens)[:-1])
        parts = np.split(batch.input_ids, np.cumsum(batch.extend_lens)[:-1])
        logits, logprobs = [], []
        for prefix, new in zip(prefixes, parts, strict=True):
            history = [*self.stored[prefix].tolist(), *new.tolist()]
            assert -1 not in history
            rows = range(len(prefix) + 1, len(history) + 1)
            if batch.logprob_targets is not None:
                logprobs += [self.logits(history[:end]).log_softmax(-1) for end in rows]
            logits.append(self.logits(history))
        values = None
        if batch.logprob_targets is not None:
            targets = torch.from_numpy(batch.logprob_targets)
            values = torch.stack(logprobs).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
            values = values.masked_fill(targets < 0, float("nan"))
        dispatch = Dispatch(None, DispatchReason.DISABLED, batch.num_tokens)
        return ForwardResult(dispatch, torch.stack(logits), values)

    def logits(self, history: list[int]) -> torch.Tensor:
        seed = hash(tuple(history)) % 2**32
        return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, self.vocab_size)).float()

    def expected(self, request: Request) -> list[int]:
        """What the request generates when it runs alone, by a loop that shares nothing."""
        alone = Request(request.ids[: request.prompt_len], request.params, request.max_len)
        alone.seed = request.seed
        while len(alone.ids) < alone.max_len:
            token, _ = sample(self.logits(alone.ids).unsqueeze(0), [alone])[0]
            alone.append(token)
            if request.rule is not None and token in request.rule.end_ids:
                break
        return alone.new_ids

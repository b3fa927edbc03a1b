"""Prompts become requests that fit, or a sentence that says why not.

A request that exists can run: its prompt is checked, and alone in the pool it comes to its end. So
a scheduler never meets one that waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from breakgraph.engine.request import Request, Want
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.stopping import StopRule
from breakgraph.models import CausalLM, SequenceClassifier

if TYPE_CHECKING:
    from breakgraph.runner.model_runner import ModelRunner

ONE_TOKEN = SamplingParams(max_new_tokens=1)


class Admission:
    """Makes requests for one runner, which keep the lists of ids that they are made of.

    Args:
        runner: whose context, pool and chunk size they must fit.
        tokenizer: for stop strings; None for none.
        end_ids: the model's end tokens.
    """

    def __init__(
        self, runner: ModelRunner, tokenizer: Any | None, end_ids: AbstractSet[int]
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._context, self._pool = runner.context_length, runner.slots.num_tokens

    def check_model(self, call: str, want: Want) -> None:
        """Raise ValueError where the engine is not loaded for ``call``."""
        model, is_embedding = self._runner.model, self._runner.args.is_embedding
        if want is Want.POOLED:
            if not is_embedding and not isinstance(model, SequenceClassifier):
                raise ValueError(f"{call} needs --is-embedding; this engine gives logits")
        elif is_embedding:
            raise ValueError(
                f"{call} needs logits, and --is-embedding serves embeddings in their "
                "place; leave the flag out"
            )
        elif not isinstance(model, CausalLM):
            raise ValueError(
                f"{call} needs logits, and {type(model).__name__} has no language-model "
                "head; use embed, with --is-embedding"
            )

    def rule(self, params: SamplingParams) -> StopRule:
        """When a text ends by ``params``. Raises ValueError for stop strings without tokenizer."""
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= self._end_ids
        return StopRule(self._tokenizer, end_ids, params.stop)

    def continuation(
        self,
        ids: list[int],
        params: SamplingParams,
        rule: StopRule,
        name: str = "the prompt",
        **fields: Any,
    ) -> Request:
        """A request for tokens. Raises ValueError, calling the prompt ``name``."""
        self._check_room(len(ids) + 1, name, " and room for a new one")
        max_len = min(
            len(ids) + params.max_new_tokens,
            self._context,
            self._pool + 1,  # the token generated last is never cached
        )
        return Request(ids, params, max_len, rule, **fields)

    def result(
        self,
        ids: list[int],
        want: Want,
        name: str = "the prompt",
        *,
        params: SamplingParams = ONE_TOKEN,
        labels: Sequence[int] = (),
        **fields: Any,
    ) -> Request:
        """A request for the logits or vector of a prompt. Raises ValueError, calling it ``name``.

        Vectors are made of a whole prompt in one forward.
        """
        self._check_room(len(ids), name)
        if want is Want.POOLED and len(ids) > self._runner.chunk_size:
            raise ValueError(
                f"{name} has {len(ids)} tokens; an embedding is made in one forward of at most "
                f"{self._runner.chunk_size}: raise --chunked-prefill-size"
            )
        for label in labels:
            if not 0 <= label < self._runner.vocab_size:
                raise ValueError(
                    f"label token {label} is not in the vocabulary, which has ids 0 to "
                    f"{self._runner.vocab_size - 1}"
                )
        return Request(ids, params, len(ids), want=want, labels=tuple(labels), **fields)

    def _check_room(self, least: int, name: str, room: str = "") -> None:
        context, pool = self._context, self._pool
        if least > context:
            raise ValueError(
                f"{name} needs a context of {least} tokens (its own{room}); the model's is "
                f"{context}"
            )
        if least > pool:
            raise ValueError(
                f"{name} needs a KV cache of {least} tokens (its own{room}); this one holds "
                f"{pool}: raise --max-total-tokens"
            )

"""The offline engine: lists of prompts in, lists of results out, in the same order.

A prompt is checked before anything is taken from a pool, and what a call takes it gives back,
also when it fails: each call finds the pools empty and leaves them so.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from breakgraph.engine.forward_loop import ForwardLoop, dry_run, limits
from breakgraph.engine.planning import Request
from breakgraph.engine.results import GenerateResult, PrefillResult
from breakgraph.engine.sampling import Sampler
from breakgraph.engine.statistics import Statistics
from breakgraph.engine.stopping import StopRule
from breakgraph.engine.tokenization import Prompt, PromptEncoder, end_token_ids, load_tokenizer
from breakgraph.models import CausalLM, SequenceClassifier
from breakgraph.models.checkpoint import read_json
from breakgraph.runner.buckets import Dispatch
from breakgraph.runner.model_runner import ModelRunner
from breakgraph.server_args import ServerArgs


class Engine:
    """A model, its KV pool and, with ``enable_breakable_cuda_graph``, its prefill graphs.

    Calls from several threads take turns. Use it in a ``with`` block, or call ``close``.

    Attributes:
        args: the flags it was made from.
        runner: the model runner; forwards go through it.
        tokenizer: a transformers tokenizer; None with ``skip_tokenizer_init``.
        statistics: what has been done since the start.
    """

    def __init__(self, server_args: ServerArgs | None = None, **flags: Any) -> None:
        """Load the model and capture its graphs.

        Args:
            server_args: the flags as one object, or
            **flags: as keywords, named as the attributes of ``ServerArgs``.

        Raises:
            ValueError: a flag is wrong, or the checkpoint is; the message says which.
            TypeError: both forms are given, or a keyword is no flag.
        """
        if server_args is not None and flags:
            raise TypeError(f"give server_args or keywords, not both: {', '.join(flags)}")
        self.args = ServerArgs(**flags) if server_args is None else server_args
        read_json(Path(self.args.model_path) / "config.json")  # no folder: said before anything
        self.tokenizer = load_tokenizer(self.args)  # seconds: before the weights and the graphs
        self._runner: ModelRunner | None = ModelRunner(self.args)
        runner = self._runner
        self.statistics = Statistics()
        self._encoder = PromptEncoder(self.tokenizer, runner.vocab_size)
        self._end_ids = end_token_ids(self.args.model_path, runner.model.config, self.tokenizer)
        self._sampler = Sampler(runner.device, self.args.random_seed)
        self._lock = threading.Lock()

    @property
    def runner(self) -> ModelRunner:
        if self._runner is None:
            raise RuntimeError("this engine is closed; make a new one")
        return self._runner

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of model, pools and graphs. Closing again does nothing."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None and runner.device.type == "cuda":
            del runner
            gc.collect()
            torch.cuda.empty_cache()

    def prefill(
        self, prompts: str | Iterable[Prompt], return_logprob: bool = False
    ) -> list[PrefillResult]:
        """The logits after each prompt and, if asked, the log-probability of each of its tokens.

        Raises:
            ValueError: a prompt is empty, too long, or holds what is no token; names its index.
        """
        with self._turn("prefill") as runner:
            requests = self._requests(prompts)
            logprobs: list[list[float | None]] = [[None] for _ in requests]  # first: no context
            results: dict[int, PrefillResult] = {}
            with self._loop(runner, requests, logprobs=return_logprob) as loop:
                for step in loop:
                    if return_logprob:
                        for request, values in step.prompt_logprobs():
                            logprobs[request.index] += values
                    dispatch = step.result.dispatch
                    rows = step.rows(step.result.next_token_logits).cpu()
                    for request, logits in zip(step.completed, rows, strict=True):
                        index = request.index
                        results[index] = PrefillResult(
                            next_token_logits=logits,
                            input_token_logprobs=logprobs[index] if return_logprob else None,
                            bucket=dispatch.bucket,
                            reason=dispatch.reason.value,
                        )
                        loop.finish(request)
            return [results[request.index] for request in requests]

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stop: str | Sequence[str] = (),
        *,
        allow_graph: bool = True,
        progress: bool = False,
    ) -> list[GenerateResult]:
        """Continue each prompt until an end token, a stop string or ``max_new_tokens``.

        Args:
            prompts: texts or lists of token ids; a lone text is one prompt.
            max_new_tokens: at least 1; fewer come where the context or the KV pool ends.
            temperature: 0 is greedy; above 0 draws are repeatable by ``--random-seed``.
            stop: the text ends before any of these.
            allow_graph: False runs every prefill eagerly.
            progress: show a bar of prompts answered.

        Raises:
            ValueError: a prompt is empty, leaves no room for a new token, or holds what is no
                token (the message names its index), or another argument is out of range.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        with self._turn("generate") as runner:
            rule = StopRule(self.tokenizer, self._end_ids, stop)
            requests = self._requests(prompts, max_new_tokens)
            prefills: dict[int, Dispatch] = {}
            results: dict[int, GenerateResult] = {}
            bar = tqdm(total=len(requests), unit="prompt", disable=not progress)
            with bar, self._loop(runner, requests, allow_graph=allow_graph) as loop:
                for step in loop:
                    if not step.completed:
                        continue
                    logits = step.rows(step.result.next_token_logits)
                    tokens = self._sampler(logits, temperature)
                    self.statistics.generated_tokens += len(tokens)
                    for request, token in zip(step.completed, tokens, strict=True):
                        if step.is_prefill:
                            prefills[request.index] = step.result.dispatch
                        request.ids.append(token)
                        new = request.ids[request.prompt_len :]
                        # The last token is never cached, so a full reserve is one behind.
                        full = len(request.ids) > request.max_cached
                        reason = rule.check(new, full)
                        if reason is None:
                            continue
                        dispatch = prefills[request.index]
                        results[request.index] = GenerateResult(
                            text=rule.text(new),
                            token_ids=new,
                            prompt_tokens=request.prompt_len,
                            finish_reason=reason,
                            bucket=dispatch.bucket,
                            reason=dispatch.reason.value,
                        )
                        loop.finish(request)
                        bar.update()
            return [results[request.index] for request in requests]

    def embed(self, prompts: str | Iterable[Prompt]) -> torch.Tensor:
        """A vector per prompt (or its class logits): float32 ``[num_prompts, size]``, on the CPU.

        Raises:
            ValueError: a prompt is empty, holds what is no token, or is longer than one forward
                (``--chunked-prefill-size``); the message names its index.
        """
        with self._turn("embed") as runner:
            requests = self._requests(prompts)
            for request in requests:
                if request.prompt_len > runner.chunk_size:
                    raise ValueError(
                        f"prompt {request.index} has {request.prompt_len} tokens; an embedding is "
                        f"made in one forward of at most {runner.chunk_size}: raise "
                        "--chunked-prefill-size"
                    )
            vectors: dict[int, torch.Tensor] = {}
            with self._loop(runner, requests) as loop:
                for step in loop:
                    rows = step.rows(step.result.pooled).cpu()
                    for request, vector in zip(step.completed, rows, strict=True):
                        vectors[request.index] = vector
                        loop.finish(request)
            ordered = [vectors[request.index] for request in requests]
            return torch.stack(ordered) if ordered else torch.empty(0, 0)

    def explain(self, prompts: str | Iterable[Prompt]) -> str:
        """How the prefill of ``prompts`` would run: a paragraph per forward; runs none."""
        with self._turn("explain") as runner:
            batches = dry_run(self._requests(prompts), limits(runner))
            return "\n\n".join(runner.explain(batch) for batch in batches)

    @contextmanager
    def _turn(self, call: str) -> Iterator[ModelRunner]:
        """The runner, for one call at a time; refuses a call that it is not loaded for."""
        with self._lock:
            model = self.runner.model
            if call in ("prefill", "generate"):
                if self.args.is_embedding:
                    raise ValueError(
                        f"{call} needs logits, and --is-embedding serves embeddings in their "
                        "place; leave the flag out"
                    )
                if not isinstance(model, CausalLM):
                    raise ValueError(
                        f"{call} needs logits, and {type(model).__name__} has no language-model "
                        "head; use embed, with --is-embedding"
                    )
            elif call == "embed" and not (
                self.args.is_embedding or isinstance(model, SequenceClassifier)
            ):
                raise ValueError("embed needs --is-embedding; this engine gives logits")
            yield self.runner

    def _loop(self, runner: ModelRunner, requests: Sequence[Request], **how: bool) -> ForwardLoop:
        return ForwardLoop(runner, requests, self.statistics, **how)

    def _requests(self, prompts: str | Iterable[Prompt], new_tokens: int = 0) -> list[Request]:
        """Checked requests that leave room for at least one of ``new_tokens``, if any."""
        context, pool = self.runner.context_length, self.runner.slots.num_tokens
        requests = []
        for index, ids in enumerate(self._encoder.encode(prompts)):
            least = len(ids) + min(new_tokens, 1)
            room = " and room for a new one" if new_tokens else ""
            if least > context:
                raise ValueError(
                    f"prompt {index} needs a context of {least} tokens (its own{room}); the "
                    f"model's is {context}"
                )
            if least > pool:
                raise ValueError(
                    f"prompt {index} needs a KV cache of {least} tokens (its own{room}); this one "
                    f"holds {pool}: raise --max-total-tokens"
                )
            # The token sampled last is never cached, hence one less of the text.
            most = min(len(ids) + new_tokens, context, pool + 1) - 1 if new_tokens else len(ids)
            requests.append(Request(index, ids, len(ids), max_cached=most))
        return requests

"""The offline engine: lists of prompts in, lists of results out, in the same order.

A prompt is checked before anything is taken from a pool, and what a call takes it gives back,
also when it fails: each call finds the pools empty and leaves them so. Prefixes are shared among
the prompts of one call, so what a call gives does not depend on those before it.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from breakgraph.distributed import CollectiveError
from breakgraph.distributed.lockstep import follow
from breakgraph.distributed.ranks import Ranks, start_ranks
from breakgraph.engine.admission import Admission
from breakgraph.engine.data_parallel import RankedScheduler, make_scheduler
from breakgraph.engine.dry_run import dry_run
from breakgraph.engine.request import Request, Want
from breakgraph.engine.results import GenerateResult, PrefillResult
from breakgraph.engine.sampling_params import SamplingParams
from breakgraph.engine.scheduler import Scheduler
from breakgraph.engine.statistics import Statistics
from breakgraph.engine.stopping import TextStream
from breakgraph.engine.tokenization import Prompt, PromptEncoder, end_token_ids, load_tokenizer
from breakgraph.models.checkpoint import read_json
from breakgraph.models.transformers_impl import TransformersModel
from breakgraph.runner.model_runner import ModelRunner
from breakgraph.server_args import ServerArgs


class Engine:
    """A model, its KV pool and, with ``enable_breakable_cuda_graph``, its prefill graphs.

    Calls from several threads take turns. Use it in a ``with`` block, or call ``close``.

    Attributes:
        args: the flags it was made from.
        runner: the model runner; forwards go through it.
        tokenizer: a transformers tokenizer; None with ``skip_tokenizer_init``.
        encoder: checks prompts.
        statistics: what has been done since the start.
    """

    def __init__(
        self,
        server_args: ServerArgs | None = None,
        *,
        model: TransformersModel | None = None,
        tokenizer: Any | None = None,
        **flags: Any,
    ) -> None:
        """Load the model and capture its graphs.

        Args:
            server_args: the flags as one object, or
            model, tokenizer: those to use, in place of what the flags name; see ``wrap``.
            **flags: as keywords, named as the attributes of ``ServerArgs``.

        Raises:
            ValueError: a flag is wrong, or the checkpoint is; the message says which.
            TypeError: both forms are given, or a keyword is no flag.
        """
        if server_args is not None and flags:
            raise TypeError(f"give server_args or keywords, not both: {', '.join(flags)}")
        self.args = ServerArgs(**flags) if server_args is None else server_args
        if model is None:
            read_json(Path(self.args.model_path) / "config.json")  # no folder: said before all
        elif self.args.tp_size > 1:
            raise ValueError("a model that is loaded already cannot be divided; leave out tp_size")
        self._ranks = start_ranks(self.args)
        try:
            # Seconds: before the weights and the graphs.
            self.tokenizer = load_tokenizer(self.args) if tokenizer is None else tokenizer
            runner = self._make_runner(model)
        except BaseException:
            self._ranks.close(agreed=False)
            raise
        self._runner: ModelRunner | None = runner
        self.statistics = Statistics()
        self.encoder = PromptEncoder(self.tokenizer, runner.vocab_size)
        end_ids = end_token_ids(self.args.model_path, runner.model.config, self.tokenizer)
        if model is not None:
            end_ids = model.end_token_ids or end_ids
        self._admission: Admission | None = Admission(runner, self.tokenizer, end_ids)
        self._scheduler: Scheduler | RankedScheduler | None = make_scheduler(
            runner,
            cache_prefixes=not self.args.disable_radix_cache,
            random_seed=self.args.random_seed,
            statistics=self.statistics,
        )
        self._lock = threading.Lock()
        if self._ranks.watch is not None:
            atexit.register(self.close)  # a script may forget, and ranks end together

    def _make_runner(self, model: TransformersModel | None) -> ModelRunner:
        """This rank's; one that torchrun started to follow another does so now, and exits."""
        ranks: Ranks = self._ranks
        try:
            runner = ModelRunner(self.args, model=model, ranks=ranks)
        except CollectiveError as error:
            if ranks.watch is None:
                raise
            raise ranks.watch.explain(error) from error
        if ranks.watch is not None:
            ranks.watch.busy = False
        if not ranks.group.is_first:
            follow(ranks, runner)
            ranks.close()
            raise SystemExit(0)
        return runner

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
        atexit.unregister(self.close)
        with self._lock:
            runner, self._runner = self._runner, None
            self._admission = self._scheduler = None
        if runner is not None:
            runner.stop_ranks()
        if runner is not None and runner.device.type == "cuda":
            del runner
            gc.collect()
            torch.cuda.empty_cache()

    def prefill(
        self, prompts: str | Iterable[Prompt], return_logprob: bool = False
    ) -> list[PrefillResult]:
        """The logits after each prompt and, if asked, the log-probability of each of its tokens.

        Every prompt is computed whole, also where it begins like another.

        Raises:
            ValueError: a prompt is empty, too long, or holds what is no token; names its index.
        """
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=return_logprob)
        with self._turn("prefill", Want.LOGITS) as admission:
            requests = [
                admission.result(ids, Want.LOGITS, name, params=params, use_cache=False)
                for name, ids in self._named(prompts)
            ]
            self._run(requests)
        results = []
        for request in requests:
            if request.vector is None or request.dispatch is None:
                raise RuntimeError("a prefill ended without its logits: a bug in the scheduler")
            results.append(
                PrefillResult(
                    next_token_logits=request.vector,
                    # The first has no context.
                    input_token_logprobs=[None, *request.prompt_logprobs]
                    if return_logprob
                    else None,
                    bucket=request.dispatch.bucket,
                    reason=request.dispatch.reason.value,
                )
            )
        return results

    def generate(
        self,
        prompts: str | Iterable[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stop: str | Sequence[str] = (),
        *,
        sampling_params: SamplingParams | None = None,
        allow_graph: bool = True,
        progress: bool = False,
    ) -> list[GenerateResult]:
        """Continue each prompt until an end token, a stop string or ``max_new_tokens``.

        Args:
            prompts: texts or lists of token ids; a lone text is one prompt.
            max_new_tokens: at least 1; fewer come where the context or the KV pool ends.
            temperature: 0 is greedy; above 0 draws are repeatable by ``--random-seed``.
            stop: the text ends before any of these.
            sampling_params: all that can be asked, in place of the three above.
            allow_graph: False runs every forward eagerly.
            progress: show a bar of prompts answered.

        Raises:
            ValueError: a prompt is empty, leaves no room for a new token, or holds what is no
                token (the message names its index), or another argument is out of range.
        """
        params = sampling_params or SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        with self._turn("generate", Want.TOKENS) as admission:
            rule = admission.rule(params)
            requests = [
                admission.continuation(ids, params, rule, name, allow_graph=allow_graph)
                for name, ids in self._named(prompts)
            ]
            self._run(requests, progress)
        return [self._result(request) for request in requests]

    def _result(self, request: Request) -> GenerateResult:
        dispatch, rule, reason = request.dispatch, request.rule, request.finish_reason
        if dispatch is None or rule is None or (reason != "stop" and reason != "length"):
            raise RuntimeError(f"a generation ended by {reason}: a bug in the scheduler")
        text = TextStream(self.tokenizer, rule).push(request.new_ids, finished=True)
        return GenerateResult(
            text=None if self.tokenizer is None else text,
            token_ids=request.new_ids,
            prompt_tokens=request.prompt_len,
            cached_tokens=request.cached_tokens,
            finish_reason=reason,
            bucket=dispatch.bucket,
            reason=dispatch.reason.value,
            logprobs=request.logprobs if request.params.logprobs is not None else None,
            prompt_logprobs=[None, *request.prompt_logprobs]
            if request.params.prompt_logprobs
            else None,
        )

    def embed(self, prompts: str | Iterable[Prompt]) -> torch.Tensor:
        """A vector per prompt (or its class logits): float32 ``[num_prompts, size]``, on the CPU.

        Raises:
            ValueError: a prompt is empty, holds what is no token, or is longer than one forward
                (``--chunked-prefill-size``); the message names its index.
        """
        with self._turn("embed", Want.POOLED) as admission:
            requests = [
                admission.result(ids, Want.POOLED, name, use_cache=False)
                for name, ids in self._named(prompts)
            ]
            self._run(requests)
        vectors = [request.vector for request in requests if request.vector is not None]
        return torch.stack(vectors) if vectors else torch.empty(0, 0)

    def explain(self, prompts: str | Iterable[Prompt]) -> str:
        """How the prefill of ``prompts`` would run: a paragraph per forward; runs none."""
        runner, admission = self.runner, self._admission
        if admission is None:
            return ""
        requests = [admission.result(ids, Want.NOTHING, name) for name, ids in self._named(prompts)]
        return "\n\n".join(runner.explain(batch) for batch in dry_run(runner, requests))

    @contextmanager
    def _turn(self, call: str, want: Want) -> Iterator[Admission]:
        """What makes requests, for one call at a time; refuses a call it is not loaded for."""
        with self._lock:
            yield self.admission(call, want)

    def admission(self, call: str, want: Want) -> Admission:
        """What makes requests. Raises ValueError where the engine is not loaded for ``call``."""
        if self._admission is None:
            raise RuntimeError("this engine is closed; make a new one")
        self._admission.check_model(call, want)
        return self._admission

    def _named(self, prompts: str | Iterable[Prompt]) -> list[tuple[str, list[int]]]:
        """Checked token ids, each with what messages call its prompt."""
        return [(f"prompt {i}", ids) for i, ids in enumerate(self.encoder.encode(prompts))]

    def _run(self, requests: Sequence[Request], progress: bool = False) -> None:
        """Run all requests to their ends; raises what a forward raised."""
        scheduler = self._scheduler
        if scheduler is None:
            raise RuntimeError("this engine is closed; make a new one")
        try:
            for request in requests:
                scheduler.add(request)
            with tqdm(total=len(requests), unit="prompt") if progress else nullcontext() as bar:
                while scheduler.has_work:
                    for update in scheduler.step():
                        if update.request.error is not None:
                            raise update.request.error
                        if bar is not None:
                            bar.update(update.request.finish_reason is not None)
            scheduler.verify()
        finally:
            scheduler.abort_all()
            scheduler.forget()

"""The engine as a model of EleutherAI's lm-evaluation-harness, under the name ``breakgraph``.

What the harness asks in texts is asked of the engine in the very tokens that its own calls make of
them, so both give the same answers. Needs the extra ``eval``; importing this registers the name.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from breakgraph import __version__
from breakgraph.engine import Engine, SamplingParams
from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)

Scored: TypeAlias = tuple[list[int], int, list[float | None]]
"""Tokens, where the continuation begins, and the log-probability of each token."""

MAX_GEN_TOKS = 256  # the harness's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "n": 1}  # these values change nothing
# Each prompt's result holds a row of logits: 256 rows of 150,000 tokens are 0.15 GB.
BATCH = 256
# A token of more than half the probability is the likeliest; the rest of 0.3 % is for rounding.
SURELY_LIKELIEST = math.log(0.5) + 0.003


@register_model("breakgraph")
class BreakgraphLM(TemplateLM):
    """``lm_eval.simple_evaluate(model="breakgraph", model_args={"model_path": ...})``.

    Attributes:
        engine: answers all requests; batches are of its own making.
        tokenizer: the engine's.
    """

    def __init__(
        self,
        *,
        engine: Engine | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        **flags: Any,
    ) -> None:
        """Load the model.

        Args:
            engine: take this one; the caller closes it.
            batch_size: given by the harness and of no effect; see ``max_running_requests``.
            max_batch_size: the same.
            chat_template_args: options for the chat template.
            enable_thinking: the option of this name.
            **flags: attributes of ``ServerArgs``, of which ``model_path`` is required.

        Raises:
            ValueError: a flag is wrong or unknown, or there is no tokenizer.
        """
        super().__init__()
        if engine is not None and flags:
            raise ValueError(f"give an engine or flags, not both: {', '.join(flags)}")
        self.engine = Engine(_server_args(flags)) if engine is None else engine
        self.tokenizer: Any = self.engine.tokenizer
        if self.tokenizer is None:
            raise ValueError("lm-eval asks in texts; leave out --skip-tokenizer-init")
        self._device = self.engine.runner.device
        self._template: str | None = None
        self._chat_options = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._chat_options["enable_thinking"] = enable_thinking
        self._special = {
            str(token): number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    # Tokens.

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        runner = self.engine.runner
        return min(runner.context_length, runner.slots.num_tokens)

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context. Raises ValueError where there is none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            "a text without context needs a token before it, and this tokenizer has neither a "
            "beginning nor an end token"
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a prompt as the engine makes them.

        By default with the special tokens that the tokenizer adds, unless the text begins with
        one already, as chat templates write it.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    # Log-probabilities.

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Per request the continuation's log-probability, and whether greedy decoding gives it."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        scored = list(self._score(pairs, disable_tqdm))
        likeliest = self._likeliest(scored)
        answers = [(_total(one), greedy) for one, greedy in zip(scored, likeliest, strict=True)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Per text its log-probability, in windows of ``max_length`` that overlap by one token.

        The last window is as long as the others and scores only what they left.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += _total(one)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Context and continuation, the first cut on its left to what the model can take."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens leaves no room for its context; "
                f"prompt and continuation have {self.max_length} tokens together"
            )
        if len(context) > room:
            logger.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], continuation

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> Iterator[Scored]:
        """Each pair by one prefill of both its parts."""
        with tqdm(total=len(pairs), unit="prompt", disable=disable_tqdm) as bar:
            for begin in range(0, len(pairs), BATCH):
                batch = pairs[begin : begin + BATCH]
                whole = [context + continuation for context, continuation in batch]
                results = self.engine.prefill(whole, return_logprob=True)
                for (context, _), ids, result in zip(batch, whole, results, strict=True):
                    yield ids, len(context), result.input_token_logprobs or []
                bar.update(len(batch))

    def _likeliest(self, scored: Sequence[Scored]) -> list[bool]:
        """Whether each token of a continuation is the likeliest behind those before it.

        The log-probabilities tell it of most. Behind the others' prefixes the engine takes one
        greedy token, of each continuation the first in doubt, then the next of those that held:
        few, since a token of less than half the probability seldom is the likeliest.
        """
        right = [True] * len(scored)
        doubts: dict[int, list[int]] = {}
        for number, (ids, start, logprobs) in enumerate(scored):
            places = range(start, len(ids))
            doubts[number] = [p for p in places if not _is_sure(logprobs[p])][::-1]
        while doubts := {number: places for number, places in doubts.items() if places}:
            asked = {number: places.pop() for number, places in doubts.items()}
            prefixes = {tuple(scored[number][0][:place]) for number, place in asked.items()}
            order = sorted(prefixes)  # those that begin alike follow one another in the cache
            results = self.engine.generate(
                order, sampling_params=SamplingParams(max_new_tokens=1, temperature=0.0)
            )
            found = {p: one.token_ids[0] for p, one in zip(order, results, strict=True)}
            for number, place in asked.items():
                ids = scored[number][0]
                if found[tuple(ids[:place])] != ids[place]:
                    right[number] = False
                    del doubts[number]
        return right

    # Texts.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text per request, up to the first of its ``until`` strings or an end token."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            how = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(how, []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            params = self._sampling_params(requests[numbers[0]].args[1])
            results = self.engine.generate(
                [self._prompt(requests[n].args[0], params.max_new_tokens) for n in numbers],
                sampling_params=params,
                progress=not disable_tqdm,
            )
            for number, result in zip(numbers, results, strict=True):
                texts[number] = result.text or ""
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        """A prompt's tokens; of one that leaves no room for a new token, the end alone."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(ids) >= self.max_length:
            kept = max(self.max_length - max_new_tokens, self.max_length // 2, 1)
            logger.warning("a prompt of %d tokens is cut to its last %d", len(ids), kept)
            return ids[-kept:]
        return ids

    def _sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """A task's ``generation_kwargs``. Raises ValueError where one would have no effect."""
        given = {name: value for name, value in given.items() if value is not None}
        until = given.pop("until", [])
        until = [until] if isinstance(until, str) else until
        # Special tokens show as no text, so that their names never stop one.
        stop_token_ids = tuple(self._special[word] for word in until if word in self._special)
        stop = tuple(word for word in until if word and word not in self._special)
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        do_sample = given.pop("do_sample", None)
        temperature = float(given.pop("temperature", 1.0 if do_sample else 0.0))
        options = {name: given.pop(name) for name in SAMPLING if name in given}
        for name, value in given.items():
            if name not in NEUTRAL or value != NEUTRAL[name]:
                raise ValueError(
                    f"generation_kwargs: {name}={value!r} is nothing this engine can do; it takes "
                    f"until, do_sample, temperature, {', '.join((LENGTHS[0], *SAMPLING))}"
                )
        return SamplingParams(
            max_new_tokens=int(lengths[0]) if lengths else MAX_GEN_TOKS,
            temperature=0.0 if do_sample is False else temperature,
            stop=stop,
            stop_token_ids=stop_token_ids,
            **options,
        )

    # Chat.

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text in use: of ``--chat-template``, else the tokenizer's, if need be by name.

        None where the harness asks without one or there is none.
        """
        path = self.engine.args.chat_template
        if not chat_template:
            return None
        if path is not None:
            self._template = Path(path).read_text(encoding="utf-8")
        else:
            self._template = super().chat_template(chat_template)
        return self._template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A prompt's text. Raises ValueError where there is no template."""
        template = self._template or self.chat_template(True)
        if template is None:
            raise ValueError(
                "this model's tokenizer has no chat template; give the model argument "
                "chat_template=FILE.jinja, or leave out --apply_chat_template"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_options | {"chat_template": template},
        )

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        args = self.engine.args
        return (args.tokenizer_path or args.model_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's report adds: the model, and how many prefills were replayed."""
        done = self.engine.statistics
        return {
            "model_name": self.engine.args.model_path,
            "model_dtype": str(self.engine.runner.dtype),
            "breakgraph": __version__,
            "prefills": done.prefills,
            "prefills_replayed": done.replays,
        }


def _total(scored: Scored) -> float:
    _, start, logprobs = scored
    return sum(one for one in logprobs[start:] if one is not None)


def _is_sure(logprob: float | None) -> bool:
    return logprob is not None and logprob > SURELY_LIKELIEST


def _server_args(flags: dict[str, Any]) -> ServerArgs:
    """The flags that ``--model_args`` and ``--device`` give. Raises ValueError."""
    known = [field.name for field in fields(ServerArgs)]
    for name in flags:
        if name not in known:
            close = get_close_matches(name, known, n=1) if name != "pretrained" else ["model_path"]
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown model argument {name}{hint}")
    if "model_path" not in flags:
        raise ValueError("the model argument model_path is required")
    if flags.get("device") == "cuda:0":  # what the harness says where nobody said anything
        flags["device"] = "auto"
    return ServerArgs(**flags)

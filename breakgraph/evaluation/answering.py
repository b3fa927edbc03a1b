"""Who answers: the engine in this process, or any server of OpenAI's API.

Both give the same `Answer`, in the order of the prompts: grading and comparing know neither.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from breakgraph.evaluation.chat import Chat

if TYPE_CHECKING:
    from breakgraph.engine import Engine

Token = int | str
TRIES = 4
BUSY = (429, 502, 503)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A text and how it came.

    Attributes:
        text: up to the stop.
        completion_tokens: tokens generated; 0 where a server does not say.
        finish_reason: as the engine or the server gives it.
        seconds: from request to answer; None in process, where all run together.
        prefill: the bucket and reason of the prompt's prefill, where known.
        tokens: the generated tokens: ids in process, texts from a server; None where not asked for.
        logprobs: of ``tokens``.
        top: per token the log-probabilities of the likeliest ones.
    """

    text: str
    completion_tokens: int
    finish_reason: str | None
    seconds: float | None = None
    prefill: dict[str, Any] = field(default_factory=dict)
    tokens: list[Token] | None = None
    logprobs: list[float] | None = None
    top: list[dict[Token, float]] | None = None


class Answerer(Protocol):
    """Answers prompts greedily."""

    def answer(self, prompts: Sequence[str], title: str) -> list[Answer]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What is asked of every answer."""

    max_new_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None = None
    chat: Chat | None = None


class EngineAnswerer:
    """The engine in this process; ``replayed`` and ``prefills`` count the forwards of its calls."""

    def __init__(self, engine: Engine, asking: Asking, *, allow_graph: bool = True) -> None:
        self._engine, self._asking, self._allow_graph = engine, asking, allow_graph
        self.replayed = self.prefills = 0

    def answer(self, prompts: Sequence[str], title: str) -> list[Answer]:
        from breakgraph.engine.sampling_params import SamplingParams

        engine, asking = self._engine, self._asking
        before = engine.statistics.replays, engine.statistics.prefills
        results = engine.generate(
            prompts if asking.chat is None else asking.chat.encode(engine, prompts),
            sampling_params=SamplingParams(
                max_new_tokens=asking.max_new_tokens,
                temperature=0.0,
                stop=asking.stop,
                logprobs=asking.logprobs,
            ),
            allow_graph=self._allow_graph,
            progress=True,
        )
        self.replayed += engine.statistics.replays - before[0]
        self.prefills += engine.statistics.prefills - before[1]
        return [
            Answer(
                text=result.text or "",
                completion_tokens=len(result.token_ids),
                finish_reason=result.finish_reason,
                prefill={"bucket": result.bucket, "reason": result.reason},
                tokens=None if result.logprobs is None else list(result.token_ids),
                logprobs=None if result.logprobs is None else [o.logprob for o in result.logprobs],
                top=None if result.logprobs is None else [dict(o.top) for o in result.logprobs],
            )
            for result in results
        ]


class ServerAnswerer:
    """A server of OpenAI's API, asked by several threads.

    Raises:
        RuntimeError: it cannot be reached or refuses; the message has its own words.
    """

    def __init__(
        self,
        base_url: str,
        asking: Asking,
        *,
        num_threads: int,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self._url.startswith(("http://", "https://")):
            raise ValueError(f"{base_url} is no address; write http://HOST:PORT")
        self._asking, self._threads, self._timeout = asking, num_threads, timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model = model or self._call("/models")["data"][0]["id"]

    def answer(self, prompts: Sequence[str], title: str) -> list[Answer]:
        with (
            ThreadPoolExecutor(self._threads) as pool,
            tqdm(total=len(prompts), unit="prompt", desc=title) as bar,
        ):

            def ask(prompt: str) -> Answer:
                answer = self._answer(prompt)
                bar.update()
                return answer

            try:
                return list(pool.map(ask, prompts))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or the first failure waits for all
                raise

    def _answer(self, prompt: str) -> Answer:
        asking, start = self._asking, time.perf_counter()
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "n": 1}
        body["max_tokens"] = asking.max_new_tokens
        if asking.stop:
            body["stop"] = list(asking.stop)
        if asking.chat is not None:
            body |= asking.chat.body(prompt)
            if asking.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": asking.logprobs}
        else:
            body["prompt"] = prompt
            if asking.logprobs is not None:
                body["logprobs"] = asking.logprobs
        path = "/completions" if asking.chat is None else "/chat/completions"
        reply = self._call(path, body)
        try:
            choice = reply["choices"][0]
            text = choice["text"] if asking.chat is None else choice["message"]["content"]
            return Answer(
                text=text or "",
                completion_tokens=(reply.get("usage") or {}).get("completion_tokens", 0),
                finish_reason=choice.get("finish_reason"),
                seconds=time.perf_counter() - start,
                prefill=choice.get("prefill") or {},
                **_logprobs(choice.get("logprobs")),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"{self._url}{path} answered what is no completion: {str(reply)[:200]}"
            ) from error

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:500]
                if last or error.code not in BUSY:
                    said = f"{self._url}{path} refused with {error.code}: {text}"
                    raise RuntimeError(said) from error
            except (OSError, json.JSONDecodeError) as error:
                if last or isinstance(error, json.JSONDecodeError) or body is None:
                    said = f"{self._url}{path} gives no answer: {error}; is a server there?"
                    raise RuntimeError(said) from error
            time.sleep(2**attempt)
        raise AssertionError("the last try returns or raises")


def _logprobs(given: dict[str, Any] | None) -> dict[str, Any]:
    """Tokens and log-probabilities of a completion's or a chat's choice."""
    if not given:
        return {}
    if "content" in given:
        content = given["content"] or []
        return {
            "tokens": [one["token"] for one in content],
            "logprobs": [one["logprob"] for one in content],
            "top": [
                {top["token"]: top["logprob"] for top in one.get("top_logprobs") or ()}
                for one in content
            ],
        }
    tokens = given["tokens"]
    return {
        "tokens": tokens,
        "logprobs": given["token_logprobs"],
        "top": given.get("top_logprobs") or [{} for _ in tokens],
    }

"""Between texts and tokens, on a thread of its own: a long prompt delays no other connection.

One thread, because a tokenizer is not made for two; the event loop waits for none of its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from breakgraph.engine.tokenization import PromptEncoder
from breakgraph.server.errors import ApiError, refusals

T = TypeVar("T")

# A text that cannot fit is refused for the tokens of its first characters, this many for each
# token of the context: 3 MB of words take 7 s to encode, and others would wait behind them.
PROBE = 16


class Text:
    """Encodes prompts, renders chats and shows single tokens.

    Args:
        tokenizer: a transformers tokenizer; None takes and gives token ids only.
        vocab_size: every id is below it.
        context_length: most tokens of a prompt.
        chat_template: file with a Jinja template; None takes the tokenizer's own.

    Raises:
        OSError: the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        vocab_size: int,
        context_length: int,
        chat_template: str | None,
    ) -> None:
        self.tokenizer, self._context = tokenizer, context_length
        self._encoder = PromptEncoder(tokenizer, vocab_size)
        self._template = getattr(tokenizer, "chat_template", None)
        if chat_template is not None:
            self._template = Path(chat_template).read_text(encoding="utf-8")
        self._thread = ThreadPoolExecutor(1, "breakgraph-tokenizer")
        self.token = lru_cache(1 << 16)(self._token)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, prompts: Sequence[str | list[int]], param: str) -> list[list[int]]:
        """Checked token ids of each prompt; ``param`` is the field they came in."""
        with refusals(param):
            if not any(isinstance(prompt, str) for prompt in prompts):
                return self._encoder.encode(prompts)  # a check alone is sooner done than handed on
            return await self._run(partial(self._encode, prompts))

    async def encode_pairs(self, query: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the query with each text, joined as the tokenizer joins pairs."""
        tokenizer = self._needed("rerank")

        def encode() -> list[list[int]]:
            for text in (query, *texts):
                self._probe(text)
            return tokenizer([query] * len(texts), list(texts))["input_ids"]

        return await self._run(encode)

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._needed("tokenize")
        return await self._run(partial(self._ids, tokenizer, text, add_special_tokens))

    async def chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """The prompt of a chat: its messages in the template, and the assistant's turn begun."""
        tokenizer = self._needed("chat")
        if self._template is None:
            raise ApiError(
                400,
                "this model's tokenizer has no chat template: start the server with "
                "--chat-template FILE.jinja, or use /v1/completions",
                code="no_chat_template",
            )
        options = {"add_generation_prompt": True} | options
        if taken := {"tokenize", "chat_template", "conversation"} & set(options):
            raise ApiError(
                400,
                f"{min(taken)} is not for the template to decide; leave it out",
                param="chat_template_kwargs",
            )

        options |= {"chat_template": self._template, "tokenize": False}
        render = partial(tokenizer.apply_chat_template, messages, **options)
        try:
            text = await self._run(render)
        except Exception as error:  # a template raises what it likes, Jinja's errors among it
            message = f"the chat template refused these messages: {error}"
            raise ApiError(400, message, param="messages") from error
        return await self._run(partial(self._ids, tokenizer, text, False))

    def decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        for prompt in prompts:
            if isinstance(prompt, str):
                self._probe(prompt)
        return self._encoder.encode(prompts)

    def _ids(self, tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
        self._probe(text)
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _probe(self, text: str) -> None:
        """Refuse a text that is sure to be too long, by its beginning."""
        begin = PROBE * self._context
        if self.tokenizer is None or len(text) <= begin:
            return
        if len(self.tokenizer(text[:begin])["input_ids"]) > 2 * self._context:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters; the model's context is "
                f"{self._context} tokens",
                code="context_length_exceeded",
            )

    def _token(self, token_id: int) -> str:
        """One token as text; the vocabulary's own spelling where it is no whole character."""
        if self.tokenizer is None:
            return str(token_id)
        text: str = self.tokenizer.decode([token_id])
        return self.tokenizer.convert_ids_to_tokens(token_id) or text if "\ufffd" in text else text

    def _needed(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ApiError(
                400, f"{what} needs a tokenizer, and --skip-tokenizer-init left this server without"
            )
        return self.tokenizer

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

"""A prompt as a user's turn of a chat, the same in process and at a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from breakgraph.engine import Engine


@dataclass(frozen=True, slots=True)
class Chat:
    """``options`` reach the chat template, such as ``{"enable_thinking": false}``."""

    options: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str) -> dict[str, Any]:
        """The fields of a chat completion's request."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        return body | ({"chat_template_kwargs": self.options} if self.options else {})

    def encode(self, engine: Engine, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids by the template of the tokenizer, or of ``--chat-template``."""
        tokenizer, path = engine.tokenizer, engine.args.chat_template
        template = getattr(tokenizer, "chat_template", None)
        if path is not None:
            template = Path(path).read_text(encoding="utf-8")
        if tokenizer is None or template is None:
            raise ValueError(
                "--chat: this model's tokenizer has no chat template; give --chat-template "
                "FILE.jinja, or leave out --chat"
            )
        options = self.options | {"chat_template": template, "tokenize": False}
        options |= {"add_generation_prompt": True}
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
            for prompt in prompts
        ]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

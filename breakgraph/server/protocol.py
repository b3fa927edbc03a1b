"""What requests may say. Types are strict, fields we do not know are ignored, and fields that we
know and cannot honour are refused: nothing that would change an answer is dropped in silence.

Ranges are checked where they matter, by ``SamplingParams`` and by the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _texts_or_ids(value: Any) -> list[str] | list[list[int]]:
    """One or several texts, or one or several lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(type(item) is list and item for item in value) and all(
            type(token) is int for item in value for token in item
        ):
            return value
    raise ValueError(
        "give a text, a list of texts, a list of token ids or a list of lists of token ids"
    )


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value


Prompts = Annotated[list[Any], BeforeValidator(_texts_or_ids)]
Strings = Annotated[list[str], BeforeValidator(_strings)]


class Body(BaseModel):
    """Any request."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None


class StreamOptions(BaseModel):
    """``include_usage``: one more chunk at the end, with the tokens counted."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class Generation(Body):
    """What completions and chat completions share."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Strings | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Fields that change the answer and that this server cannot honour."""
        if isinstance(values, dict):
            refused = [name for name in UNSUPPORTED if values.get(name)]
            if values.get("best_of") not in (None, values.get("n") or 1):
                refused.append("best_of")
            if values.get("response_format") not in (None, {"type": "text"}):
                refused.append("response_format")
            if refused:
                raise ValueError(f"{refused[0]} is not supported by this server; leave it out")
        return values


UNSUPPORTED = ("suffix", "logit_bias", "tools", "functions", "use_beam_search", "audio")


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None


class Message(BaseModel):
    """A turn of a chat; fields beyond these reach the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = {}


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None


class ScoreRequest(Body):
    """``POST /v1/score``: how likely each label follows the query and each item."""

    query: str | list[int]
    items: Prompts
    label_token_ids: Annotated[list[int], Field(min_length=1)]
    apply_softmax: bool = False
    item_first: bool = False


class RerankRequest(Body):
    """``POST /v1/rerank``."""

    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class ClassifyRequest(Body):
    """``POST /classify``."""

    input: Prompts


class TokenizeRequest(Body):
    """``POST /tokenize``."""

    prompt: str
    add_special_tokens: bool = True


class ExplainRequest(Body):
    """``POST /explain``: prompts, or only how long they would be."""

    prompt: Prompts | None = None
    num_tokens: list[Annotated[int, Field(ge=1)]] | None = None

    @model_validator(mode="after")
    def _one(self) -> ExplainRequest:
        if bool(self.prompt) == bool(self.num_tokens):
            raise ValueError("give either prompt or num_tokens")
        return self

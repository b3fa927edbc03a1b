"""A loaded transformers model, taken apart, recorded, and compared with itself.

A model is handed over only after a packed batch with a cached prefix gave what the class gives
for each sequence alone: what the recording cannot see (a convolution over neighbours, a position
bias of the class's own) shows there, before anything is served.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.attention import TorchNativeBackend
from breakgraph.forward import ForwardBatch, LayerInputs, forward_context
from breakgraph.models.checkpoint import ModelLoadError
from breakgraph.models.transformers_impl.classifier import TransformersClassifier
from breakgraph.models.transformers_impl.fusing import fuse
from breakgraph.models.transformers_impl.interface import Switches, register
from breakgraph.models.transformers_impl.model import (
    Parts,
    TransformersCausalLM,
    TransformersModel,
)
from breakgraph.models.transformers_impl.record import line_of, make_layers, record_calls

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (11, 7)
"""Tokens of the two sequences that a model is compared with itself on."""

LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative to the class's own result; half precision, where a near tie may send a token to
another expert, is allowed 0.3. A model that is run wrongly is about 1 off."""


def wrap_model(model: Any, *, fuse_parts: bool = True) -> TransformersModel:
    """A model that runners take, over the weights of ``model``, which is put in evaluation mode.

    Args:
        model: a loaded ``PreTrainedModel``: a causal language model, a multimodal model around
            one, a classifier of sequences, or a bare decoder.
        fuse_parts: compute what can be by fused kernels.

    Raises:
        ModelLoadError: its class does what cannot be run on packed sequences from a KV cache;
            one sentence, with the line of the class.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelLoadError(
            f"{type(model).__name__} is no transformers model; give a PreTrainedModel, such as "
            "AutoModelForCausalLM.from_pretrained gives"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ModelLoadError(
            f"{type(model).__name__} lies on {', '.join(devices)}; load it on one device"
        )
    register()
    model.eval()
    parts = _take_apart(model)
    kind: type[TransformersModel] = TransformersModel
    if type(model).__name__.endswith("ForSequenceClassification"):
        kind = TransformersClassifier
    elif model.get_output_embeddings() is not None and parts.causal:
        kind = TransformersCausalLM
    if fuse_parts:
        fuse(parts)
    wrapped = kind(parts)
    _compare_with_class(wrapped, parts)
    return wrapped.eval()


def _take_apart(model: Any) -> Parts:
    config = model.config
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"{line_of(model)} is an encoder with a decoder, whose cross-attention has no KV cache "
            "here"
        )
    embedding = model.get_input_embeddings()
    decoder = _decoder(model, embedding)
    if not type(decoder)._can_set_attn_implementation():
        raise ModelLoadError(
            f"{line_of(decoder)} attends outside transformers' attention interface, so its keys "
            "and values cannot be kept in the KV cache"
        )
    arguments = _arguments(decoder)
    switches = Switches(model)
    device = embedding.weight.device
    ids = probe_ids(config, embedding.weight.shape[0], device)[0]
    with torch.no_grad():
        embeds = embedding(ids.unsqueeze(0))
    positions = torch.arange(len(ids), device=device).unsqueeze(0)
    calls, output = record_calls(
        decoder, switches, embeds, {**arguments, "position_ids": positions}
    )
    hidden, width = output[0].shape[-1], embeds.shape[-1]
    if hidden != width:
        raise ModelLoadError(
            f"{line_of(decoder)} makes hidden states of {hidden} from embeddings of {width}; only "
            "equal widths are supported"
        )
    context = context_length(config, switches)
    return Parts(
        model=model,
        decoder=decoder,
        embedding=embedding,
        arguments=arguments,
        output_type=type(output),
        modules=[call.module for call in calls],
        layers=make_layers(calls, context),
        switches=switches,
        hidden_size=width,
        context_length=context,
    )


def _decoder(model: Any, embedding: nn.Module) -> Any:
    """The layer stack; where the accessor gives a model with its head, the part that embeds."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    if decoder is not model or model.get_output_embeddings() is None:
        return decoder
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in holders if embedding in part.modules()][-1]


def _arguments(decoder: nn.Module) -> dict[str, Any]:
    """The constants to call ``decoder`` with. Raises ModelLoadError where it takes no positions."""
    parameters = inspect.signature(decoder.forward).parameters
    if "position_ids" not in parameters or "inputs_embeds" not in parameters:
        raise ModelLoadError(
            f"{line_of(decoder)} takes no position_ids or no inputs_embeds, without which packed "
            "sequences cannot be told apart"
        )
    return {name: value for name, value in _CONSTANTS.items() if name in parameters}


_CONSTANTS = {"use_cache": False, "return_dict": True}


def context_length(config: PreTrainedConfig, switches: Switches) -> int:
    """The longest sequence: the config's, or what its rotary embedding does without a change of
    frequencies. Raises ModelLoadError if the config does not say."""
    text = config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelLoadError(
            f"{type(text).__name__} has no max_position_embeddings, which says how long a sequence "
            "may be"
        )
    shortest = switches.shortest_rope(length)
    if shortest < length:
        logger.warning(
            "the context is %d tokens, not %d: past them this model's rotary embedding changes its "
            "frequencies for a whole batch, cached keys too",
            *(shortest, length),
        )
    return shortest


def probe_ids(
    config: PreTrainedConfig, vocab_size: int, device: torch.device
) -> list[torch.Tensor]:
    """Sequences of ``PROBE_LENGTHS`` ordinary tokens: none that a config names."""
    named = _named_ids(config)
    plain = [id for id in range(min(vocab_size, 1000)) if id not in named]
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [plain[order[i % len(plain)]] for i in range(sum(PROBE_LENGTHS))]
    return list(torch.tensor(ids, device=device).split(PROBE_LENGTHS))


def _named_ids(config: PreTrainedConfig) -> set[int]:
    """Ids of the tokens that a config names."""
    named: set[int] = set()
    for one in (config, config.get_text_config()):
        for name, value in one.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                named |= set(value) if isinstance(value, list) else {value}
    return named


@torch.no_grad()
def _compare_with_class(model: TransformersModel, parts: Parts) -> None:
    """Raise ModelLoadError unless packed sequences give what the class gives for each alone."""
    weight: torch.Tensor = parts.embedding.weight
    sequences = probe_ids(parts.model.config, weight.shape[0], weight.device)
    headless = not isinstance(model, TransformersCausalLM | TransformersClassifier)
    whole = parts.decoder if headless else parts.model
    capped = any(layer.soft_cap is not None for layer in parts.layers)
    with _attention_with_soft_cap(parts.model) if capped else nullcontext():
        outputs = [whole(input_ids=ids.unsqueeze(0)) for ids in sequences]
    own = torch.cat([(out[0] if headless else out.logits).flatten(0, -2) for out in outputs])
    error = _error(_packed_result(model, parts, sequences), own)
    limit = LARGEST_ERROR.get(weight.dtype, 0.3)
    padding = parts.model.config.get_text_config().pad_token_id
    in_range = padding is not None and padding + PROBE_LENGTHS[0] < parts.context_length
    if not error <= limit and in_range:
        model.model.position_offset = padding + 1  # so RoBERTa and those after it count
        counted = _error(_packed_result(model, parts, sequences), own)
        error = counted if counted <= limit else error
    if not error <= limit:
        raise ModelLoadError(
            f"{line_of(parts.decoder)} gives other results for packed sequences than for each "
            f"alone (off by {error:.2g} of their size): something but its attention calls sees "
            "other tokens, or its attention does what the call does not say"
        )


@contextmanager
def _attention_with_soft_cap(model: PreTrainedModel) -> Iterator[None]:
    """The class's own attention that has one: SDPA, which transformers 5.17 gives Gemma 2, drops it
    without a word."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _error(ours: torch.Tensor, own: torch.Tensor) -> float:
    """How far off, as a share of the class's own result."""
    ours, own = ours.float(), own.float()
    return float((ours - own).norm() / own.norm().clamp(min=1e-20))


def _packed_result(
    model: TransformersModel, parts: Parts, sequences: list[torch.Tensor]
) -> torch.Tensor:
    """Logits, scores or hidden states of the sequences, row after row."""
    hidden = _packed_hidden(model, parts, sequences)
    if isinstance(model, TransformersCausalLM):
        model.choose_head(hidden[0])
        head = model.logits_head
        rows = [F.linear(h, head) if isinstance(head, torch.Tensor) else head(h) for h in hidden]
        return torch.cat(rows)
    if isinstance(model, TransformersClassifier):
        vocabulary = range(parts.embedding.weight.shape[0])
        named = [id for id in _named_ids(parts.model.config) if id in vocabulary]
        model.choose_place(hidden, sequences, sorted(named))
        pairs = zip(hidden, sequences, strict=True)
        return torch.cat([model.rest_of_class(rows, ids) for rows, ids in pairs])
    return torch.cat(hidden)


def _packed_hidden(
    model: TransformersModel, parts: Parts, sequences: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Hidden states of each of two sequences, of which the second comes in two parts."""
    device = sequences[0].device
    first, second = (ids.tolist() for ids in sequences)
    cut = 3 if parts.causal else len(second)
    slots = list(range(1, len(first) + len(second) + 1))
    here, there = slots[: len(first)], slots[len(first) :]
    for layer in parts.layers:
        shape = (len(slots) + 1, layer.num_kv_heads, layer.head_dim)
        dtype = parts.embedding.weight.dtype
        layer.k_cache = torch.zeros(shape, dtype=dtype, device=device)
        layer.v_cache = torch.zeros(shape, dtype=dtype, device=device)
    batch = ForwardBatch.from_requests([first, second[:cut]], [here, there[:cut]])
    rows = [_run(model, batch, device)]
    if cut < len(second):
        rest = ForwardBatch.from_requests([second[cut:]], [there[cut:]], [there[:cut]])
        rows.append(_run(model, rest, device))
    for layer in parts.layers:
        del layer.k_cache, layer.v_cache
    return list(torch.cat(rows).split([len(first), len(second)]))


def _run(model: TransformersModel, batch: ForwardBatch, device: torch.device) -> torch.Tensor:
    ids = torch.from_numpy(batch.input_ids).to(device)
    inputs = LayerInputs(
        hidden_states=model.embed(ids),
        positions=torch.from_numpy(batch.positions).to(device),
        out_cache_loc=torch.from_numpy(batch.out_cache_loc).to(device),
        num_token_non_padded=torch.tensor([batch.num_tokens], dtype=torch.int32, device=device),
    )
    backend = TorchNativeBackend(device)
    backend.init_forward_metadata(batch)
    with forward_context(batch, backend):
        hidden: torch.Tensor = model.get_layer_stack()(inputs)
    return hidden

"""From a local model folder to a model on its device.

The model is built on the meta device and given memory once; each tensor then goes from its mapped
file to its place, so the weights are never in memory twice.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from breakgraph.layers import CheckpointSlot, GatedRMSNorm, RMSNorm
from breakgraph.models.base import CausalLM, PrefillModel
from breakgraph.models.checkpoint import (
    ModelLoadError,
    copy_tensors,
    find_shards,
    match_tensors,
    read_config,
    read_json,
)
from breakgraph.models.registry import find_model_class
from breakgraph.models.transformers_impl.loading import (
    ModelImpl,
    default_dtype,
    load_transformers_model,
    runs_transformers_class,
)

__all__ = ["ModelLoadError", "load_model"]

LoadFormat = Literal["auto", "dummy"]


def load_model(
    model_path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    load_format: LoadFormat = "auto",
    random_seed: int = 0,
    model_impl: ModelImpl = "auto",
    trust_remote_code: bool = False,
) -> PrefillModel:
    """Build the model of a local folder and fill its weights.

    Args:
        model_path: a folder with ``config.json`` and safetensors, single or sharded.
        dtype: of weights and activations; None follows ``config.json``, except that bfloat16
            and float16 become float32 on a CPU, which computes faster in it.
        device: where the weights go.
        load_format: ``"dummy"`` fills the weights at random and needs ``config.json`` alone.
        random_seed: of the dummy weights; the same on one kind of device gives the same weights.
        model_impl: ``"native"`` runs what ``MODELS`` names, ``"transformers"`` the class of
            transformers, and ``"auto"`` the latter where the former has none.
        trust_remote_code: run a model's own code, which comes with the folder.

    Raises:
        ModelLoadError: the folder, its config or its weights cannot be used; says why.
    """
    folder = Path(model_path)
    device = torch.empty(0, device=device).device  # "cuda" becomes the current device's index
    if runs_transformers_class(folder, model_impl):
        return load_transformers_model(
            folder,
            dtype=dtype,
            device=device,
            dummy=load_format == "dummy",
            random_seed=random_seed,
            trust_remote_code=trust_remote_code,
        )
    model = _build(folder)
    dtype = dtype or default_dtype(model.config, device)
    if load_format == "dummy":
        _allocate(model, dtype, device)
        _fill_randomly(model, device, random_seed)
    else:
        no_head = not isinstance(model, CausalLM) or model.lm_head is None
        places = match_tensors(
            find_shards(folder),
            checkpoint_slots(model),
            accept_lm_head=no_head,
            renames=model.checkpoint_renames,
        )
        _allocate(model, dtype, device)
        copy_tensors(places, checkpoint_slots(model), device)
    return model.eval()


def checkpoint_slots(model: nn.Module) -> dict[str, CheckpointSlot]:
    """Where each checkpoint tensor goes, by its name in the checkpoint."""
    slots: dict[str, CheckpointSlot] = {}
    for path, module in model.named_modules():
        if hasattr(module, "checkpoint_slots"):
            parent = path.rpartition(".")[0]
            own = module.checkpoint_slots()
        else:
            parent = path
            place = getattr(module, "checkpoint_slot", _whole)
            own = {
                name: place(name, parameter.detach())
                for name, parameter in module.named_parameters(recurse=False)
            }
        slots |= {f"{parent}.{name}".lstrip("."): slot for name, slot in own.items()}
    return slots


def _whole(name: str, tensor: torch.Tensor) -> CheckpointSlot:
    return CheckpointSlot(tensor, tuple(tensor.shape))


def _build(folder: Path) -> PrefillModel:
    """The folder's model on the meta device."""
    path = folder / "config.json"
    raw = read_json(path)
    if "quantization_config" in raw:
        raise ModelLoadError(f"{path}: quantized checkpoints are not supported; use the original")
    try:
        model_class = find_model_class(raw.get("architectures") or ())
        config = read_config(folder)
        with torch.device("meta"):
            return model_class(config)
    except ModelLoadError:
        raise
    except (ValueError, AttributeError) as error:  # AttributeError: a config of another model
        raise ModelLoadError(
            f"{path}: {error}; --model-impl transformers runs the class of transformers instead"
        ) from error


def _allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameters memory, uninitialised, and move the buffers, which keep their dtype.

    Those that a module names in ``float32_parameters`` are float32 whatever ``dtype`` is.
    """
    for module in model.modules():
        kept = getattr(module, "float32_parameters", ())
        for name, parameter in list(module.named_parameters(recurse=False)):
            as_dtype = torch.float32 if name in kept else dtype
            # By its shape: asked of a tensor on the meta device, torch imports sympy, for 0.4 s.
            memory = torch.empty(parameter.shape, dtype=as_dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _fill_randomly(model: nn.Module, device: torch.device, seed: int) -> None:
    """Norms of 1, all else normal with a deviation of 0.02."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm | GatedRMSNorm):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)

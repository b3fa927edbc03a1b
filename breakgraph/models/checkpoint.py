"""A model folder on disk: ``config.json`` and safetensors, read or refused with one clear error.

Nothing is loaded before every tensor's name and shape has been compared with the model's, from
the files' headers alone; all that disagrees is listed in one error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from breakgraph.layers import CheckpointSlot
from breakgraph.models.reading import UnreadableFileError, opened_file, read_tensors
from breakgraph.models.undocumented import undocumented_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STACK_PREFIX = "model."

_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^mtp\.")
"""Computed anew, or for the prediction of more than one token, which is not done here."""


class ModelLoadError(ValueError):
    """A model folder cannot be loaded; the message names the file and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ModelLoadError if there is none."""
    if not path.parent.is_dir():
        raise ModelLoadError(
            f"{path.parent} is not a folder; give a local model folder, downloaded whole"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path} is missing; a model folder needs it, so download the folder again, whole"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object; download it again")
    return content


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """``config.json`` as transformers understands it; code of the folder's own runs only with
    ``trust_remote_code``. Raises ModelLoadError."""
    from transformers import AutoConfig

    try:
        with undocumented_configs():
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises what its validators raise, of any class
        raise ModelLoadError(
            f"{folder / 'config.json'} is not a config transformers accepts: {error}"
        ) from error


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelLoadError if any is missing."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise ModelLoadError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; convert the checkpoint to "
            "safetensors, or use load format dummy for random weights"
        )
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / INDEX_FILE} has no weight_map; download it again")
    shards = [folder / name for name in sorted(set(map(str, weight_map.values())))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ModelLoadError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names; download the rest"
        )
    return shards


def match_tensors(
    shards: Sequence[Path],
    slots: Mapping[str, CheckpointSlot],
    *,
    accept_lm_head: bool,
    renames: Sequence[tuple[str, str]] = (),
) -> dict[Path, dict[str, str]]:
    """Compare the tensors of ``shards`` with a model's slots.

    A checkpoint of a model without a head names its tensors without the ``model.`` prefix.
    Rotary frequencies and layers that predict further tokens are ignored, and so is
    ``lm_head.weight`` where ``accept_lm_head``. ``renames`` are patterns and what the checkpoint's
    names have in their place here.

    Returns:
        For each shard, the slot of each of its tensors.

    Raises:
        ModelLoadError: listing every tensor that is missing, left over or misshapen.
    """
    found: dict[str, str] = {}
    by_shard: dict[Path, dict[str, str]] = {}
    left_over: list[str] = []
    misshapen: list[str] = []
    for shard in shards:
        names = by_shard[shard] = {}
        for name, shape in _shapes(shard).items():
            renamed = name
            for pattern, replacement in renames:
                renamed = re.sub(pattern, replacement, renamed)
            slot = renamed if renamed in slots else STACK_PREFIX + renamed
            if slot in slots and slot not in found:
                found[slot] = names[name] = slot
                if shape != slots[slot].shape:
                    misshapen.append(f"{name} {shape}, not {slots[slot].shape}")
            elif not (_HARMLESS.search(renamed) or (accept_lm_head and name == "lm_head.weight")):
                left_over.append(f"{name} {shape}")
    missing = [f"{name} {slot.shape}" for name, slot in slots.items() if name not in found]
    problems = {"missing": missing, "left over": left_over, "misshapen": misshapen}
    if lines := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise ModelLoadError(
            f"the tensors in {shards[0].parent} are not those of its config.json:\n"
            + "\n".join(lines)
        )
    return by_shard


def copy_tensors(
    places: Mapping[Path, Mapping[str, str]],
    slots: Mapping[str, CheckpointSlot],
    device: torch.device,
) -> None:
    """``read_tensors``, raising ModelLoadError."""
    try:
        read_tensors(places, slots, device)
    except UnreadableFileError as error:
        raise ModelLoadError(str(error)) from error


def _shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        with opened_file(shard) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except UnreadableFileError as error:
        raise ModelLoadError(str(error)) from error

"""How a model folder wants its vectors pooled: ``modules.json`` and the pooling config it names.

The files are those that sentence-transformers writes. A step of theirs that is not done here is an
error: a vector pooled in another way looks right and finds the wrong documents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breakgraph.layers.pooler import PoolingMode
from breakgraph.models.checkpoint import ModelLoadError, read_json

MODULES_FILE = "modules.json"

_MODES: dict[str, PoolingMode] = {
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class PoolingRecipe:
    """From hidden states to a vector.

    Attributes:
        mode: which tokens it is made of.
        normalize: whether it is scaled to length 1.
    """

    mode: PoolingMode
    normalize: bool = True


def find_recipe(folder: Path, *, causal: bool) -> PoolingRecipe:
    """The folder's recipe; without its files the last token of a causal model, the mean of others.

    Raises:
        ModelLoadError: the files ask for a step that is not done here, or cannot be read.
    """
    if not (folder / MODULES_FILE).is_file():
        return PoolingRecipe("last" if causal else "mean")
    mode: PoolingMode | None = None
    normalize = False
    for step in _steps(folder / MODULES_FILE):
        kind = str(step.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            mode = _mode(folder / str(step.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelLoadError(
                f"{folder / MODULES_FILE} has a step {kind!r}, which is not done here: "
                "Transformer, Pooling and Normalize are. Name --pooling to go without the file"
            )
    if mode is None:
        raise ModelLoadError(f"{folder / MODULES_FILE} has no Pooling step; name --pooling")
    return PoolingRecipe(mode, normalize)


def _steps(path: Path) -> list[dict[str, Any]]:
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ModelLoadError(f"{path} holds no list of steps; download it again")
    return steps


def _mode(path: Path) -> PoolingMode:
    config = read_json(path)
    flags = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    named = config.get("pooling_mode")
    asked = flags or ([named] if isinstance(named, str) else named or [])
    if len(asked) != 1 or asked[0] not in _MODES:
        raise ModelLoadError(
            f"{path} pools by {' and '.join(map(str, asked)) or 'nothing'}; one of cls, mean or "
            "lasttoken is done here"
        )
    return _MODES[asked[0]]

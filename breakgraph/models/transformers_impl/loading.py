"""From a model folder to a wrapped transformers model: weights from safetensors, no foreign code.

The class reads its own checkpoint, renames and fusions included; a weight that is missing or of
another shape is an error here, where transformers would fill it at random.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from breakgraph.distributed import current_group
from breakgraph.models.checkpoint import ModelLoadError, read_config, read_json
from breakgraph.models.registry import MODELS
from breakgraph.models.transformers_impl.model import TransformersModel
from breakgraph.models.transformers_impl.wrap import wrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

ModelImpl = Literal["auto", "native", "transformers"]


def runs_transformers_class(folder: Path, model_impl: ModelImpl) -> bool:
    """Whether the model of ``folder`` runs through its transformers class.

    With ``"auto"``, where no architecture of its ``config.json`` is in ``MODELS``. A folder
    without a readable config is left to the native loader, which says what is wrong.
    """
    if model_impl != "auto":
        return model_impl == "transformers"
    path = folder / "config.json"
    names = read_json(path).get("architectures") if path.is_file() else None
    return bool(names) and not any(name in MODELS for name in names or ())


def default_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The config's, except that a CPU computes half precision in float32, which is faster."""
    named = config.dtype or torch.float32
    dtype: torch.dtype = getattr(torch, named) if isinstance(named, str) else named
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


def load_transformers_model(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    dummy: bool,
    random_seed: int,
    trust_remote_code: bool,
) -> TransformersModel:
    """Load and wrap the model of ``folder``.

    Raises:
        ModelLoadError: the folder cannot be read, needs code of its own that is not trusted, or
            its class cannot be wrapped; one sentence.
    """
    if not folder.is_dir():
        raise ModelLoadError(
            f"{folder} is not a folder; give a local model folder, downloaded beforehand"
        )
    if current_group().size > 1:
        raise ModelLoadError(
            "a model that runs through its transformers class is not split over ranks; run it on "
            "one GPU"
        )
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        raise ModelLoadError(
            f"{folder / 'config.json'}: quantized checkpoints are not supported; use the original"
        )
    if raw.get("auto_map") and not trust_remote_code and not _known(raw):
        raise ModelLoadError(
            f"{folder} brings its own code ({', '.join(sorted(raw['auto_map']))}), which runs only "
            "with --trust-remote-code; read it first"
        )
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model_class = _class_of(folder, raw, trust_remote_code)
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        raise ModelLoadError(
            f"{folder / 'config.json'} is of model_type {config.model_type!r}, and its "
            f"architecture {model_class.__name__} wants a {wanted.__name__}"
        )
    dtype = dtype or default_dtype(config.get_text_config(), device)
    if dummy:
        model = _with_random_weights(model_class, config, dtype, device, random_seed)
    else:
        model = _read(model_class, folder, config, dtype, trust_remote_code).to(device)
    logger.info("%s runs through its transformers class", type(model).__name__)
    return wrap_model(model.requires_grad_(False))


def _known(raw: dict[str, Any]) -> bool:
    import transformers

    return any(hasattr(transformers, name) for name in raw.get("architectures") or ())


def _class_of(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """The class that the architecture names, or the auto class that leads to the folder's own."""
    import transformers

    names = raw.get("architectures") or ()
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if trust_remote_code:
        for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"):
            if auto in (raw.get("auto_map") or {}):
                return getattr(transformers, auto)
    said = ", ".join(map(str, names)) or "none"
    raise ModelLoadError(
        f"{folder / 'config.json'}: unknown architecture ({said}): neither breakgraph nor "
        f"transformers {transformers.__version__} has it; the native ones are {', '.join(MODELS)}"
    )


def _read(
    model_class: Any, folder: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    try:
        model, report = model_class.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a class, a file or a check of transformers raises
        raise ModelLoadError(
            f"transformers cannot load {folder}: {type(error).__name__}: {error}"
        ) from error
    lacking = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    if lacking:
        raise ModelLoadError(
            f"the tensors in {folder} are not those of its config.json: missing or misshapen: "
            f"{', '.join(sorted(lacking))}"
        )
    return model


def _with_random_weights(
    model_class: Any, config: Any, dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
    """As transformers initialises them."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with device:
                return model_class._from_config(config).to(device=device, dtype=dtype)
        except Exception as error:
            raise ModelLoadError(
                f"transformers cannot make {config.architectures}: {type(error).__name__}: {error}"
            ) from error
        finally:
            torch.set_default_dtype(before)

"""A DeepSeek checkpoint is loaded without the layers that predict further tokens, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mla_support import MODELS, make_deepseek
from models_support import edit_config, save_checkpoint
from safetensors.torch import load_file, save_file

from breakgraph.models import ModelLoadError, load_model


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ("v2", {"topk_group": 5}, "topk_group 5 are kept"),
        ("v3", {"topk_group": 1}, "num_experts_per_tok 3 is more than topk_group 1"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ("v3", {"attention_bias": True, "q_lora_rank": 0}, "attention_bias is not supported"),
        ("v3", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_unsupported_config_is_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_deepseek(name).config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[MODELS[name][0]], **config)
    if "attention_bias" in config:  # a null: edit_config would remove the field
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"q_lora_rank": 0', '"q_lora_rank": null'))
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path, load_format="dummy")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    reference = make_deepseek("v3")
    save_checkpoint(reference, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    count = reference.config.num_hidden_layers
    more = {f"model.layers.{count}.{name}": torch.zeros(3) for name in ("enorm.weight", "mlp.up")}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(tmp_path)
    extra = {f"model.layers.{count + 1}.enorm.weight": torch.zeros(3)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match="left over"):
        load_model(tmp_path)

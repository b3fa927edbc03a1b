"""A folder is loaded by our own file, or through transformers, or refused with what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import wrapped_support as support
from models_support import edit_config, random_prompts
from wrapped_support import make_engine, save_model

from breakgraph.models import ModelLoadError, load_model
from breakgraph.models.transformers_impl import TransformersModel


def test_auto_takes_our_own_file_where_there_is_one(tmp_path: Path) -> None:
    save_model("Qwen3ForCausalLM", tmp_path / "known", head_dim=8)
    save_model("GlmForCausalLM", tmp_path / "unknown")
    native = load_model(tmp_path / "known")
    wrapped = load_model(tmp_path / "known", model_impl="transformers")
    assert not isinstance(native, TransformersModel)
    assert isinstance(wrapped, TransformersModel)
    assert isinstance(load_model(tmp_path / "unknown"), TransformersModel)
    with pytest.raises(ModelLoadError, match="unknown architecture"):
        load_model(tmp_path / "unknown", model_impl="native")


def test_dummy_weights_need_a_config_alone(tmp_path: Path) -> None:
    support.make_wrappable("GlmForCausalLM").config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GlmForCausalLM"])
    models = [load_model(tmp_path, load_format="dummy", random_seed=seed) for seed in (1, 1, 2)]
    weights = [next(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_missing_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model("GlmForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"missing or misshapen: {name}"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_model("GlmForCausalLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="transformers cannot load"):
        load_model(tmp_path)


def test_code_of_the_folder_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    model = save_model("GlmForCausalLM", tmp_path)
    edit_config(
        tmp_path,
        architectures=["HouseForCausalLM"],
        model_type="house",
        auto_map={
            "AutoConfig": "modeling_house.HouseConfig",
            "AutoModelForCausalLM": "modeling_house.HouseForCausalLM",
        },
    )
    (tmp_path / "modeling_house.py").write_text(
        "from transformers import GlmConfig, GlmForCausalLM\n"
        "class HouseConfig(GlmConfig):\n    model_type = 'house'\n"
        "class HouseForCausalLM(GlmForCausalLM):\n    config_class = HouseConfig\n"
    )
    with pytest.raises(ModelLoadError, match="only with --trust-remote-code"):
        load_model(tmp_path)
    engine = make_engine(tmp_path, trust_remote_code=True)
    ids = random_prompts([9])[0]
    assert engine.generate([ids], 3)[0].token_ids == support.own_text(model, ids, 3)


def test_architecture_that_nobody_has_names_both(tmp_path: Path) -> None:
    save_model("GlmForCausalLM", tmp_path)
    edit_config(tmp_path, architectures=["NobodyForCausalLM"])
    with pytest.raises(ModelLoadError, match=r"NobodyForCausalLM.*neither breakgraph nor transf"):
        load_model(tmp_path)

"""Configurations are read without the modelling code that their docstrings would import."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import transformers

from breakgraph.models import undocumented
from breakgraph.models.checkpoint import ModelLoadError, read_config
from breakgraph.models.undocumented import undocumented_configs

documenting = importlib.import_module("transformers.utils.auto_docstring")


def test_only_configurations_stay_undocumented() -> None:
    plain = documenting.auto_class_docstring
    own = {"__doc__": "Its own."}
    with undocumented_configs():
        config = documenting.auto_docstring(
            type("OneConfig", (transformers.PreTrainedConfig,), own)
        )
        output = documenting.auto_docstring(
            type("OneOutput", (transformers.utils.ModelOutput,), {}), custom_intro="An output."
        )
    assert config.__doc__ == "Its own."
    assert "An output." in output.__doc__
    assert documenting.auto_class_docstring is plain


def test_documenting_is_restored_after_an_error(tmp_path: Path) -> None:
    plain = documenting.auto_class_docstring
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ModelLoadError, match="no such"):
        read_config(tmp_path)
    assert documenting.auto_class_docstring is plain


def test_transformers_without_that_function_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 24}))
    monkeypatch.setattr(undocumented, "_FUNCTION", "renamed")
    assert read_config(tmp_path).hidden_size == 24
    monkeypatch.setattr(undocumented, "_MODULE", "transformers.renamed")
    assert read_config(tmp_path).hidden_size == 24


def test_a_configuration_is_the_one_that_modelling_code_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fnet"}))
    config = read_config(tmp_path)
    assert transformers.AutoModel.from_config(config).config_class is type(config)

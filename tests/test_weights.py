"""Checkpoints are read whole or refused with one error that says what is wrong with which file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_support import edit_config, make_reference, random_prompts, run_prompts, save_checkpoint
from safetensors.torch import load_file, save_file

from breakgraph.models import CausalLM, ModelLoadError, load_model, reading
from breakgraph.models.reading import Upload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = make_reference("Qwen3ForCausalLM", head_dim=8)
    return save_checkpoint(reference, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def test_sharded_equals_single(saved: Path, tmp_path: Path) -> None:
    reference = make_reference("Qwen3ForCausalLM", head_dim=8)
    save_checkpoint(reference, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(load_model(tmp_path), load_model(saved))


def test_fused_rows_hold_the_checkpoint(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    state = load_model(saved).state_dict()
    layer = "model.layers.1."
    for fused, parts in {
        "self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "mlp.gate_up_proj": ["gate_proj", "up_proj"],
    }.items():
        block = f"{layer}{fused.split('.')[0]}."
        whole = torch.cat([tensors[f"{block}{part}.weight"] for part in parts])
        assert torch.equal(state[f"{layer}{fused}.weight"], whole)


def test_checkpoint_without_prefix(folder: Path, saved: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert_same(load_model(folder), load_model(saved))


def test_harmless_extras_are_accepted(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(folder, add)
    load_model(folder)
    edit_config(folder, tie_word_embeddings=True)
    model = load_model(folder)
    assert isinstance(model, CausalLM)
    assert model.lm_head_weight is model.model.embed_tokens.weight


def test_all_wrong_tensors_are_listed(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["model.layers.0.self_attn.k_norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.zeros(4, 8)

    edit_tensors(folder, damage)
    with pytest.raises(ModelLoadError) as error:
        load_model(folder)
    assert str(error.value).splitlines() == [
        f"the tensors in {folder} are not those of its config.json:",
        "missing: model.layers.0.self_attn.k_norm.weight (8,), lm_head.weight (97, 32)",
        "left over: model.layers.0.self_attn.q_proj.bias (32,)",
        "misshapen: model.layers.1.mlp.up_proj.weight (47, 32), not (48, 32), "
        "model.layers.1.self_attn.q_norm.weight (4, 8), not (8,)",
    ]


def test_dtype(folder: Path) -> None:
    def dtypes(dtype: torch.dtype | None = None) -> set[torch.dtype]:
        return {parameter.dtype for parameter in load_model(folder, dtype=dtype).parameters()}

    assert dtypes() == {torch.float32}
    assert dtypes(torch.bfloat16) == {torch.bfloat16}
    edit_config(folder, dtype="bfloat16")
    assert dtypes() == {torch.float32}, "half precision is slow on a CPU"
    edit_config(folder, dtype="float64")
    assert dtypes() == {torch.float64}
    table = load_model(folder, dtype=torch.bfloat16).get_layer_stack().get_buffer("rotary.table")
    assert table.dtype == torch.float32


def test_bfloat16_runs_close_to_float32(saved: Path) -> None:
    prompts = random_prompts([20])
    (exact,) = run_prompts(load_model(saved), prompts)
    (rounded,) = run_prompts(load_model(saved, dtype=torch.bfloat16), prompts)
    assert rounded.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(rounded.float(), exact)
    assert similarity.min() > 0.999


def test_dummy_needs_the_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    one, same = (load_model(folder, load_format="dummy", random_seed=3) for _ in range(2))
    assert_same(one, same)
    other = load_model(folder, load_format="dummy", random_seed=4)
    assert not torch.equal(one.state_dict()["lm_head.weight"], other.state_dict()["lm_head.weight"])
    for name, value in one.state_dict().items():
        if "norm" in name:
            assert (value == 1).all(), name
        else:
            assert 0.015 < value.std() < 0.025, name
    (hidden,) = run_prompts(one, random_prompts([10]))
    assert hidden.isfinite().all()


def _write_bert_config(folder: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _empty_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "model is not a folder; give a local model folder"),
        (lambda f: (f / "config.json").unlink(), r"config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (
            lambda f: edit_config(f, architectures=["NobodyForCausalLM"]),
            r"unknown architecture \(NobodyForCausalLM\): neither breakgraph nor transformers",
        ),
        (
            lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
            "model_type 'qwen3', and its architecture GPT2LMHeadModel wants a GPT2Config",
        ),
        (lambda f: edit_config(f, architectures=None), r"unknown architecture \(none\)"),
        (_write_bert_config, "config.json: 'BertConfig' object has no attribute"),
        (lambda f: edit_config(f, model_type="qwen9"), "config.json is not a config transformers"),
        (lambda f: edit_config(f, hidden_size="wide"), "config.json is not a config transformers"),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantized checkpoints"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (_truncate, "model.safetensors is not a whole safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
            "model.safetensors is not a whole safetensors file",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
        (_lose_a_shard, "lacks model-00001-of-00002.safetensors, which model.safetensors.index"),
        (_empty_index, "model.safetensors.index.json has no weight_map"),
    ],
)
def test_damaged_folder(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


# Through buffers, as to a GPU.


@pytest.mark.parametrize("buffer_bytes", [64, 256, 1 << 20])
def test_buffers_pass_on_every_element(buffer_bytes: int) -> None:
    """Whole, cast, in slices, of strides of its own, and of rows longer than a buffer."""
    upload = Upload(torch.device("cpu"), buffer_bytes)
    for shape in ((), (1,), (33,), (7, 5), (3, 4, 5), (2, 100), (0, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            source = torch.randn(shape)
            target = torch.full(shape, float("nan"), dtype=dtype)
            upload.copy(target, source)
            assert torch.equal(target, source.to(dtype)), (shape, dtype)
    wide = torch.randn(6, 20)
    target = torch.empty(6, 8)
    upload.copy(target, wide[:, 4:12])
    assert torch.equal(target, wide[:, 4:12])
    part = torch.empty(6, 20)
    upload.copy(part[:, 4:12], wide[:, 4:12])
    assert torch.equal(part[:, 4:12], wide[:, 4:12])


def test_threads_read_what_one_thread_reads(saved: Path, tmp_path: Path, monkeypatch) -> None:
    reference = make_reference("Qwen3ForCausalLM", head_dim=8)
    save_checkpoint(reference, tmp_path, max_shard_size="8KB")
    by_threads = reading.read_in_threads
    monkeypatch.setattr(reading, "read_one_by_one", lambda jobs: by_threads(jobs, CPU))
    assert_same(load_model(tmp_path), load_model(saved))


def test_what_a_thread_cannot_read_is_said(folder: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise reading.UnreadableFileError("gone while it was read")

    by_threads = reading.read_in_threads
    monkeypatch.setattr(reading, "read_one_by_one", lambda jobs: by_threads(jobs, CPU))
    monkeypatch.setattr(reading, "_pieces", fail)
    with pytest.raises(ModelLoadError, match="gone while it was read"):
        load_model(folder)


@pytest.mark.gpu
def test_a_gpu_holds_the_checkpoint(saved: Path) -> None:
    on_gpu = load_model(saved, device="cuda", dtype=torch.bfloat16).cpu()
    assert_same(on_gpu, load_model(saved, dtype=torch.bfloat16))

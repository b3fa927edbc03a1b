"""Mixture-of-experts blocks equal transformers', whatever the padding, captured or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import make_reference
from safetensors.torch import load_file
from transformers import NemotronHConfig, Qwen3NextConfig

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture, CaptureAudit
from breakgraph.layers import NemotronHMoe, QwenSparseMoe
from breakgraph.layers.moe_experts import GatedExperts, PlainExperts
from breakgraph.layers.moe_router import SigmoidRouter
from breakgraph.models.weights import checkpoint_slots

ROWS = 7
QWEN = {
    "num_hidden_layers": 1,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
}
NEXT = {**QWEN, "layer_types": ["full_attention"], "shared_expert_intermediate_size": 24}
NEMOTRON = {
    "num_hidden_layers": 1,
    "layers_block_type": ["moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "mlp_hidden_act": "relu2",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**QWEN, "norm_topk_prob": False}),
    "qwen3-moe-renormalised": ("Qwen3MoeForCausalLM", {**QWEN, "norm_topk_prob": True}),
    "qwen3-moe-unaligned": (
        "Qwen3MoeForCausalLM",
        {**QWEN, "norm_topk_prob": True, "moe_intermediate_size": 15},
    ),
    "qwen3-next": ("Qwen3NextForCausalLM", NEXT),
    "nemotron": ("NemotronHForCausalLM", NEMOTRON),
    "nemotron-one-group": (
        "NemotronHForCausalLM",
        {**NEMOTRON, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "nemotron-latent": (
        "NemotronHForCausalLM",
        {**NEMOTRON, "moe_latent_size": 12, "mlp_bias": True},
    ),
    "nemotron-unaligned": ("NemotronHForCausalLM", {**NEMOTRON, "moe_latent_size": 13}),
}


class Case:
    """A block of transformers, and ours with the weights that its checkpoint holds."""

    def __init__(self, kind: str, folder: Path) -> None:
        architecture, settings = KINDS[kind]
        model = make_reference(architecture, **settings, experts_implementation="eager")
        layer = model.model.layers[0]
        nemotron = architecture == "NemotronHForCausalLM"
        self.theirs: Any = layer.mixer if nemotron else layer.mlp
        for bias in self.theirs.gate.buffers():
            bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        self.ours: Any = (NemotronHMoe if nemotron else QwenSparseMoe)(model.config)
        model.save_pretrained(folder)
        prefix = "backbone.layers.0.mixer." if nemotron else "model.layers.0.mlp."
        self.checkpoint = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith(prefix)
        }
        slots = checkpoint_slots(self.ours)
        for name, tensor in self.checkpoint.items():
            slots[name].target.copy_(tensor)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def rows(seed: int = 0, count: int = ROWS) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def count_of(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32, device=device)


def expected(case: Case, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return residual + case.theirs(x.unsqueeze(0)).squeeze(0)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_block_asks_for_the_tensors_of_a_checkpoint(case: Case) -> None:
    wanted = {name: slot.shape for name, slot in checkpoint_slots(case.ours).items()}
    assert wanted == {name: tuple(tensor.shape) for name, tensor in case.checkpoint.items()}


def test_a_block_equals_transformers_and_adds_in_place(case: Case) -> None:
    x, residual = rows(0), rows(1)
    before = x.clone()
    theirs = expected(case, x, residual)
    out = case.ours(x, residual, count_of(ROWS))
    assert out.data_ptr() == residual.data_ptr()
    assert torch.equal(x, before)
    assert_close(out, theirs)


def test_padded_rows_change_no_real_row_even_when_nan(case: Case) -> None:
    x, residual = rows(0), rows(1)
    theirs = expected(case, x, residual)
    for garbage in (float("nan"), float("inf"), 1e30):
        for count in range(ROWS + 1):
            padded, added = x.clone(), residual.clone()
            padded[count:] = garbage
            out = case.ours(padded, added, count_of(count))
            assert_close(out[:count], theirs[:count])


def test_a_captured_block_serves_every_count_and_every_row(case: Case) -> None:
    x, residual, count = rows(2), rows(3), count_of(3)
    x[3:] = float("nan")
    graph = BreakableCUDAGraph()
    audit = CaptureAudit([x, residual, count, *case.ours.parameters()])
    with BreakableCUDAGraphCapture(graph, device="cpu", audit=audit):
        out = case.ours(x, residual, count)
    for live in (*range(ROWS + 1), 2):
        new, added = rows(10 + live), rows(30 + live)
        theirs = expected(case, new, added)
        new[live:] = float("nan")
        for static, value in ((x, new), (residual, added), (count, count_of(live))):
            static.copy_(value)
        graph.pool().poison()
        graph.replay()
        assert_close(out[:live], theirs[:live])


@pytest.mark.parametrize("size", [16, 15])
@pytest.mark.parametrize("kind", [GatedExperts, PlainExperts])
def test_padded_rows_get_exactly_zero_from_the_experts(
    kind: type[GatedExperts | PlainExperts], size: int
) -> None:
    experts = kind(8, 32, size)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.2)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(ROWS)])
    weights = torch.rand(ROWS, 3)
    for count in range(ROWS + 1):
        x = rows()
        for tensor in (x, weights):
            tensor[count:] = float("nan")
        out = experts(x, weights, chosen, count_of(count))
        assert torch.equal(out[count:], torch.zeros(ROWS - count, 32))
        assert out[:count].isfinite().all()
        weights = torch.rand(ROWS, 3)


def test_a_bfloat16_router_chooses_as_transformers_does(case: Case) -> None:
    theirs, ours = case.theirs.gate, case.ours.gate
    x, weight = rows(5, 200).bfloat16(), ours.weight.bfloat16()
    kept = (theirs.weight.data, ours.weight.data)
    try:
        theirs.weight.data, ours.weight.data = weight.clone(), weight.clone()
        with torch.no_grad():
            _, their_weights, their_experts = theirs(x)
        weights, experts = ours(x)
    finally:
        theirs.weight.data, ours.weight.data = kept
    assert weights.dtype == torch.float32
    # Logits in bfloat16 tie; then any of the tied experts is right, for the same weight.
    assert_close(weights.sort().values.to(their_weights.dtype), their_weights.sort().values)
    if isinstance(ours, SigmoidRouter):
        assert torch.equal(experts.sort().values, their_experts.sort().values)


def test_a_corrected_choice_follows_a_bias_too_fine_for_bfloat16() -> None:
    router = SigmoidRouter(8, 4, 1, num_groups=1, groups_kept=1, renormalize=False, scale=1.0)
    assert router.float32_parameters == ("e_score_correction_bias",)
    router.weight.data = torch.zeros(4, 8, dtype=torch.bfloat16)
    router.e_score_correction_bias.copy_(torch.tensor([1.0, 1.0, 1.0001, 1.0]))
    weights, experts = router(torch.randn(3, 8, dtype=torch.bfloat16))
    assert experts.tolist() == [[2]] * 3
    assert weights.tolist() == [[0.5]] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_group": 3}, "n_group 3"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"n_group": 8}, "n_group 8 leave a group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not between"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NemotronHMoe(NemotronHConfig(**{**NEMOTRON, **settings, "hidden_size": 32}))


# On a GPU -----------------------------------------------------------------------------------


def qwen_block(dtype: torch.dtype, *, shared: bool = True) -> QwenSparseMoe:
    config = Qwen3NextConfig(
        hidden_size=256,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=192 if shared else 0,
        norm_topk_prob=True,
    )
    return filled(QwenSparseMoe(config), dtype)


def nemotron_block(dtype: torch.dtype) -> NemotronHMoe:
    settings = {**NEMOTRON, "n_routed_experts": 32, "num_experts_per_tok": 4}
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "moe_latent_size": 128}
    return filled(NemotronHMoe(NemotronHConfig(**{**settings, **sizes})), dtype)


def filled(block: Any, dtype: torch.dtype) -> Any:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.randn(parameter.shape) * 0.1
            kept = name in getattr(module, "float32_parameters", ())
            parameter.data = value.to("cuda", torch.float32 if kept else dtype)
    return block


def in_float32(block: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The block's output on the CPU, routed as the GPU routes: near ties, experts may differ."""
    weights, experts = (tensor.cpu() for tensor in block.gate(x))
    reference = copy.deepcopy(block).cpu().float()
    reference.gate.forward = lambda _: (weights, experts)
    return reference(x.cpu().float(), residual.cpu().float(), count_of(len(x)))


BLOCKS = {"qwen": qwen_block, "nemotron": nemotron_block}


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    if len(exact):
        error = (ours.float().cpu() - exact).norm() / exact.norm()
        assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_on_cuda_a_block_is_captured_without_a_sync_and_replayed(
    kind: str, dtype: torch.dtype
) -> None:
    block, bucket = BLOCKS[kind](dtype), 96
    x, residual = (torch.randn(bucket, 256, device="cuda", dtype=dtype) for _ in range(2))
    count = count_of(bucket, "cuda")
    exact = in_float32(block, x, residual)
    with no_sync():
        eager = block(x, residual.clone(), count)
    assert_near(eager, exact, dtype)

    graph = BreakableCUDAGraph()
    audit = CaptureAudit([x, residual, count, *block.parameters()])
    with BreakableCUDAGraphCapture(graph, device="cuda", audit=audit):
        out = block(x, residual, count)
    for live in (bucket, 1, 0, 33, 95):
        new, added = (torch.randn(bucket, 256, device="cuda", dtype=dtype) for _ in range(2))
        exact = in_float32(block, new, added)
        new[live:] = float("nan")
        for static, value in ((x, new), (residual, added), (count, count_of(live))):
            static.copy_(value)
        graph.replay()
        assert_near(out[:live], exact[:live], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_on_cuda_a_router_weighs_as_on_the_cpu(kind: str) -> None:
    block = BLOCKS[kind](torch.bfloat16)
    x = torch.randn(500, 256, device="cuda", dtype=torch.bfloat16)
    weights = block.gate(x)[0].cpu().sort().values
    reference = block.gate.cpu()(x.cpu())[0].sort().values
    # The softmax router's logits are bfloat16: one of them a rounding apart moves a weight 1%.
    assert (weights - reference).abs().mean() < (1e-3 if kind == "qwen" else 1e-5)

"""Two GPUs: captured all-reduces of NCCL give what one GPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_support import make_reference, random_prompts, save_checkpoint

from breakgraph import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_two_gpus_give_what_one_gives(tmp_path: Path, graphs: bool, scatter: bool) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    save_checkpoint(make_reference("Qwen3MoeForCausalLM", head_dim=16, **moe), tmp_path)
    prompts, found = random_prompts([1, 5, 23, 40]), []
    for size in (1, 2):
        with Engine(
            model_path=str(tmp_path),
            device="cuda",
            dtype="float32",
            tp_size=size,
            moe_scatter=scatter and size > 1,
            skip_tokenizer_init=True,
            chunked_prefill_size=64,
            max_total_tokens=512,
            enable_breakable_cuda_graph=graphs,
            disable_cuda_graph=not graphs,
        ) as engine:
            found.append([r.next_token_logits for r in engine.prefill(prompts)])
            engine.generate(prompts, max_new_tokens=4)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, atol=1e-3, rtol=1e-3)

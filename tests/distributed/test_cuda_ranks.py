"""Several GPUs: collectives of NCCL in segments give what one GPU gives, and end when they must."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collective_support import check_captured_collectives
from engine_support import save_byte_model
from launcher import Launcher, check_kill
from models_support import make_reference, random_prompts, save_checkpoint
from pair import Pair

from breakgraph import Engine
from breakgraph.distributed.process_groups import CLOSE_SECONDS

GPUS = torch.cuda.device_count()
SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(size > GPUS, reason=f"needs {size} GPUs"))
    for size in (2, 4)
]
PROMPTS = random_prompts([1, 5, 23, 40])
GRAPHS: dict[bool, dict[str, Any]] = {
    False: {"disable_cuda_graph": True},
    True: {
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": [16, 64],
        "max_prefill_padding": 64.0,
        "prefill_dispatch": "always",
        "cuda_graph_bs": [1, 4],
    },
}


@pytest.fixture(scope="module", params=SIZES)
def gpus(request: pytest.FixtureRequest) -> Iterator[tuple[int, Pair]]:
    pair = Pair(request.param, "cuda")
    yield request.param, pair
    began = time.monotonic()
    pair.stop()  # waits for ever where a graph still holds the communicator
    assert time.monotonic() - began < CLOSE_SECONDS / 2
    assert [child.returncode for child in pair.children] == [0] * len(pair.children)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    reference = make_reference("Qwen3MoeForCausalLM", head_dim=16, **moe)
    return save_checkpoint(reference, tmp_path_factory.mktemp("model"))


def outcome(folder: Path, size: int, graphs: bool, **flags: Any) -> tuple[list[Any], list[Any]]:
    """Prefills and generations."""
    with Engine(
        model_path=str(folder),
        device="cuda",
        dtype="float32",
        tp_size=size,
        skip_tokenizer_init=True,
        chunked_prefill_size=64,
        max_total_tokens=512,
        max_running_requests=4,
        **GRAPHS[graphs],
        **flags,
    ) as engine:
        return engine.prefill(PROMPTS), engine.generate(PROMPTS, max_new_tokens=4)


@pytest.fixture(scope="module")
def of_one(folder: Path) -> tuple[list[Any], list[Any]]:
    return outcome(folder, 1, False)


@pytest.mark.gpu
def test_captured_collectives_replay(gpus: tuple[int, Pair]) -> None:
    gpus[1].call(check_captured_collectives)


@pytest.mark.parametrize("rows", ["same", "scattered", "own", "of two"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.gpu
def test_several_gpus_give_what_one_gives(
    gpus: tuple[int, Pair],
    folder: Path,
    of_one: tuple[list[Any], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    graphs: bool,
    rows: str,
) -> None:
    size, pair = gpus
    monkeypatch.setattr("breakgraph.engine.engine.start_ranks", pair.start_ranks)
    if rows == "of two" and size == 2:
        pytest.skip("two ranks are one group of two")
    groups = {"own": size, "of two": size // 2}.get(rows, 1)
    flags = {"moe_scatter": rows == "scattered", "dp_size": groups}
    prefills, tokens = outcome(folder, size, graphs, **flags)
    for one, several in zip(of_one[0], prefills, strict=True):
        assert (several.bucket is not None) == graphs
        torch.testing.assert_close(
            several.next_token_logits, one.next_token_logits, atol=1e-3, rtol=1e-3
        )
    assert [r.token_ids for r in tokens] == [r.token_ids for r in of_one[1]]


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_rank_killed_in_prefill_ends_the_launcher_by_name(tmp_path: Path) -> None:
    # Its GPU is left in an all-reduce, and so is the other's.
    save_byte_model(tmp_path)
    flags = ["--device", "cuda", "--enable-breakable-cuda-graph", "--cuda-graph-bs", "1", "4"]
    launcher = Launcher(tmp_path, [*flags, "--piecewise-cuda-graph-tokens", "64", "256"])
    try:
        check_kill("prefill", launcher)
    finally:
        launcher.end()


def test_on_cpus_collectives_replay_and_no_graph_outlives_its_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair()
    pair.call(check_captured_collectives)
    monkeypatch.setattr("breakgraph.engine.engine.start_ranks", pair.start_ranks)
    flags = {"model_path": str(folder), "device": "cpu", "skip_tokenizer_init": True}
    sizes = {"chunked_prefill_size": 64, "max_total_tokens": 512, "max_running_requests": 4}
    with Engine(tp_size=2, **flags, **sizes, **GRAPHS[True]) as engine:
        runners = engine.runner.graph_runners
        assert [len(runner.graphs) for runner in runners] == [2, 2]
    assert not any(runner.graphs for runner in runners)
    pair.stop()
    assert pair.children[0].returncode == 0

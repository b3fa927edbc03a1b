"""Compiled parts of a transformers class run in every replay, and give what the class gives.

``aot_eager`` stands in for the compiler's back end, which takes half a minute on a CPU.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import wrapped_support as support
from models_support import random_prompts

from breakgraph import Engine
from breakgraph.models.transformers_impl import TransformersModel, compiling, wrap_model
from breakgraph.models.transformers_impl.compiling import CompiledCall, compile_token_wise

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def wrapped(name: str = "LlamaForCausalLM") -> TransformersModel:
    return wrap_model(support.make_wrappable(name), fuse_parts=False)


def engine_of(model: TransformersModel, **flags: Any) -> Engine:
    settings = {"skip_tokenizer_init": True, "device": "cpu", "enable_breakable_cuda_graph": True}
    return Engine(model=model, model_path="tiny", **support.FLAGS | settings | flags)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("LlamaForCausalLM", {"LlamaRMSNorm", "LlamaMLP"}),
        ("MixtralForCausalLM", {"MixtralRMSNorm"}),  # what chooses experts is left alone
        ("GPTNeoXForCausalLM", {"GPTNeoXMLP"}),  # its norms are torch's own
        ("BertModel", {"BertSelfOutput", "BertIntermediate", "BertOutput"}),
    ],
)
def test_token_wise_parts_are_found_by_what_they_do(name: str, found: set[str]) -> None:
    parts = compiling._token_wise(wrapped(name).parts)
    assert {type(part.module).__name__ for part in parts} == found
    assert len(parts) == len({part.module for part in parts})


def test_a_replay_runs_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    prompts = random_prompts(support.LENGTHS)
    plain = [result.next_token_logits for result in engine_of(model).prefill(prompts)]
    texts = [result.token_ids for result in engine_of(model).generate(prompts, 3)]
    assert compile_token_wise(model, BACKEND) == 7
    called: list[int] = []
    run = CompiledCall.run

    def counted(self: CompiledCall, inputs: Any) -> torch.Tensor:
        called.append(inputs[0].shape[1])
        return run(self, inputs)

    monkeypatch.setattr(CompiledCall, "run", counted)
    engine = engine_of(model)
    called.clear()
    results = engine.prefill(prompts)
    assert all(result.bucket == 48 for result in results)
    assert called == [48] * 7
    for result, logits in zip(results, plain, strict=True):
        torch.testing.assert_close(result.next_token_logits, logits, atol=1e-4, rtol=1e-4)
    assert [result.token_ids for result in engine.generate(prompts, 3)] == texts


def test_nothing_is_compiled_after_the_start() -> None:
    model = wrapped()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    compile_token_wise(model, backend)
    kinds = 2  # norm and feed-forward, layers alike
    assert len(compiled) == kinds * len(compiling.WARM_ROWS)
    # Rows equal to other sizes of the model, too: 32 is the hidden size, 48 the inner one.
    for rows in (1, 2, 16, 32, 48, 97):
        for call in model.parts.switches.forwards.values():
            x = torch.randn(1, rows, 32)
            torch.testing.assert_close(call(x), call.plain(x))
    assert len(compiled) == kinds * len(compiling.WARM_ROWS)


def test_the_owner_calls_the_class_as_it_was() -> None:
    model = wrapped()
    compile_token_wise(model, BACKEND)
    engine_of(model).prefill([[1, 2, 3]])
    assert not any("forward" in vars(module) for module in model.inner.modules())


def test_what_the_compiler_refuses_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = wrapped()
    with caplog.at_level(logging.WARNING):
        assert compile_token_wise(model, backend) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("stays uncompiled: " in line for line in said)
    assert engine_of(model).prefill([[1, 2, 3]])[0].bucket == 48


def test_compiled_code_that_gives_something_else_is_not_used() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: [output * 2 for output in graph.forward(*args)]

    assert compile_token_wise(wrapped(), backend) == 0


def test_the_flag_compiles_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_token_wise, "__defaults__", (BACKEND,))
    with caplog.at_level(logging.INFO):
        engine_of(wrapped(), enable_torch_compile=True)
    assert "compiled 7 token-wise modules of LlamaForCausalLM in" in caplog.text


@pytest.mark.gpu
def test_code_compiled_for_a_gpu_runs_in_every_replay() -> None:
    """By the compiler that the flag takes, and one code for rows of any number."""
    inner = support.make_wrappable("LlamaForCausalLM").to("cuda")
    model = wrap_model(inner, fuse_parts=False)
    prompts = random_prompts(support.LENGTHS)
    plain = [one.next_token_logits for one in engine_of(model, device="cuda").prefill(prompts)]
    assert compile_token_wise(model) == 7
    for found, logits in zip(engine_of(model, device="cuda").prefill(prompts), plain, strict=True):
        assert found.bucket == 48
        torch.testing.assert_close(found.next_token_logits, logits, atol=1e-3, rtol=1e-3)

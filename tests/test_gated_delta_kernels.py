"""The gated delta rule and its step equal the recurrence, token by token, of each request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels import gated_delta_fla
from breakgraph.kernels.gated_delta import (
    gated_delta_rule,
    gated_delta_step,
    gated_delta_step_reference,
    require_gated_delta_kernels,
)

RESERVED, SLOTS = 0, 12
Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """The shapes of a layer."""

    key_heads: int = 2
    groups: int = 2
    key_dim: int = 8
    value_dim: int = 6

    @property
    def heads(self) -> int:
        return self.key_heads * self.groups


SMALL, LARGE = Heads(), Heads(key_heads=2, groups=2, key_dim=128, value_dim=128)


def make_inputs(
    rows: int,
    heads: Heads = SMALL,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """q, k, v out of one convolution's rows, a and b out of one projection's; a_log, dt_bias."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = heads.key_heads * heads.key_dim, heads.heads * heads.value_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    mixed = F.silu(normal(rows, 2 * keys + values)).to(device, dtype)
    q, k, v = mixed.split([keys, keys, values], 1)
    b, a = normal(rows, 2 * heads.heads).to(device, dtype).chunk(2, 1)
    return (
        q.unflatten(1, (-1, heads.key_dim)),
        k.unflatten(1, (-1, heads.key_dim)),
        v.unflatten(1, (-1, heads.value_dim)),
        *(a, b),
        torch.rand(heads.heads, generator=draw).mul(16).log().to(device),
        normal(heads.heads).to(device),
    )


def make_states(heads: Heads = SMALL, *, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """``[SLOTS, ...]``, one layer of two: slots lie apart."""
    draw = torch.Generator().manual_seed(seed)
    shape = (SLOTS, 2, heads.heads, heads.key_dim, heads.value_dim)
    return torch.randn(*shape, generator=draw).to(device)[:, 1]


def make_plan(
    lengths: Sequence[int],
    initial: Sequence[int],
    final: Sequence[int],
    *,
    requests: int | None = None,
    num_chunks: int | None = None,
    device: str = "cpu",
    chunk_size: int = 64,
) -> Plan:
    """The plan of a batch; in a bound of ``requests`` and ``num_chunks``, if given."""
    more = 0 if requests is None else requests - len(lengths)
    lengths = [*lengths, *[0] * more]
    chunks = [-(-length // chunk_size) for length in lengths]
    pairs = [(i, at) for i, count in enumerate(chunks) for at in range(count)]
    if num_chunks is not None:
        pairs += [(len(lengths) - 1, 0)] * (num_chunks - len(pairs))
    arrays = (
        [0, *torch.tensor(lengths).cumsum(0).tolist()],
        [*initial, *[-1] * more],
        [*final, *[RESERVED] * more],
        pairs,
        [0, *torch.tensor(chunks).cumsum(0).tolist()],
    )
    tensors = [torch.tensor(array, dtype=torch.int32, device=device) for array in arrays]
    return tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], chunk_size


def make_out(rows: int, heads: Heads = SMALL, **kwargs: object) -> torch.Tensor:
    return torch.full((rows, heads.heads, heads.value_dim), 7.0, **kwargs)  # type: ignore[call-overload]


def token_by_token(
    inputs: Inputs, start: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence as it is written, in float64: outputs and the last state of one request."""
    q, k, v, a, b = (tensor[rows].double().cpu() for tensor in inputs[:5])
    a_log, dt_bias = (tensor.double().cpu() for tensor in inputs[5:7])
    state, outs = start.double().cpu(), []
    groups = v.shape[1] // k.shape[1]
    for t in range(len(v)):
        query, key = (
            (x[t] / (x[t].square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(
                groups, 0
            )
            for x in (q, k)
        )
        fade = (-a_log.exp() * F.softplus(a[t] + dt_bias)).exp()
        state = state * fade[:, None, None]
        error = v[t] - (state * key[:, :, None]).sum(1)
        state = state + key[:, :, None] * (b[t].sigmoid()[:, None] * error)[:, None, :]
        outs.append((state * query[:, :, None]).sum(1) * q.shape[-1] ** -0.5)
    return torch.stack(outs), state


def by_request(
    inputs: Inputs, states: torch.Tensor, plan: Plan, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``out`` and ``states`` are to be, in float64."""
    bounds, initial, final = (tensor.tolist() for tensor in plan[:3])
    before = states.double().cpu()
    after, out = before.clone(), out.double().cpu().clone()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            start = torch.zeros_like(before[0]) if initial[i] < 0 else before[initial[i]]
            rows = slice(begin, end)
            out[rows], after[final[i]] = token_by_token(inputs, start, rows)
    return out, after


def error_of(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm; NaN is infinite."""
    error = (tensor.double().cpu() - expected).norm() / expected.norm()
    return float(error.nan_to_num(torch.inf))


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(sum),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    chunk_size=st.sampled_from([16, 64]),
    empty=st.integers(0, 2),
    padded=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_any_packed_batch(
    lengths: list[int],
    shape: tuple[int, int, int, int],
    chunk_size: int,
    empty: int,
    padded: int,
    seed: int,
) -> None:
    heads, requests = Heads(*shape), len(lengths)
    order = torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(seed)) + 1
    slots = order[:requests].tolist()
    initial = [slot if slot % 2 else -1 for slot in slots]
    plan = make_plan(
        *(lengths, initial, slots),
        requests=requests + empty,
        num_chunks=sum(-(-n // chunk_size) for n in lengths) + (3 if empty else 0),
        chunk_size=chunk_size,
    )
    rows = sum(lengths) + padded
    inputs, states = make_inputs(rows, heads, seed=seed), make_states(heads, seed=seed)
    for tensor in inputs[:5]:
        tensor[sum(lengths) :] = float("nan")
    out = make_out(rows, heads)
    expected = by_request(inputs, states, plan, out)
    gated_delta_rule(*inputs, states, *plan, out)
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(states.double(), expected[1], rtol=2e-4, atol=2e-5)


def test_as_transformers_does() -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    heads, lengths = Heads(2, 2, 16, 24), [100, 64, 7, 1]
    inputs, states = make_inputs(sum(lengths), heads), make_states(heads)
    plan = make_plan(lengths, [3, -1, 5, 1], [3, 2, 5, 1])
    before, out = states.clone(), make_out(sum(lengths), heads)
    gated_delta_rule(*inputs, states, *plan, out)
    q, k, v, a, b, a_log, dt_bias = inputs
    decay = -a_log.exp() * F.softplus(a + dt_bias)
    begin = 0
    for length, initial, final in zip(lengths, plan[1].tolist(), plan[2].tolist(), strict=True):
        rows = slice(begin, begin + length)
        for rule in (
            theirs.torch_chunk_gated_delta_rule,
            theirs.torch_recurrent_gated_delta_rule,
        ):
            expected, last = rule(
                *(tensor[None, rows] for tensor in (q, k, v, decay, b.sigmoid())),
                initial_state=None if initial < 0 else before[None, initial],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            torch.testing.assert_close(out[rows], expected[0], rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(states[final], last[0], rtol=2e-4, atol=2e-5)
        begin += length


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    inputs = make_inputs(172)
    whole, in_pieces = make_out(172), make_out(172)
    states, again = make_states(), make_states()
    gated_delta_rule(*inputs, states, *make_plan([172], [-1], [4]), whole)
    begin = 0
    for length in (1, 7, 64, 100):
        rows = slice(begin, begin + length)
        piece = tuple(tensor[rows] for tensor in inputs[:5])
        plan = make_plan([length], [4 if begin else -1], [4])
        gated_delta_rule(*piece, *inputs[5:], again, *plan, in_pieces[rows])
        begin += length
    torch.testing.assert_close(in_pieces, whole, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(again, states, rtol=2e-4, atol=2e-5)


def test_neighbours_do_not_matter() -> None:
    inputs, states, other = make_inputs(40), make_states(), make_states()
    out, alone = make_out(40), make_out(25)
    gated_delta_rule(*inputs, states, *make_plan([10, 25, 5], [1, 2, 3], [1, 2, 3]), out)
    middle = tuple(tensor[10:35] for tensor in inputs[:5])
    gated_delta_rule(*middle, *inputs[5:], other, *make_plan([25], [2], [2]), alone)
    assert torch.equal(out[10:35], alone)
    assert torch.equal(states[2], other[2])


def test_strong_decay_overflows_nothing() -> None:
    *inputs, a_log, dt_bias = make_inputs(64)
    states, out = make_states(), make_out(64)
    gated_delta_rule(
        *(*inputs, torch.full_like(a_log, 4.0), torch.full_like(dt_bias, 30.0)),
        *(states, *make_plan([64], [1], [1]), out),
    )
    assert out.isfinite().all()
    assert states.isfinite().all()


@pytest.mark.parametrize("step", [gated_delta_step, gated_delta_step_reference])
def test_a_step_is_the_rule_of_one_token(step: Callable[..., None]) -> None:
    inputs, slots = make_inputs(3), [4, 1, 9]
    states, again, out, stepped = make_states(), make_states(), make_out(3), make_out(3)
    gated_delta_rule(*inputs, states, *make_plan([1, 1, 1], slots, slots), out)
    step(*inputs, again, torch.tensor(slots), stepped)
    torch.testing.assert_close(stepped, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, states, rtol=1e-5, atol=1e-6)


def test_padded_rows_of_a_step_touch_the_reserved_slot_alone() -> None:
    inputs, states, out = make_inputs(4), make_states(), make_out(4)
    before = states.clone()
    gated_delta_step(*inputs, states, torch.tensor([5, RESERVED, RESERVED, RESERVED]), out)
    changed = (states != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [RESERVED, 5]
    expected, last = token_by_token(inputs, before[5], slice(0, 1))
    torch.testing.assert_close(out[:1].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states[5].double(), last, rtol=1e-5, atol=1e-6)


def test_a_captured_rule_reads_its_plan_at_replay() -> None:
    bound = {"requests": 4, "num_chunks": 6}
    first = make_plan([90, 30], [1, -1], [1, 2], **bound)
    inputs, states, out = make_inputs(130), make_states(), make_out(130)
    graph = BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        gated_delta_rule(*inputs, states, *first, out)
    for seed, (lengths, initial, final) in enumerate(
        [([5], [-1], [3]), ([1, 70, 40], [3, -1, 7], [3, 2, 7]), ([128], [2], [2])], start=1
    ):
        for tensor, new in zip(inputs, make_inputs(130, seed=seed), strict=True):
            tensor.copy_(new)
        for tensor, new in zip(
            first[:5], make_plan(lengths, initial, final, **bound), strict=False
        ):
            tensor.copy_(new)
        out.fill_(7.0)
        expected = by_request(inputs, states, first, out)
        graph.pool().poison()
        graph.replay()
        torch.testing.assert_close(out.double(), expected[0], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(states.double(), expected[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("step", [gated_delta_step, gated_delta_step_reference])
def test_a_captured_step_reads_its_slots_at_replay(step: Callable[..., None]) -> None:
    inputs, states, out = make_inputs(3), make_states(), make_out(3)
    slots, graph = torch.tensor([1, 2, RESERVED]), BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        step(*inputs, states, slots, out)
    slots.copy_(torch.tensor([2, 8, 6]))
    plan = make_plan([1, 1, 1], slots.tolist(), slots.tolist())
    expected = by_request(inputs, states, plan, out)
    graph.pool().poison()
    graph.replay()
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.double(), expected[1], rtol=1e-4, atol=1e-5)


def test_a_cpu_imports_neither_fla_nor_triton() -> None:
    script = """
import sys, torch
from breakgraph.kernels.gated_delta import gated_delta_step
heads = [torch.randn(1, 2, 4) for _ in range(3)]
gates, layer = [torch.randn(1, 2) for _ in range(2)], [torch.randn(2) for _ in range(2)]
state, out = torch.randn(3, 2, 4, 4), torch.empty(1, 2, 4)
gated_delta_step(*heads, *gates, *layer, state, torch.tensor([1]), out)
print([name for name in ("fla", "triton") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["triton", "fla"])
def test_without_the_kernels_the_error_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in (gated_delta_fla._kernels, gated_delta_fla._fla):
        made.cache_clear()
    if missing == "fla":
        monkeypatch.setattr(gated_delta_fla, "_kernels", lambda: None)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RuntimeError, match=r"pip install 'breakgraph\[linear\]'"):
        require_gated_delta_kernels()


GPU_TOLERANCE = {torch.float32: (5e-4, 5e-4), torch.bfloat16: (1e-2, 1e-2)}
"""Of outputs and of states, relative to the norm."""


def assert_cuda_is_right(
    lengths: list[int], heads: Heads, dtype: torch.dtype, *, seed: int = 0, empty: int = 0
) -> None:
    slots = list(range(1, len(lengths) + 1))
    plan = make_plan(
        *(lengths, [slot if slot % 2 else -1 for slot in slots], slots),
        requests=len(lengths) + empty,
        num_chunks=sum(-(-n // 64) for n in lengths) + 2 * empty,
        device="cuda",
    )
    rows = sum(lengths) + 3
    inputs = make_inputs(rows, heads, dtype=dtype, device="cuda", seed=seed)
    states = make_states(heads, device="cuda", seed=seed)
    for tensor in inputs[:5]:
        tensor[sum(lengths) :] = float("nan")
    before, out = states.clone(), make_out(rows, heads, dtype=dtype, device="cuda")
    expected = by_request(inputs, states, plan, out)
    gated_delta_rule(*inputs, states, *plan, out)
    assert torch.equal(out[-3:].float(), torch.full_like(out[-3:].float(), 7.0))
    of_out, of_states = GPU_TOLERANCE[dtype]
    assert error_of(out[:-3], expected[0][:-3]) < of_out
    for slot in slots:
        assert error_of(states[slot], expected[1][slot]) < of_states
    rest = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(states[rest], before[rest])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[1], [16], [64, 65, 1, 127], [300, 7]])
def test_kernels_equal_the_recurrence(lengths: list[int], dtype: torch.dtype) -> None:
    pytest.importorskip("fla")
    assert_cuda_is_right(lengths, LARGE, dtype)
    assert_cuda_is_right(lengths, LARGE, dtype, seed=1, empty=2)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(1, 3, 64, 32), Heads(2, 1, 16, 16)])
def test_kernels_of_other_shapes(heads: Heads) -> None:
    pytest.importorskip("fla")
    assert_cuda_is_right([70, 3], heads, torch.bfloat16, empty=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_step_kernel_equals_its_reference(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    for heads in (LARGE, Heads(1, 3, 20, 33)):
        inputs = make_inputs(5, heads, dtype=dtype, device="cuda")
        slots = torch.tensor([3, 9, 1, RESERVED, 2], device="cuda")
        states, again = make_states(heads, device="cuda"), make_states(heads, device="cuda")
        out, expected = (make_out(5, heads, dtype=dtype, device="cuda") for _ in range(2))
        gated_delta_step(*inputs, states, slots, out)
        gated_delta_step_reference(*inputs, again, slots, expected)
        assert error_of(states, again.double().cpu()) < 1e-6
        assert error_of(out, expected.double().cpu()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.gpu
def test_tensors_may_begin_anywhere() -> None:
    """Triton compiles for addresses of 16 bytes where it finds them; later ones may be others."""
    pytest.importorskip("fla")

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        room = tensor.new_empty(tensor.stride(0) * len(tensor) + 1)
        return room[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    inputs = make_inputs(150, LARGE, dtype=torch.bfloat16, device="cuda")
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    plan = make_plan([80, 70], [-1, 2], [1, 2], device="cuda")
    outs, lasts = [], []
    for place in (torch.Tensor.clone, moved):
        states = make_states(LARGE, device="cuda").contiguous()
        again = tuple(place(tensor) for tensor in inputs)
        states = place(states)
        out = place(make_out(150, LARGE, dtype=torch.bfloat16, device="cuda"))
        gated_delta_rule(*again, states, *[place(tensor) for tensor in plan[:5]], plan[5], out)
        outs.append(out)
        lasts.append(states)
    assert torch.equal(*outs)
    assert torch.equal(*lasts)


@pytest.mark.gpu
def test_a_cuda_graph_of_static_bounds_serves_other_batches() -> None:
    pytest.importorskip("fla")
    bound = {"requests": 5, "num_chunks": 8, "device": "cuda"}
    rows, of_out = 300, GPU_TOLERANCE[torch.bfloat16][0]
    inputs = make_inputs(rows, LARGE, dtype=torch.bfloat16, device="cuda")
    states = make_states(LARGE, device="cuda")
    out = make_out(rows, LARGE, dtype=torch.bfloat16, device="cuda")
    plan = make_plan([200, 100], [-1, -1], [1, 2], **bound)  # type: ignore[arg-type]
    gated_delta_rule(*inputs, states, *plan, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_delta_rule(*inputs, states, *plan, out)
    for seed, (lengths, initial, final) in enumerate(
        [([5], [-1], [3]), ([1, 70, 64, 40], [3, -1, 7, 1], [3, 2, 7, 1]), ([300], [2], [2])],
        start=1,
    ):
        fresh = make_inputs(rows, LARGE, dtype=torch.bfloat16, device="cuda", seed=seed)
        for tensor, new in zip(inputs, fresh, strict=True):
            tensor.copy_(new)
        new_plan = make_plan(lengths, initial, final, **bound)  # type: ignore[arg-type]
        for tensor, new in zip(plan[:5], new_plan, strict=False):
            tensor.copy_(new)
        out.fill_(7.0)
        expected = by_request(inputs, states, plan, out)
        graph.replay()
        assert error_of(out, expected[0]) < of_out
        assert error_of(states, expected[1]) < of_out
        assert (out[sum(lengths) :] == 7.0).all()


@pytest.mark.gpu
def test_calls_wait_for_nothing() -> None:
    pytest.importorskip("fla")
    inputs = make_inputs(100, LARGE, dtype=torch.bfloat16, device="cuda")
    states = make_states(LARGE, device="cuda")
    out = make_out(100, LARGE, dtype=torch.bfloat16, device="cuda")
    plans = [make_plan(lengths, [-1] * 2, [1, 2], device="cuda") for lengths in ([60, 40], [1, 99])]
    slots = torch.arange(100, device="cuda") % SLOTS
    gated_delta_rule(*inputs, states, *plans[0], out)
    gated_delta_step(*inputs, states, slots, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans:
            gated_delta_rule(*inputs, states, *plan, out)
        gated_delta_step(*inputs, states, slots, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")

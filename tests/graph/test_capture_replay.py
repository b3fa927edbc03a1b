"""A replay runs the captured segments and breaks over the captured addresses."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    BreakableGraphError,
    break_graph,
    eager_on_graph,
    enable_breakable_cuda_graph,
    is_in_breakable_cuda_graph,
)

from .support import SHAPE, capture, check_replays, mix, mixed


def with_out(x):
    out = torch.empty_like(x)
    mix(x, out)
    return out


def three_breaks(x):
    for _ in range(3):
        x = (with_out(x * 0.1) + 1).sin()
    return x


@pytest.mark.parametrize(
    ("fn", "segments", "breaks"),
    [
        pytest.param(lambda x: (x * 2 + 1).relu(), 1, 0, id="no break"),
        pytest.param(lambda x: mixed(x) + 1, 1, 1, id="first"),
        pytest.param(lambda x: mixed(x * 2) + 1, 2, 1, id="middle"),
        pytest.param(lambda x: mixed(x * 2), 1, 1, id="last"),
        pytest.param(lambda x: mixed(x), 0, 1, id="a break alone"),
        pytest.param(lambda x: mixed(mixed(x * 2)) + 1, 2, 2, id="no segment between"),
        pytest.param(lambda x: with_out(x * 2) + 1, 2, 1, id="into out"),
        pytest.param(three_breaks, 4, 3, id="three"),
    ],
)
def test_replay_equals_eager(fn, segments, breaks, device):
    graph = check_replays(fn, device)
    assert (graph.num_segments, graph.num_breaks) == (segments, breaks)


def test_an_empty_capture_replays_nothing(device):
    graph, _ = capture(lambda: None, device)
    graph.replay()
    assert graph.steps == ()


def test_a_dry_capture_calls_no_break_that_writes_in_place(device):
    called = []

    @eager_on_graph(in_place=True)
    def double(x, out):
        called.append(x)
        torch.mul(x, 2, out=out)

    @eager_on_graph()
    def fresh(x):
        return x.cumsum(0)

    def program(x):
        x = x + 1
        out = torch.empty_like(x)
        double(x, out)
        return fresh(out.relu()) - 1

    x = torch.randn(SHAPE, device=device)
    graph, out = capture(lambda: program(x), device, dry=True)
    assert not called and graph.num_segments == 3
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, ((x + 1) * 2).relu().cumsum(0) - 1)
    assert len(called) == 2


def test_capture_itself_gives_the_results(device):
    x = torch.randn(SHAPE, device=device)
    _, out = capture(lambda: three_breaks(x), device)
    torch.testing.assert_close(out, three_breaks(x))


def test_python_does_not_run_again(device):
    calls = []
    x = torch.ones(SHAPE, device=device)

    def fn():
        calls.append("segment")
        return x * len(calls)

    graph, out = capture(fn, device)
    graph.replay()
    assert calls == ["segment"] and out.eq(1).all()


def test_break_graph_splits_a_segment(device):
    def fn(x):
        y = x * 2
        break_graph()
        return y + 1

    graph = check_replays(fn, device)
    assert [step.name for step in graph.steps] == ["segment 0", "break_graph", "segment 1"]


def test_steps_are_named_after_their_breaks(device):
    graph = check_replays(lambda x: mixed(x * 2) + 1, device)
    assert [step.name for step in graph.steps] == ["segment 0", "mixed", "segment 1"]


def test_in_place_ops_on_outside_buffers_run_at_capture_and_at_each_replay(device):
    counter, rows = torch.zeros(1, device=device), torch.zeros(SHAPE, device=device)
    slots = torch.tensor([3, 0], device=device)

    def fn():
        counter.add_(1)
        rows.index_copy_(0, slots, counter.expand(2, SHAPE[1]))

    graph, _ = capture(fn, device)
    slots.copy_(torch.tensor([1, 2]))
    graph.replay()
    graph.replay()
    assert counter.item() == 3
    assert rows[:, 0].tolist() == [1, 3, 3, 1]


def in_place_views(x):
    y = x * 2
    y.t_().unsqueeze_(0).squeeze_(0)
    return y + 1


def views_of_what_a_break_wrote(x):
    out = torch.zeros(2 * x.shape[0], x.shape[1], device=x.device)
    mix(x * 2, out[: x.shape[0]])
    return out.flip(0) + out[:1]


def break_on_a_view(x):
    y = x * 2
    return mixed(y.t()[1:]) + y.t()[1:]


def many_outputs(x):
    values, order = (x * 2).sort(dim=1)
    left, right = (x + 1).chunk(2, dim=1)
    top = x.topk(3, dim=1).values.sum(1, keepdim=True)
    return values + order + torch.cat([right, left], 1) + x.max(1, keepdim=True).values + top


def out_arguments(x):
    y = torch.empty_like(x)
    torch.mul(x, 3, out=y)
    return torch.sub(y, 1, out=torch.empty_like(y)) * 2


def constants(x):
    return x * torch.tensor(3.0) + torch.arange(8, device=x.device) + torch.ones_like(x)


def in_place_chain(x):
    y = x.clone()
    y[1:].add_(y[:-1].clone()).mul_(2)
    y[x > 0] = 0.5
    return torch._foreach_mul([y, x], 2)[0]


def gathered(x):
    counts = torch.arange(4, device=x.device)
    spread = x.repeat_interleave(counts, dim=0, output_size=6)
    return spread + x[counts.repeat_interleave(2)[:6]] * torch.tensor(3)


def linear_algebra(x):
    z = torch.complex(x[:, :4], x[:, 4:])
    return torch.view_as_real(z.conj() @ z.mH) + (z @ z).imag[..., None]


@pytest.mark.parametrize(
    "fn",
    [
        in_place_views,
        views_of_what_a_break_wrote,
        break_on_a_view,
        many_outputs,
        out_arguments,
        constants,
        in_place_chain,
        gathered,
        linear_algebra,
    ],
)
def test_kinds_of_ops(fn, device):
    check_replays(fn, device)


def test_a_later_in_place_view_of_an_outside_tensor_does_not_reach_the_capture(device):
    x, row = torch.randn(4, 4, device=device), torch.randn(4, 1, device=device)
    graph, out = capture(lambda: mixed(x + row) + row, device)
    before = out.clone()
    row.t_()
    graph.replay()
    torch.testing.assert_close(out, before)


def test_parameters_are_read_by_address(device):
    linear = torch.nn.Linear(8, 8).to(device)
    x = torch.randn(SHAPE, device=device)
    graph, out = capture(lambda: linear(x), device)
    assert not out.requires_grad
    with torch.no_grad():
        linear.weight.mul_(2)
    graph.replay()
    torch.testing.assert_close(out, linear(x).detach())
    weight = linear.weight.data
    linear.weight.data = torch.zeros_like(weight)
    graph.replay()
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, linear.bias).detach())


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__
)
def test_replay_under_any_grad_mode(mode, device):
    linear = torch.nn.Linear(8, 8).to(device)

    def fn(x):
        out = torch.empty_like(x)
        mix(linear(x), out)
        return mixed(out) + linear(x)

    x = torch.randn(SHAPE, device=device)
    graph, out = capture(lambda: fn(x), device)
    with mode():
        x.copy_(torch.ones_like(x))
        graph.replay()
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    with torch.no_grad():
        torch.testing.assert_close(out, fn(x))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(8, 8)
        self.calls = 0

    @eager_on_graph()
    def attend(self, x, *, scale=1.0):
        """Attends."""
        self.calls += 1
        return self.projection(x).cumsum(0) * scale

    def forward(self, x):
        return self.attend(x * 2, scale=0.5) + self.attend(x, scale=1.5)


@torch.no_grad()
def test_methods_are_breaks(device):
    layer = Layer().to(device)
    graph = check_replays(layer, device)
    assert [step.name for step in graph.steps][1] == "Layer.attend"
    before = layer.calls
    graph.replay()
    assert layer.calls == before + 2
    assert Layer.attend.__doc__ == layer.attend.__doc__ == "Attends."


@torch.no_grad()
def test_modules_and_partials_are_breaks(device):
    attend = eager_on_graph()(Layer().to(device))
    scaled = eager_on_graph()(functools.partial(torch.mul, other=3))
    graph = check_replays(lambda x: scaled(attend(x * 2) + 1), device)
    assert [step.name for step in graph.steps] == ["segment 0", "Layer", "segment 1", "partial"]


@torch.no_grad()
def test_a_module_whose_forward_is_the_break(device):
    class Mixer(torch.nn.Linear):
        @eager_on_graph()
        def forward(self, x):
            return super().forward(x).cumsum(0)

    mixer = Mixer(8, 8).to(device)
    assert check_replays(lambda x: mixer(x * 2) + 1, device).num_breaks == 1


def test_a_break_given_a_module_and_constants(device):
    @eager_on_graph()
    def apply(module, x, dims, *, dtype, name):
        assert name == "mixer"
        return module(x.permute(dims)).to(dtype)

    softmax = torch.nn.Softmax(-1)
    check_replays(
        lambda x: apply(softmax, x * 2, (1, 0), dtype=torch.float64, name="mixer") + 1, device
    )


def test_breaks_nest_into_one(device):
    seen = []

    @eager_on_graph()
    def outer(x, lengths=(1, 2)):
        inner(x, [len(seen)])  # an argument that a break of its own could not have
        return mixed(x) + 1

    @eager_on_graph()
    def inner(x, live):
        seen.append(live)

    graph = check_replays(lambda x: outer(x * 2) * 2, device)
    assert graph.num_breaks == 1 and len(seen) == 7


def test_outside_a_capture_a_break_is_the_plain_function(device):
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    given = []

    @eager_on_graph()
    def keep(x, live):
        given.append((x, live))
        return live

    live = [1]
    assert keep(x, live) is live and given == [(x, live)]
    assert mixed(x).requires_grad
    assert break_graph() is None


def test_enable_false_returns_the_function_itself():
    def fn(x):
        return x

    assert eager_on_graph(enable=False)(fn) is fn
    assert eager_on_graph()(fn).__wrapped__ is fn


def test_is_in_breakable_cuda_graph(device):
    seen = []

    @eager_on_graph()
    def note(x):
        seen.append(is_in_breakable_cuda_graph())

    def fn():
        seen.append(is_in_breakable_cuda_graph())
        note(x * 2)
        seen.append(is_in_breakable_cuda_graph())

    x = torch.ones(SHAPE, device=device)
    assert not is_in_breakable_cuda_graph()
    graph, _ = capture(fn, device)
    assert seen == [True, True, True] and not is_in_breakable_cuda_graph()
    graph.replay()
    assert seen == [True] * 4 and not is_in_breakable_cuda_graph()
    fn()
    assert seen[4:] == [False] * 3
    with enable_breakable_cuda_graph():
        note(x)
    assert seen[7:] == [True] and not is_in_breakable_cuda_graph()


def test_replaying_nothing_is_refused(device):
    graph = BreakableCUDAGraph()
    with pytest.raises(BreakableGraphError, match="nothing is captured"):
        graph.replay()
    with pytest.raises(BreakableGraphError, match="has no pool"):
        graph.pool()
    x = torch.ones(SHAPE, device=device)
    capture(lambda: mixed(x * 2), device, graph)
    graph.replay()
    graph.reset()
    assert graph.num_segments == graph.num_breaks == 0
    with pytest.raises(BreakableGraphError, match="Capture first"):
        graph.replay()
    graph.reset()


def test_capturing_again_replaces_what_was_captured(device):
    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: mixed(x * 2), device)
    _, out = capture(lambda: x + 4, device, graph)
    x.zero_()
    graph.replay()
    assert graph.num_breaks == 0 and out.eq(4).all()


def test_captures_do_not_nest(device):
    x = torch.ones(SHAPE, device=device)
    inner = BreakableCUDAGraph()

    def fn():
        y = x * 2
        with (
            pytest.raises(BreakableGraphError, match="do not nest"),
            BreakableCUDAGraphCapture(inner, device=device),
        ):
            pass
        return y + 1

    graph, out = capture(fn, device)
    x.zero_()
    graph.replay()
    assert out.eq(1).all()


def test_replay_inside_a_segment_is_refused_and_inside_a_break_runs(device):
    x = torch.ones(SHAPE, device=device)
    first, doubled = capture(lambda: x * 2, device)

    @eager_on_graph()
    def nested():
        first.replay()
        return doubled.clone()

    graph, out = capture(lambda: nested() + 1, device)
    x.fill_(5)
    graph.replay()
    assert out.eq(11).all()
    with pytest.raises(BreakableGraphError, match="inside a segment"):
        capture(first.replay, device)


def test_inference_mode_is_refused(device):
    x = torch.ones(SHAPE, device=device)
    with torch.inference_mode(), pytest.raises(BreakableGraphError, match="no_grad"):
        capture(lambda: x * 2, device)

    def inside():
        with torch.inference_mode():
            return x * 2

    with pytest.raises(BreakableGraphError, match=r"test_capture_replay\.py"):
        capture(inside, device)


def test_a_break_may_use_inference_mode(device):
    @eager_on_graph()
    @torch.inference_mode()
    def infer(x):
        return x.cumsum(0)

    check_replays(lambda x: infer(x * 2) + 1, device)


class Counting(TorchDispatchMode):
    """Counts the ops that it sees."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_a_break_runs_under_no_mode_of_the_capture(device):
    depths = []

    @eager_on_graph()
    def note(x):
        depths.append(len(_get_current_dispatch_mode_stack()))
        return x.cumsum(0)

    check_replays(lambda x: note(note(x * 2) + 1) + 1, device)
    assert set(depths) == {0}


def test_modes_of_the_captured_code_see_segments_and_breaks(device):
    """Also where one begins before a break and ends after it, above the mode of the capture."""
    inner, outer = Counting(), Counting()

    def fn(x):
        with outer:
            y = mixed(x * 2)
            with inner:
                y = mixed(y + 1) * 2
        return mixed(y) + y

    graph = check_replays(fn, device)
    assert (graph.num_segments, graph.num_breaks) == (4, 3)
    assert outer.seen > inner.seen > 0 and not _get_current_dispatch_mode_stack()


def test_an_exception_in_a_break_at_replay_leaves_the_graph_usable(device):
    live = {"fail": False}

    @eager_on_graph()
    def fragile(x):
        if live["fail"]:
            raise ValueError("no such batch")
        return x.cumsum(0)

    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: fragile(x * 2) + 1, device)
    live["fail"] = True
    with pytest.raises(ValueError, match="no such batch"):
        graph.replay()
    assert not is_in_breakable_cuda_graph()
    live["fail"] = False
    x.fill_(2)
    graph.replay()
    torch.testing.assert_close(out, (x * 2).cumsum(0) + 1)


def test_other_devices_are_refused():
    with pytest.raises(BreakableGraphError, match="cuda and cpu"):
        BreakableCUDAGraphCapture(BreakableCUDAGraph(), device="meta")

"""Full prefill graphs give what eager gives; what they cannot hold runs otherwise, and is said."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_support import Requests, make_hybrid_runner, outcomes, save_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import make_noise, make_reference, poison, random_prompts, save_checkpoint
from prefill_support import BUCKETS, assert_replay_equals_eager, make_batch, make_runner
from test_hybrid_graphs import assert_same_outcome
from test_mla import make_deepseek

from breakgraph.attention import Attention, TorchFlashBackend, TorchNativeBackend
from breakgraph.distributed import SINGLE
from breakgraph.forward import ForwardBatch, LayerInputs, get_forward_context
from breakgraph.graph import RefusedOpError
from breakgraph.runner import DispatchReason, GraphCaptureError, ModelRunner
from breakgraph.runner.buckets import derive_buckets
from breakgraph.runner.costs import ForwardTimes, Line, PrefillCosts
from breakgraph.runner.ladders import Ladders
from breakgraph.runner.measuring import CostFile, CostMeter, costs_of
from breakgraph.server_args import ServerArgs

SLOTS = 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FULL: dict[str, Any] = {
    "enable_breakable_cuda_graph": False,
    "cuda_graph_backend_prefill": "full",
    "prefill_graph_requests": SLOTS,
}
AUTO = {**FULL, "cuda_graph_backend_prefill": "auto"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16, max_position_embeddings=192)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def runner(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ModelRunner]:
    flags = {} if request.param == "cpu" else {"attention_backend": "torch_flash"}
    runner = make_runner(checkpoint, request.param, **FULL, **flags)
    make_noise(runner)
    yield runner
    del runner


@pytest.fixture(scope="module")
def auto(checkpoint: Path) -> ModelRunner:
    return make_runner(checkpoint, "cpu", **AUTO)


def plain(lengths: list[int], seed: int = 0) -> ForwardBatch:
    return make_batch([(length, 0) for length in lengths], seed)


# What a full graph gives.


@st.composite
def few_requests(draw: st.DrawFn) -> list[int]:
    count = draw(st.integers(1, SLOTS))
    return [draw(st.integers(1, BUCKETS[-1] // count)) for _ in range(count)]


@given(lengths=few_requests(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_replay_equals_eager_for_any_batch_within_the_slots(
    runner: ModelRunner, lengths: list[int], seed: int
) -> None:
    batch = plain(lengths, seed)
    if runner.dispatch(batch).bucket is not None:
        assert_replay_equals_eager(runner, batch)


def test_every_shape_within_the_slots_of_a_small_bucket(runner: ModelRunner) -> None:
    """All counts of requests and all lengths, their order included; 16 tokens or fewer."""
    sizes = (1, 2, 3, 5, 7)
    shapes = [
        list(shape)
        for count in range(1, SLOTS + 1)
        for shape in product(sizes, repeat=count)
        if sum(shape) <= BUCKETS[0]
    ]
    assert len(shapes) > 250
    for seed, shape in enumerate(shapes):
        assert_replay_equals_eager(runner, plain(shape, seed))


def test_a_prefill_is_one_launch(runner: ModelRunner) -> None:
    result = runner.forward(plain([20, 3]))
    assert result.graph is not None
    assert (result.graph.num_segments, result.graph.num_breaks) == (1, 0)
    assert result.dispatch.kind == "full"
    said = runner.explain(plain([20, 3]))
    assert "of the full graphs" in said and "full graphs has 1 segments and 0 breaks" in said


def test_interleaved_shapes_do_not_disturb_each_other(runner: ModelRunner) -> None:
    for seed, shape in enumerate([[60], [5] * 3, [128], [1] * 4, [30, 2], [16], [1]] * 2):
        assert_replay_equals_eager(runner, plain(shape, seed))


def test_what_a_larger_batch_left_in_the_slots_is_not_seen(runner: ModelRunner) -> None:
    expected = runner.forward(plain([11])).next_token_logits
    runner.forward(plain([30, 20, 40, 30], seed=5))
    assert torch.equal(runner.forward(plain([11])).next_token_logits, expected)


def test_padded_rows_stay_finite_whatever_the_pool_held(runner: ModelRunner) -> None:
    graphs = runner.full_graph_runner
    assert graphs is not None
    poison(runner)
    for cache in runner.kv_pool.tensors():
        cache[0] = 0
    runner.forward(plain([9, 8]))
    assert graphs._outputs[32].isfinite().all()
    assert all(cache[0].isfinite().all() for cache in runner.kv_pool.tensors())


@pytest.mark.parametrize("left", [None, 3])
@pytest.mark.parametrize("right", [0, None, 2])
def test_the_static_plan_of_flash_attention_keeps_to_each_sequence(
    left: int | None, right: int | None
) -> None:
    """On a CPU its op is the reference, which is compared with a request at a time here."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2))
    layer = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
    layer.left, layer.right = left, right
    backend = TorchFlashBackend(
        device=torch.device("cpu"), max_requests=SLOTS, max_context_tokens=0, static=True
    )
    backend.init_forward_metadata(plain([5, 1, 9]))
    rows = torch.arange(20)
    backend.begin_layers(LayerInputs(q.flatten(1), rows, rows, rows[:1]))
    out = torch.full_like(q, float("nan"))
    backend.forward(layer, q, k, v, out)
    assert torch.equal(out[15:], torch.zeros(5, 4, 8))
    for begin, end in ((0, 5), (5, 6), (6, 15)):
        before = torch.arange(end - begin).unsqueeze(1) - torch.arange(end - begin)
        seen = before >= (-right if right is not None else -99)
        seen &= before <= (left if left is not None else 99)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end].repeat_interleave(2, 1))
        weights = (scores * layer.scale).masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[begin:end].repeat_interleave(2, 1))
        torch.testing.assert_close(out[begin:end], expected)


def test_attention_with_frozen_lengths_is_still_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager_plan(self: Attention, q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        backend = TorchNativeBackend(q.device)
        backend.init_forward_metadata(get_forward_context().batch)
        out = torch.zeros_like(q)
        backend.forward(self, q, *rest, out)
        return out

    monkeypatch.setattr(Attention, "attend", eager_plan)
    with pytest.raises(GraphCaptureError, match="128-token") as error:
        make_runner(checkpoint, "cpu", **FULL)
    assert isinstance(error.value.__cause__, RefusedOpError)
    # With graphs of another kind to fall back on it is no error, unless it is to be one.
    with pytest.raises(GraphCaptureError):
        make_runner(checkpoint, "cpu", **AUTO, cuda_graph_failure="error")


# What it cannot hold.


def test_more_requests_than_slots_run_eagerly_and_it_is_said(runner: ModelRunner) -> None:
    batch = plain([3] * (SLOTS + 1))
    before = runner.dispatch_counts[DispatchReason.TOO_MANY_FOR_SLOTS]
    result = runner.forward(batch)
    assert (result.dispatch.bucket, result.graph) == (None, None)
    assert result.dispatch.reason is DispatchReason.TOO_MANY_FOR_SLOTS
    assert runner.dispatch_counts[DispatchReason.TOO_MANY_FOR_SLOTS] == before + 1
    said = runner.explain(batch)
    assert "run eagerly: its graphs have 4 request slots" in said
    assert "--prefill-graph-requests" in said


def test_cached_prefixes_run_eagerly_and_it_is_said(runner: ModelRunner) -> None:
    batch = make_batch([(20, 0), (7, 5)])
    result = runner.forward(batch)
    assert result.dispatch.reason is DispatchReason.PREFIX
    assert "--cuda-graph-backend-prefill auto" in runner.explain(batch)
    eager = runner.forward(batch, allow_graph=False).next_token_logits
    assert torch.equal(result.next_token_logits, eager)


def test_auto_replays_in_breakable_graphs_what_full_ones_cannot_hold(auto: ModelRunner) -> None:
    for batch, kind, said in (
        (plain([20, 3]), "full", "in bucket 32 (9 rows of padding) of the full graphs"),
        (plain([3] * 5), "breakable", "not full: its graphs have 4 request slots"),
        (make_batch([(7, 5)]), "breakable", "not full: some are behind a cached prefix"),
    ):
        assert_replay_equals_eager(auto, batch)
        dispatch = auto.dispatch(batch)
        assert dispatch.kind == kind and said in dispatch.describe()
    # A full bucket that is out of service leaves the breakable one.
    assert auto.full_graph_runner is not None
    auto.full_graph_runner.retire(64)
    try:
        assert_replay_equals_eager(auto, plain([50]))
        assert "not full: bucket 64 is out of service" in auto.explain(plain([50]))
    finally:
        auto.full_graph_runner.out_of_service.clear()


def test_graphs_of_both_kinds_share_one_pool_and_one_output(auto: ModelRunner) -> None:
    assert auto.full_graph_runner is not None and auto.graph_runner is not None
    assert auto.full_graph_runner.pool is auto.graph_runner.pool
    assert auto.full_graph_runner._output is auto.graph_runner._output
    for batch in (plain([60]), plain([12] * 5), plain([20, 9]), make_batch([(20, 9)])):
        assert_replay_equals_eager(auto, batch)


def test_latent_attention_has_no_full_graphs(tmp_path: Path) -> None:
    folder = save_checkpoint(make_deepseek("v2-lite"), tmp_path)
    with pytest.raises(ValueError, match="no plan that graphs can hold; use breakable, or auto"):
        make_runner(folder, "cpu", **FULL, piecewise_cuda_graph_tokens=(16,))
    runner = make_runner(folder, "cpu", **AUTO, piecewise_cuda_graph_tokens=(16,))
    assert runner.full_graph_runner is None and runner.graph_runner is not None


# Hybrids.


@pytest.fixture(scope="module", params=["nemotron_h", "qwen3_next"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = save_hybrid(request.param, tmp_path_factory.mktemp(request.param))
    runner = make_hybrid_runner(folder, **AUTO, piecewise_cuda_graph_tokens=(16, 64, 160))
    make_noise(runner)
    return runner


@pytest.mark.parametrize(
    "lengths", [(1,), (63,), (65, 64), (1, 2, 3, 4), (16,), (1, 65, 64, 30)], ids=str
)
def test_a_hybrid_is_one_segment_and_leaves_the_states_that_eager_leaves(
    hybrid: ModelRunner, lengths: tuple[int, ...]
) -> None:
    with Requests(hybrid) as requests:
        rows = requests.open(len(lengths))
        batch = requests.batch(rows, random_prompts(lengths))
        full, eager = outcomes(hybrid, [(batch, {}), (batch, {"allow_graph": False})])
        assert full.result.dispatch.kind == "full" and full.result.graph is not None
        assert (full.result.graph.num_segments, full.result.graph.num_breaks) == (1, 0)
        torch.testing.assert_close(full.logits, eager.logits, rtol=1e-5, atol=2e-4)
        for one, other in zip(full.states, eager.states, strict=True):
            torch.testing.assert_close(one[rows], other[rows], rtol=1e-5, atol=2e-4)


def test_a_hybrid_with_more_requests_or_a_prefix_takes_the_breaks(hybrid: ModelRunner) -> None:
    with Requests(hybrid) as requests:
        for lengths, prefixes in (([3] * 5, [0] * 5), ([9, 4], [0, 7])):
            rows = requests.open(len(lengths), prefixes)
            batch = requests.batch(rows, random_prompts(lengths))
            graph, eager = outcomes(hybrid, [(batch, {}), (batch, {"allow_graph": False})])
            assert graph.result.dispatch.kind == "breakable"
            torch.testing.assert_close(graph.logits, eager.logits, rtol=1e-5, atol=2e-4)
            requests.close()


# Other ways to run.


def test_a_class_of_transformers_is_captured_whole(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, model_impl="transformers")
    for seed, lengths in enumerate([[60], [5, 9, 2], [16]]):
        batch = plain(lengths, seed)
        assert_replay_equals_eager(runner, batch)
        graph = runner.forward(batch).graph
        assert graph is not None and graph.num_breaks == 0


def test_attention_that_no_backend_has_still_breaks(tmp_path: Path) -> None:
    config = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
    folder = save_checkpoint(make_reference("Gemma2ForCausalLM", **config), tmp_path)
    runner = make_runner(folder, "cpu", **FULL, piecewise_cuda_graph_tokens=(32,))
    for seed, lengths in enumerate([[30], [5, 9, 2]]):
        assert_replay_equals_eager(runner, plain(lengths, seed))
    assert runner.full_graph_runner is not None
    assert runner.full_graph_runner.graphs[32].num_breaks == 2


def test_debug_mode_runs_python_each_time(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, debug_cuda_graph=True)
    expected = runner.forward(plain([20, 3]), allow_graph=False).next_token_logits
    result = runner.forward(plain([20, 3]))
    assert result.dispatch.kind == "full" and result.graph is not None
    assert result.graph.num_breaks == 1
    torch.testing.assert_close(result.next_token_logits, expected, rtol=1e-5, atol=1e-5)


def test_a_stale_plan_is_found_by_verification(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(checkpoint, "cpu", **FULL, verify_prefill_graph=1.0)
    assert runner.verifier is not None
    for batch in (plain([20, 3]), plain([9])):
        check = runner.forward(batch).verification
        assert check is not None
        check()
    assert runner.verifier.verified == 2
    monkeypatch.setattr("breakgraph.attention.torch_native.PackedLengths.send", lambda *_: None)
    check = runner.forward(plain([10, 13])).verification
    assert check is not None
    check()
    (found,) = runner.verifier.mismatches
    assert found.place == "in the full graph, which has no break to look at"
    again = runner.forward(plain([10, 13])).dispatch
    assert (again.bucket, again.reason) == (None, DispatchReason.OUT_OF_SERVICE)


# What is measured, and decides.


def flat(*ms: float) -> ForwardTimes:
    return ForwardTimes(Line(BUCKETS, ms))


def test_auto_takes_what_was_measured_to_be_fastest(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", **AUTO)
    full, breakable = runner.full_graph_runner, runner.graph_runner
    assert full is not None and breakable is not None
    eager = flat(9, 9, 9, 9)
    full.costs = PrefillCosts(eager, flat(1, 5, 8, 12), margin=1.0)
    breakable.costs = PrefillCosts(eager, flat(2, 4, 8, 10), margin=1.0)
    for tokens, bucket, kind in ((16, 16, "full"), (32, 32, "breakable"), (50, 64, "full")):
        dispatch = runner.forward(plain([tokens])).dispatch
        assert (dispatch.bucket, dispatch.kind) == (bucket, kind)
    dispatch = runner.forward(plain([100])).dispatch
    assert dispatch.reason is DispatchReason.EAGER_FASTER
    assert "not full: bucket 32 was measured to be slower" in runner.explain(plain([32]))


def test_what_more_requests_change_is_part_of_the_decision() -> None:
    one = Line(BUCKETS, (8, 8, 8, 8))
    eager = ForwardTimes(one, Line(BUCKETS, (-4, -4, -4, -4)), requests=4)
    costs = PrefillCosts(eager, flat(6, 6, 6, 6), margin=1.0)
    assert [costs.replay_pays(20, 32, requests) for requests in (1, 2, 4)] == [True, False, False]
    assert eager.at(32, 2) == pytest.approx(8 - 4 * (1 / 2) / (3 / 4))
    assert eager.at(32, 9) == 4


@given(
    st.lists(st.floats(0.1, 50), min_size=8, max_size=8),
    st.lists(st.floats(0.1, 50), min_size=8, max_size=8),
    st.integers(1, 128),
    st.integers(1, 6),
)
def test_auto_is_never_slower_than_the_best_way_by_its_own_times(
    auto: ModelRunner, full_ms: list[float], other_ms: list[float], tokens: int, requests: int
) -> None:
    eager_ms = sorted(other_ms[4:])
    full, breakable = auto.full_graph_runner, auto.graph_runner
    assert full is not None and breakable is not None
    try:
        full.costs = PrefillCosts(flat(*eager_ms), flat(*full_ms[:4]), margin=1.0)
        breakable.costs = PrefillCosts(flat(*eager_ms), flat(*other_ms[:4]), margin=1.0)
        requests = min(requests, tokens)
        batch = ForwardBatch.dummy(tokens, auto.context_length, requests)
        dispatch = auto.dispatch(batch)
        bucket = next(bucket for bucket in BUCKETS if bucket >= tokens)
        ways = {"eager": full.costs.eager.at(tokens)}
        if bucket <= 2 * max(tokens, 16):
            ways["breakable"] = breakable.costs.replay.at(bucket)
            if requests <= SLOTS:
                ways["full"] = full.costs.replay.at(bucket)
        assert ways["eager" if dispatch.bucket is None else dispatch.kind] == min(ways.values())
    finally:
        full.costs = breakable.costs = None


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize(("ms_a_thousand", "host_ms"), [(4.0, 5.5), (25.0, 7.0), (25.0, 60.0)])
def test_auto_is_within_a_fiftieth_of_the_best_at_every_size(
    monkeypatch: pytest.MonkeyPatch, tile: int, ms_a_thousand: float, host_ms: float
) -> None:
    """Of a GPU that works in waves of tiles, so that a token more may cost a wave."""
    ladder = derive_buckets(8192)

    def busy(rows: int) -> float:
        waves = math.ceil(math.ceil(rows / tile) * 32 / 132)
        return 0.66 + ms_a_thousand * (0.6 * waves * tile * 132 / 32 + 0.4 * rows) / 1000

    truth = {
        "full": lambda rows: busy(rows) + 0.05,
        "breakable": lambda rows: max(1.005 * busy(rows) + 0.25, host_ms / 4),
        "eager": lambda rows: max(busy(rows) + 0.1, host_ms),
    }

    def time(self: CostMeter, found: Any, rows: int, requests: int, replays: bool = True) -> Any:
        now = {way: ms(rows) for way, ms in truth.items() if replays or way == "eager"}
        for way, ms in now.items():
            found[way][requests][rows] = ms
        return now

    monkeypatch.setattr(CostMeter, "_time", time)
    runners: Any = [SimpleNamespace(buckets=ladder)]
    meter = CostMeter(runners, dense=True, requests=1, device=torch.device("cpu"), group=SINGLE)
    times = meter.measure()
    costs = {kind: costs_of(times, kind, dense=True) for kind in ("full", "breakable")}
    for tokens in range(1, 8193):
        bucket = next(bucket for bucket in ladder if bucket >= tokens)
        known = {
            kind: each.replay.at(bucket)
            for kind, each in costs.items()
            if each is not None and each.replay_pays(tokens, bucket)
        }
        chosen = min(known, key=known.__getitem__, default="eager")
        real = {way: ms(tokens if way == "eager" else bucket) for way, ms in truth.items()}
        assert real[chosen] <= 1.02 * min(real.values()), (tokens, chosen, real)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "breakgraph"


def measured(checkpoint: Path, dispatch: str = "measured", **flags: Any) -> ModelRunner:
    return make_runner(checkpoint, "cpu", **{**AUTO, **flags, "prefill_dispatch": dispatch})


def test_every_way_is_measured_at_every_bucket_and_kept(checkpoint: Path, cache: Path) -> None:
    runner = measured(checkpoint)
    (file,) = cache.iterdir()
    ms = json.loads(file.read_text())["ms"]
    assert ms.keys() == {"eager", "breakable", "full"}
    assert set(map(int, ms["full"]["1"])) == set(BUCKETS)
    assert set(map(int, ms["eager"]["1"])) == {1, 17, 33, 65, *BUCKETS}
    for way in ms.values():
        assert way.keys() == {"1", str(SLOTS)}
    for each in runner.prefill_graph_runners:
        assert each.costs is not None and each.costs.replay.one.rows[-1] == 128


def planted(way: str) -> dict[str, dict[int, dict[int, float]]]:
    """Times by which ``way`` is fastest, and padding costs what it is."""
    return {
        name: {1: {b: b * (1.0 if name == way else 2.0) for b in BUCKETS}}
        for name in ("eager", "breakable", "full")
    }


def test_a_second_start_reads_what_the_first_measured(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("breakgraph.runner.graph_maker.GraphMaker.measures", True)
    meter = "breakgraph.runner.measuring.CostMeter.measure"
    monkeypatch.setattr(meter, lambda self: planted("full"))
    first = measured(checkpoint, "auto")
    assert first.forward(plain([60])).dispatch.kind == "full"

    def fail(self: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(meter, fail)
    second = measured(checkpoint, "auto")
    assert first.full_graph_runner is not None and second.full_graph_runner is not None
    assert second.full_graph_runner.costs == first.full_graph_runner.costs
    with pytest.raises(AssertionError, match="measured again"):
        measured(checkpoint, "measured")
    with pytest.raises(AssertionError, match="measured again"):  # flags that change the times
        measured(checkpoint, "auto", prefill_graph_requests=2)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"facts": {}, "ms": {}}', "no eager", "a time of zero", "\xff"],
)
def test_a_damaged_file_is_measured_anew_with_a_warning(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = CostFile({"model": "m"}, SINGLE)
    assert file.read() is None and not caplog.messages
    file.write(planted("full"))
    assert file.read() == planted("full")
    kept = json.loads(file.path.read_text())
    if damage == "no eager":
        del kept["ms"]["eager"]
    elif damage == "a time of zero":
        kept["ms"]["full"]["1"]["16"] = 0
    text = json.dumps(kept) if " " in damage and "{" not in damage else damage
    file.path.write_bytes(text.encode("latin-1"))
    assert file.read() is None
    assert "measured anew" in caplog.text and str(file.path) in caplog.text
    assert CostFile({"model": "n"}, SINGLE).read() is None


def test_a_folder_that_cannot_be_written_to_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    CostFile({}, SINGLE).write(planted("full"))
    assert "cannot be kept" in caplog.text


# What is worth its memory.


def costs_by(**kinds: Sequence[float]) -> dict[str, PrefillCosts]:
    times = planted("none")
    for kind, ms in kinds.items():
        times[kind][1] = dict(zip(BUCKETS, ms, strict=True))
    found = {kind: costs_of(times, kind, dense=True) for kind in ("full", "breakable")}
    return {kind: costs for kind, costs in found.items() if costs is not None}


@pytest.fixture(scope="module")
def generous(checkpoint: Path) -> ModelRunner:
    """Padding is never refused."""
    return make_runner(checkpoint, "cpu", **AUTO, max_prefill_padding=128.0)


def ladders(runner: ModelRunner, **kinds: Sequence[float]) -> Ladders:
    runners = runner.prefill_graph_runners
    for each in runners:
        each.costs = costs_by(**kinds)[each.kind]
    try:
        return Ladders(runners)
    finally:
        for each in runners:
            each.costs = None


def test_graphs_that_save_nothing_over_others_are_worthless(generous: ModelRunner) -> None:
    """16 is as dear as 32 (a launch is), 128 replayed as dear as eager, full 64 as breakable."""
    found = ladders(
        generous, eager=(9, 9, 9, 9), breakable=(4, 4, 6, 9), full=(2, 2, 6, 8)
    ).worthless()
    assert found == [("breakable", 16), ("breakable", 128), ("full", 16), ("full", 64)]


@given(st.lists(st.floats(0.5, 20), min_size=12, max_size=12))
def test_what_is_left_costs_at_most_a_hundredth_more(auto: ModelRunner, ms: list[float]) -> None:
    found = ladders(auto, eager=ms[:4], breakable=ms[4:8], full=ms[8:])
    left = found.all - set(found.worthless())
    for kinds in (["full", "breakable"], ["breakable"]):
        for tokens in (1, 16, 17, 32, 33, 64, 65, 128):
            best = found._ms(tokens, 1, kinds, found.all)
            assert found._ms(tokens, 1, kinds, left) <= 1.01 * best


def test_a_bucket_stays_where_padding_to_the_next_is_refused(
    auto: ModelRunner, generous: ModelRunner
) -> None:
    ms = {"eager": (9.0,) * 4, "breakable": (4.0,) * 4, "full": (4.0,) * 4}
    assert ("breakable", 64) not in ladders(auto, **ms).worthless()
    assert ("breakable", 64) in ladders(generous, **ms).worthless()


def test_small_losses_do_not_add_up(generous: ModelRunner) -> None:
    """Each bucket is 0.8 % dearer than the one below: one step is nothing, three are not."""
    ms = tuple(4 * 1.008**step for step in range(4))
    found = ladders(generous, eager=(9,) * 4, full=ms, breakable=ms).worthless()
    assert [graph.bucket for graph in found if graph.kind == "breakable"] == [16, 64]


def test_the_budget_takes_first_what_saves_least_for_its_bytes(auto: ModelRunner) -> None:
    all_graphs = ladders(auto, eager=(9,) * 4, breakable=(4, 5, 6, 8.9), full=(3, 4, 5, 8.8))
    own = dict.fromkeys(all_graphs.all, 10)
    assert all_graphs.over_budget(own, 128, 128 + 80) == []
    # The largest bucket saves 1 % and halves the pool: both its graphs go.
    first = all_graphs.over_budget(own, 128, 128 + 79)
    assert {graph.bucket for graph in first} == {128}
    assert set(all_graphs.over_budget(own, 128, 0)) == all_graphs.all


def test_a_budget_drops_buckets_and_says_so(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_runner(checkpoint, "cpu", **AUTO)
    assert whole.graph_runner is not None
    taken = whole.graph_runner.pool_bytes()
    caplog.set_level(logging.INFO)
    runner = make_runner(checkpoint, "cpu", **AUTO, cuda_graph_memory_budget=taken * 0.6 / 1e9)
    graphs = runner.graph_runner
    assert graphs is not None and runner.full_graph_runner is not None
    assert graphs.buckets == runner.full_graph_runner.buckets == (16, 32, 64)
    assert graphs.pool_bytes() <= taken * 0.6 and graphs.pool is not whole.graph_runner.pool
    assert (
        "dropped 2 prefill graphs to keep --cuda-graph-memory-budget: breakable 128 (0.0 MB), "
        "full 128 (0.0 MB)"
    ) in caplog.text
    for lengths in ([60], [5] * 6, [16], [20, 20]):
        assert_replay_equals_eager(runner, plain(lengths))
    result = runner.forward(plain([100]))
    assert result.dispatch.reason is DispatchReason.OVER_BUDGET
    assert "raise --cuda-graph-memory-budget" in runner.explain(plain([100]))
    if (decode := runner.decode_graph_runner) is not None:
        assert decode.pool is graphs.pool


def test_a_budget_for_nothing_leaves_eager_prefills(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cpu", cuda_graph_memory_budget=1e-9)
    assert runner.prefill_graph_runners == []
    assert runner.forward(plain([20])).dispatch.reason is DispatchReason.OVER_BUDGET
    assert "--cuda-graph-memory-budget" in runner.explain(plain([20]))


def test_pruned_buckets_hand_their_batches_to_the_next(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = planted("none")
    for kind, ms in (("full", (3.0, 3.0, 4.0, 300.0)), ("breakable", (4.0, 4.0, 5.0, 300.0))):
        times[kind][1] = dict(zip(BUCKETS, ms, strict=True))
    monkeypatch.setattr("breakgraph.runner.measuring.CostMeter.measure", lambda self: times)
    runner = measured(checkpoint)
    graphs = runner.full_graph_runner
    assert graphs is not None and graphs.buckets == (32, 64)
    assert runner.forward(plain([12])).dispatch.bucket == 32
    assert runner.forward(plain([120])).dispatch.reason is DispatchReason.EAGER_FASTER
    assert_replay_equals_eager(runner, plain([50]))


# Flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"enable_breakable_cuda_graph": True, "cuda_graph_backend_prefill": "full"},
            "--enable-breakable-cuda-graph and --cuda-graph-backend-prefill full contradict",
        ),
        ({"cuda_graph_memory_budget": 0}, "--cuda-graph-memory-budget must be more than 0"),
        ({"prefill_graph_requests": 0}, "--prefill-graph-requests must be at least 1"),
        (
            {"cuda_graph_backend_prefill": "auto", "tp_size": 2, "dp_size": 2},
            "--cuda-graph-backend-prefill auto decides by each batch's requests",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerArgs(model_path="m", **flags)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"prefill_graph_requests": 4}, "--prefill-graph-requests does nothing"),
        ({"cuda_graph_memory_budget": 2.0}, "--cuda-graph-memory-budget does nothing"),
        (
            {"cuda_graph_backend_prefill": "full", "linear_attention_capture": 2},
            "--linear-attention-capture does nothing",
        ),
    ],
)
def test_flags_that_do_nothing_are_said(
    caplog: pytest.LogCaptureFixture, flags: dict[str, Any], said: str
) -> None:
    ServerArgs(model_path="m", device="cpu", **flags).resolved()
    assert said in caplog.text


def test_auto_is_asked_for_and_keeps_the_older_flag() -> None:
    args = ServerArgs(model_path="m", device="cpu", cuda_graph_backend_prefill="auto").resolved()
    assert args.enable_breakable_cuda_graph and args.resolved() == args
    full = ServerArgs(model_path="m", device="cpu", cuda_graph_backend_prefill="full").resolved()
    assert not full.enable_breakable_cuda_graph and full.resolved() == full


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch_flash", "torch_native", "flashinfer"])
def test_auto_is_close_to_eager_on_a_gpu(tmp_path: Path, attention: str) -> None:
    """Of the backends whose kernels differ in the two, equal but for rounding."""
    if attention == "flashinfer":
        pytest.importorskip("flashinfer")
    model = make_reference("Qwen3ForCausalLM", head_dim=64, max_position_embeddings=192)
    folder = save_checkpoint(model, tmp_path)
    runner = make_runner(folder, "cuda", **AUTO, attention_backend=attention)
    make_noise(runner)
    shapes = [[(60, 0)], [(5, 0)] * 3, [(128, 0)], [(1, 0)] * 4, [(3, 0)] * 9, [(7, 5), (20, 40)]]
    for seed, lengths in enumerate(shapes):
        batch = make_batch(lengths, seed)
        eager = runner.forward(batch, allow_graph=False).next_token_logits
        poison(runner)
        result = runner.forward(batch)
        torch.testing.assert_close(result.next_token_logits, eager, rtol=2e-2, atol=0.15)
        prefix = any(cached for _, cached in lengths)
        full = len(lengths) <= SLOTS and (attention == "flashinfer" or not prefix)
        assert result.dispatch.kind == ("full" if full else "breakable")
        assert result.graph is not None and (result.graph.num_breaks == 0) == full


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "attention"), [("float32", "torch_native"), ("bfloat16", "torch_flash")]
)
def test_hybrids_are_captured_whole_on_a_gpu(tmp_path: Path, dtype: str, attention: str) -> None:
    folder = save_hybrid("nemotron_h", tmp_path, num_experts_per_tok=4)
    where = {"device": "cuda", "dtype": dtype, "attention_backend": attention}
    runner = make_hybrid_runner(folder, **{**AUTO, **where})
    make_noise(runner)
    for lengths in ((1,), (63,), (65, 64), (1, 2, 3, 4), (1, 65, 64, 30)):
        with Requests(runner) as requests:
            batch = requests.batch(requests.open(len(lengths)), random_prompts(lengths))
            full, eager = outcomes(runner, [(batch, {}), (batch, {"allow_graph": False})])
            assert full.result.dispatch.kind == "full" and full.result.graph is not None
            assert full.result.graph.num_breaks == 0
            assert_same_outcome(runner, full, eager)


@pytest.mark.gpu
def test_a_full_replay_never_waits_for_the_device(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda", **FULL, attention_backend="torch_flash")
    batches = [plain([40, 7]), plain([16])]
    for batch in batches:
        runner.forward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            assert runner.forward(batch).dispatch.bucket is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_queued_full_replays_do_not_overwrite_each_others_lengths(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, "cuda", **FULL, attention_backend="torch_flash")
    lengths = np.random.default_rng(0).integers(1, 30, (12, SLOTS)).tolist()
    batches = [plain(shape, seed) for seed, shape in enumerate(lengths)]
    expected = [runner.forward(batch).next_token_logits.cpu() for batch in batches]
    queued = [runner.forward(batch).next_token_logits for batch in batches]
    for got, want in zip(queued, expected, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
def test_a_budget_holds_on_a_gpu(checkpoint: Path) -> None:
    taken = 0
    for _ in range(2):  # the first pays for what CUDA loads once
        whole = make_runner(checkpoint, "cuda", **AUTO)
        taken = sum(runner.memory_bytes for runner in whole.prefill_graph_runners)
        del whole
    torch.cuda.empty_cache()
    budget = taken * 0.6
    runner = make_runner(checkpoint, "cuda", **AUTO, cuda_graph_memory_budget=budget / 1e9)
    assert sum(each.memory_bytes for each in runner.prefill_graph_runners) <= budget
    assert sum(len(each.graphs) for each in runner.prefill_graph_runners) < 2 * len(BUCKETS)
    if runner.prefill_graph_runners:
        assert_replay_equals_eager(runner, plain([10]))

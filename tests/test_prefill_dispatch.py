"""A prefill runs the way that was measured to be fastest; graphs not worth their memory go."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_support import make_reference, save_checkpoint
from prefill_support import (
    AUTO,
    BUCKETS,
    REQUEST_SLOTS,
    assert_replay_equals_eager,
    make_runner,
    plain,
)

from breakgraph.distributed import SINGLE
from breakgraph.forward import ForwardBatch
from breakgraph.runner import DispatchReason, ModelRunner
from breakgraph.runner.buckets import derive_buckets
from breakgraph.runner.costs import ForwardTimes, Line, PrefillCosts
from breakgraph.runner.graph_runner import GraphRunner
from breakgraph.runner.ladders import Ladders
from breakgraph.runner.measuring import CostFile, CostMeter, costs_of
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16, max_position_embeddings=192)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def auto(checkpoint: Path) -> ModelRunner:
    return make_runner(checkpoint, "cpu", **AUTO)


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


def test_padding_does_not_attend() -> None:
    """One request of 128 rows takes 10 ms, and four 7: attention takes 4 of the 10."""
    one, more = Line(BUCKETS, (1, 2, 4, 10)), Line(BUCKETS, (0, 0, 0.5, -3))
    replay = ForwardTimes(one, more, requests=4)
    assert replay.at(128, 1, 128) == replay.at(128) == 10
    assert replay.at(128, 1, 64) == pytest.approx(10 - 4 * 3 / 4)
    assert replay.at(128, 4, 64) == pytest.approx(7 - 4 / 4 * 3 / 4)
    assert replay.at(64, 1, 33) == 4  # requests that cost more say nothing of attention
    costs = PrefillCosts(flat(9, 9, 9, 9), replay, margin=1.0)
    assert [costs.replay_pays(tokens, 128) for tokens in (100, 128)] == [True, False]


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
            if requests <= REQUEST_SLOTS:
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
        assert way.keys() == {"1", str(REQUEST_SLOTS)}
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


# On a GPU.


def test_what_a_graph_took_counts_when_it_is_captured_again_from_kept_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(checkpoint, "cpu", **AUTO)
    graphs = runner.graph_runner
    assert graphs is not None
    taken = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(GraphRunner, "_driver_bytes", lambda self: next(taken))
    graphs.drop()
    graphs.capture()
    monkeypatch.setattr(GraphRunner, "_driver_bytes", lambda self: 10**6)
    graphs.drop()
    graphs.capture()
    assert set(graphs.own_bytes.values()) == {1000}


@pytest.mark.gpu
def test_a_budget_holds_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pool, which is most: what graphs take beside it is seen by the GPU's free memory
    alone, on which others may be testing."""
    monkeypatch.setattr(GraphRunner, "_driver_bytes", lambda self: 0)
    # 200 MB of pool, beside which the allocator's segments of up to 20 MiB are small.
    config = {"head_dim": 64, "intermediate_size": 8192, "max_position_embeddings": 4096}
    folder = save_checkpoint(make_reference("Qwen3ForCausalLM", **config), tmp_path)
    flags = {
        **AUTO,
        "attention_backend": "torch_flash",
        "cuda_graph_backend_decode": "disabled",
        "piecewise_cuda_graph_tokens": (512, 1024, 2048, 4096),
        "chunked_prefill_size": 4096,
        "max_total_tokens": 4096,
    }

    def start(budget: float | None = None) -> tuple[ModelRunner, PrefillGraphRunner, int]:
        """A runner, its graphs, and what torch has reserved for it of the GPU."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        runner = make_runner(folder, "cuda", **flags, cuda_graph_memory_budget=budget)
        torch.cuda.empty_cache()
        assert runner.graph_runner is not None
        return runner, runner.graph_runner, torch.cuda.memory_reserved() - before

    start()  # pays for what libraries allocate once
    whole, graphs, reserved = start()
    taken = graphs.pool_bytes()
    del whole, graphs
    runner, graphs, less = start(0.6 * taken / 1e9)
    assert graphs.pool_bytes() <= 0.6 * taken
    assert reserved - less >= taken - graphs.pool_bytes() - (20 << 20), "given back to the GPU"
    for each in runner.prefill_graph_runners:
        assert each.buckets and 4096 in each.dropped
        assert each.graphs.keys() == set(each.buckets)
    assert_replay_equals_eager(runner, plain([300]))

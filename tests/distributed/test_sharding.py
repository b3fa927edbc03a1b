"""Who has what: shards, what is read of a file, and how many rows of a rank are real."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_support import HYBRIDS, save_hybrid
from hypothesis import given
from hypothesis import strategies as st
from models_support import make_reference, save_checkpoint

from breakgraph.distributed import SINGLE, TensorParallelGroup, equal_shard, kv_shard
from breakgraph.distributed import watch as watching
from breakgraph.distributed.collectives import CollectiveError
from breakgraph.distributed.watch import RankFailedError, Watch, ended, when_closed
from breakgraph.layers import CheckpointSlot
from breakgraph.layers.moe_experts import GatedExperts
from breakgraph.models import load_model, reading
from breakgraph.models.checkpoint import ModelLoadError
from breakgraph.runner.input_buffers import compute_local_num_token_non_padded
from breakgraph.server_args import ServerArgs


@pytest.mark.parametrize("size", range(1, 9))
def test_ranks_share_out_the_real_rows(size: int) -> None:
    for bucket in (1, 7, 8, 16, 24):
        each = -(-bucket // size)
        for count in range(bucket + 1):
            shares = [compute_local_num_token_non_padded(count, each, r, size) for r in range(size)]
            real = [row < count for row in range(each * size)]
            assert shares == [sum(real[r * each : (r + 1) * each]) for r in range(size)]


@pytest.mark.parametrize("values", [(9, 4, 0, 2), (-1, 4, 0, 2), (3, 4, 2, 2), (3, 4, -1, 2)])
def test_impossible_shares_are_refused(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be divided into"):
        compute_local_num_token_non_padded(*values)


def rank(number: int, size: int) -> TensorParallelGroup:
    """A rank that never talks to another."""
    return TensorParallelGroup(number, size)


def test_key_value_heads_are_divided_or_repeated() -> None:
    for size, expected in {2: [(0, 1), (1, 2)], 4: [(0, 1), (0, 1), (1, 2), (1, 2)]}.items():
        found = []
        for number in range(size):
            with rank(number, size).active():
                queries, keys = kv_shard(8, 2)
            found.append((keys.begin, keys.end))
            # Each query head's key-value head is here.
            heads = range(queries.begin, queries.end)
            assert {head // 4 for head in heads} == set(range(keys.begin, keys.end))
        assert found == expected
    assert equal_shard(7, "x").size == 7  # one rank, outside


@pytest.mark.parametrize("name", ["qwen3-moe", *HYBRIDS])
def test_a_rank_reads_its_parts_alone(tmp_path: Path, name: str, monkeypatch) -> None:
    if name in HYBRIDS:
        save_hybrid(name, tmp_path, **({"n_groups": 2} if "nemotron" in name else {}))
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        save_checkpoint(make_reference("Qwen3MoeForCausalLM", head_dim=8, **moe), tmp_path)
    read = dict.fromkeys(["whole", "parts"], 0)
    pieces_of = reading._pieces

    class Watched:
        """A file that gives no whole tensor to a slot that takes a part."""

        def __init__(self, file: Any, slot: CheckpointSlot) -> None:
            self.file, self.slot = file, slot

        def get_slice(self, tensor: str) -> Any:
            read["parts"] += 1
            return self.file.get_slice(tensor)

        def get_tensor(self, tensor: str) -> Any:
            read["whole"] += 1
            assert self.slot.target is not None
            assert tuple(self.slot.target.shape) == self.slot.shape, tensor
            return self.file.get_tensor(tensor)

    def watched(file: Any, tensor: str, slot: CheckpointSlot) -> Any:
        return pieces_of(Watched(file, slot), tensor, slot)

    monkeypatch.setattr(reading, "_pieces", watched)
    sizes = []
    for number in range(2):
        with rank(number, 2).active():
            model = load_model(tmp_path)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert read["parts"] >= 20 and read["whole"] > 2
    total = sum(parameter.numel() for parameter in load_model(tmp_path).parameters())
    assert sizes[0] == sizes[1] < 0.6 * total


@pytest.mark.parametrize(
    ("size", "config", "said"),
    [
        (3, {}, "num_attention_heads 4 cannot be divided among --tp-size 3 ranks"),
        (4, {"num_attention_heads": 12, "num_key_value_heads": 3}, "num_key_value_heads 3 cannot"),
        (2, {"intermediate_size": 47}, "the intermediate size 47 cannot be divided"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, size, config, said: str) -> None:
    save_checkpoint(make_reference("Qwen3ForCausalLM", head_dim=8, **config), tmp_path)
    with rank(0, size).active(), pytest.raises(ModelLoadError, match=said):
        load_model(tmp_path)


def test_a_refusal_names_the_flags_that_count_the_ranks() -> None:
    group = TensorParallelGroup(0, 6, attention=rank(0, 3))
    with group.active():
        with pytest.raises(ValueError, match="among --tp-size / --dp-size 3 ranks"):
            kv_shard(4, 2)
        with pytest.raises(ValueError, match="experts 4 cannot be divided among --tp-size 6"):
            GatedExperts(4, 8, 8)
    assert group.data_parallel and group.dp_size == 2 and not rank(0, 3).data_parallel


@pytest.mark.parametrize("size", [16, 6])
def test_the_experts_of_all_ranks_give_what_all_experts_give(size: int) -> None:
    torch.manual_seed(0)
    whole = GatedExperts(4, size, size)
    for parameter in whole.parameters():
        parameter.normal_()
    x, weights, count = torch.randn(7, size), torch.rand(7, 2), torch.tensor([5])
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    x[5:] = float("nan")
    parts = []
    for number in range(2):
        with rank(number, 2).active():
            some = GatedExperts(4, size, size)
        for mine, all_ in zip(some.parameters(), whole.parameters(), strict=True):
            mine.copy_(all_[2 * number : 2 * number + 2])
        parts.append(some(x, weights, experts, count))
    expected = whole(x, weights, experts, count)
    torch.testing.assert_close(sum(parts), expected, atol=1e-4, rtol=1e-4)
    assert not expected[5:].any() and expected[:5].any()


def test_flags_that_contradict_ranks_are_refused(caplog) -> None:
    with pytest.raises(ValueError, match="leave one out"):
        ServerArgs(model_path="m", tp_size=2, verify_prefill_graph=0.5)
    ServerArgs(model_path="m", moe_scatter=True, device="cpu").resolved()
    assert "--moe-scatter does nothing without --tp-size" in caplog.text


def test_one_rank_records_nothing() -> None:
    x = torch.ones(3, 2)
    assert SINGLE.all_reduce_(x) is SINGLE.all_gather(x) is SINGLE.reduce_scatter(x) is x
    assert SINGLE.gather_columns(x, 2) is SINGLE.begin_sum_(x) is x
    assert SINGLE.vote(None) == {} and SINGLE.vote("no") == {0: "no"} and SINGLE.minimum(3) == 3


class Store(dict):
    """A store of one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_rank_that_stands_still_is_named(monkeypatch) -> None:
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watching, "STALE_SECONDS", 0.3)
    store = Store()
    store.set("beat 1", "7 100")
    watch = Watch(0, 2, store, ends_process=False)
    watch.busy = False
    watch.start()
    watch._failed.wait(20)
    with pytest.raises(RankFailedError, match="rank 1 of 2 has not answered for"):
        watch.check()
    assert store.get("failure", b"").startswith(b"1 has not answered")
    watch.stop()


def test_the_rank_behind_in_collectives_is_named(monkeypatch) -> None:
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.01)
    watch = Watch(0, 3, Store(), ends_process=False)
    monkeypatch.setattr(watching.Entered, "count", 9)
    watch._seen = {1: ("5 9", 0.0), 2: ("5 8", 0.0)}
    error = watch.explain(CollectiveError("timed out"))
    assert "rank 2 of 3 did not take part in a collective (timed out)" in str(error)
    assert "rank 2" in str(watch.explain(ValueError("late")))  # the first to be seen is kept


def test_a_rank_tells_its_own_error() -> None:
    store = Store()
    watch = Watch(1, 2, store, ends_process=False)
    assert "rank 1 of 2 raised ValueError: no" in str(watch.explain(ValueError("no")))
    other = Watch(0, 2, store, ends_process=False)
    other._look()
    assert other.failure == watch.failure


def test_a_rank_ends_with_the_process_that_spawned_it() -> None:
    reader, writer = os.pipe()
    closed = threading.Event()
    with open(reader, "rb", buffering=0) as stream:
        when_closed(stream, closed.set)
        assert not closed.wait(0.05)
        os.close(writer)
        assert closed.wait(20)
    assert ended(-9) == "was killed by SIGKILL" and ended(2) == "ended with exit code 2"


@given(st.integers(1, 9), st.integers(1, 4))
def test_the_shares_of_ranks_add_up(rows: int, size: int) -> None:
    whole = torch.randn(rows, 3)
    total = torch.zeros_like(whole)
    for number in range(size):
        group = rank(number, size)
        share = group.share(whole)
        assert share.shape == (group.rows_of_rank(rows), 3)
        total += group.begin_sum_of_shares(share, rows)
    assert torch.equal(total, whole)

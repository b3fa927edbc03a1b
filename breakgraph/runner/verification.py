"""Live prefills run eagerly too, after their replies, and compared with what the graph gave.

A check leaves every request's keys, values and recurrent states bit for bit as the replay left
them, also when it fails itself: it keeps them before it runs and puts them back at its end.

The eager forward has as many rows as the bucket. Then both ways run the same kernels on the same
shapes, and what rounding is left is far below what a fault does. Its padding holds other values
than the graph's, so that padding which leaks into a real row differs too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from breakgraph.attention import Attention, AttentionBackend, RadixLinearAttention
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.runner.break_recorder import BreakCall, BreakRecorder, recording
from breakgraph.runner.input_buffers import PrefillInputBuffers
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

logger = logging.getLogger(__name__)

BOUNDS = {torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""How far a row may be off, as a share of its norm. In half precision four units in the last place:
room for kernels that add in no fixed order, where the others round alike."""

OUTCOMES = ("same", "different", "skipped")
"""How a check ends; metric labels, which stay stable."""

SHOWN = 8
"""Requests whose lengths a message shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A replayed prefill that an eager one did not confirm.

    Attributes:
        bucket: of the graph.
        shape: the batch, in words.
        what: what differs: hidden states, or what a layer stored.
        row: of the batch that is furthest off; of a state, its request.
        error: how far, as a share of the row's norm; infinite where one way alone has NaN or Inf.
        bound: what would have been rounding.
        layer: index of the first layer that differs; None where it is not known.
        place: the first segment or break that differs, in words.
    """

    bucket: int
    shape: str
    what: str
    row: int
    error: float
    bound: float
    layer: int | None
    place: str

    def describe(self) -> str:
        """What differed, by how much and where first."""
        return (
            f"bucket {self.bucket} replayed {self.shape} and gave other {self.what} than an eager "
            f"forward: row {self.row} is off by {self.error:.3g} of its norm, where up to "
            f"{self.bound:.3g} is rounding. First difference: {self.place}"
        )


@dataclass(slots=True)
class Verification:
    """A check that is due: call it when the replies are out, before anything else runs.

    Attributes:
        graphs, batch, bucket: what was replayed.
        before: recurrent states of the requests with a prefix, as the replay found them.
        hidden: ``[num_tokens, hidden_size]``, what it gave.
    """

    verifier: PrefillVerifier
    graphs: PrefillGraphRunner
    batch: ForwardBatch
    bucket: int
    before: list[torch.Tensor]
    hidden: torch.Tensor | None = None

    def __call__(self) -> None:
        """Check, count, and take the bucket out of service if it differs."""
        self.verifier.run(self)


@dataclass(slots=True)
class PrefillVerifier:
    """Chooses which replayed prefills are checked, checks them, and counts.

    Args:
        rate: share of the replayed prefills, 0 to 1; every ``1 / rate``-th of them.
        model: for the names of its mixers.
        stack: the layer stack, run eagerly.
        buffers: the static inputs; a check fills them anew.
        attn_backend: for eager forwards.
        device: where the model is.
        bound: see ``BOUNDS``.

    Attributes:
        replays: prefills replayed.
        verified: those checked and found equal.
        skipped: those that could not be checked, mostly for want of memory.
        mismatches: those that differed.
    """

    rate: float
    model: nn.Module
    stack: nn.Module
    buffers: PrefillInputBuffers
    attn_backend: AttentionBackend
    device: torch.device
    bound: float
    replays: int = 0
    verified: int = 0
    skipped: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    _names: dict[nn.Module, str] = field(init=False)

    def __post_init__(self) -> None:
        mixers = (Attention, RadixLinearAttention)
        named = self.model.named_modules()
        self._names = {module: name for name, module in named if isinstance(module, mixers)}

    @property
    def outcomes(self) -> dict[str, int]:
        """How many checks ended how."""
        counts = (self.verified, len(self.mismatches), self.skipped)
        return dict(zip(OUTCOMES, counts, strict=True))

    def begin(
        self, graphs: PrefillGraphRunner, batch: ForwardBatch, bucket: int
    ) -> Verification | None:
        """Call before each replay: what to call after it, if it is this one's turn.

        Of a hybrid model the states that the replay will move on are copied here.
        """
        self.replays += 1
        if math.floor(self.replays * self.rate) == math.floor((self.replays - 1) * self.rate):
            return None
        try:
            before = [place.read() for place in self._states(batch, continued=True)]
        except torch.OutOfMemoryError as error:
            self._skip(error)
            return None
        return Verification(self, graphs, batch, bucket, before)

    @torch.no_grad()
    def run(self, check: Verification) -> None:
        """Run ``check``. Nothing but a lost device makes it raise: its requests are served."""
        try:
            mismatch = self._check(check)
        except torch.OutOfMemoryError as error:
            self._skip(error)
            return
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("a replayed prefill could not be verified")
            self._skip(error)
            return
        if mismatch is None:
            self.verified += 1
            return
        self.mismatches.append(mismatch)
        logger.error(
            "--verify-prefill-graph: %s. The bucket is out of service: no prefill replays it from "
            "now on. Its reply was sent, and cached prefixes that it wrote before stay; restart "
            "without prefill graphs until the cause is mended",
            mismatch.describe(),
        )

    def _skip(self, error: Exception) -> None:
        self.skipped += 1
        if self.skipped == 1:
            logger.warning(
                "a replayed prefill was not verified, for %s: %s; others may go unverified "
                "unseen, but for the count in /metrics",
                *(type(error).__name__, error),
            )

    def _check(self, check: Verification) -> Mismatch | None:
        batch, bucket, hidden = check.batch, check.bucket, check.hidden
        if hidden is None:
            raise RuntimeError("a verification was called before its replay: a bug in the runner")
        places = self._written(batch)
        with _kept(places) as kept:
            found = [row_error(hidden, self._eager(check, self.attn_backend))]
            found += [row_error(was, place.read()) for was, place in zip(kept, places, strict=True)]
            errors = torch.stack(found).tolist()
            first = next(
                (i for i, (error, _) in enumerate(errors) if not error <= self.bound), None
            )
            if first is None:
                return None
            check.graphs.retire(bucket)
            try:
                layer, place = self._locate(check)
            except Exception as failure:  # the mismatch stands
                layer, place = None, f"not found, for {type(failure).__name__}: {failure}"
        error, row = errors[first]
        what = places[first - 1].name if first else "hidden states"
        if not place:
            layer = layer_of(what)
            place = "none in its segments and breaks, replayed again"
            place += "; what it stores is at fault" if first else ": the fault is not steady"
        return Mismatch(
            bucket=bucket,
            shape=_shape(batch),
            what=what,
            row=int(row),
            error=error,
            bound=self.bound,
            layer=layer,
            place=place,
        )

    def _eager(self, check: Verification, backend: AttentionBackend) -> torch.Tensor:
        """The batch's hidden states, from the states that the replay found."""
        batch = check.batch
        self._rewind(check)
        inputs = self.buffers.fill(batch, check.bucket).inputs
        hidden = inputs.hidden_states
        hidden[batch.num_tokens :] = -2 * hidden[:1]  # the graph's padding is token 0
        backend.init_forward_metadata(batch)
        with forward_context(batch, backend):
            backend.begin_layers(inputs)
            result: torch.Tensor = self.stack(inputs)
        return result[: batch.num_tokens]

    def _replay(self, check: Verification, recorder: BreakRecorder) -> torch.Tensor:
        """The graph once more, from the states that it found the first time."""
        self._rewind(check)
        graphs, backend = check.graphs, check.graphs.attn_backend
        graphs.attn_backend = recorder
        try:
            graphs.replay_prepare(check.batch, check.bucket)
            return graphs.replay(check.batch, check.bucket)
        finally:
            graphs.attn_backend = backend

    def _locate(self, check: Verification) -> tuple[int | None, str]:
        """The first layer that differs, and where in it, by a pass of each way; "" if none does."""
        tokens = check.batch.num_tokens
        given: dict[nn.Module, tuple[int, ...]] = {}
        with recording(BreakRecorder(self.attn_backend, self._names, tokens, given)) as recorder:
            expected = self._eager(check, recorder).clone()
            eager = {call.name: call for call in recorder.calls}
        inner = check.graphs.attn_backend
        with recording(BreakRecorder(inner, self._names, tokens, given)) as recorder:
            hidden = self._replay(check, recorder)
            replayed = recorder.calls
        watched = len(replayed) == check.graphs.graphs[check.bucket].num_breaks
        for index, call in enumerate(replayed):
            if call.name in eager and (part := self._differs(call, eager[call.name])):
                which = f"break {index}, {call.kind}" if watched else f"the break {call.kind}"
                return layer_of(call.name), f"{part} {which} of {call.name}"
        error = float(row_error(hidden, expected)[0])
        if error <= self.bound:
            return None, ""
        if not replayed:
            return None, f"in the {check.graphs.kind} graph, which has no break to look at"
        return None, f"in the segments after {replayed[-1].name}, the last break"

    def _differs(self, got: BreakCall, expected: BreakCall) -> str:
        """Which part of the break, or nothing where all agrees."""
        for a, b in zip(got.inputs, expected.inputs, strict=True):
            if not float(row_error(a, b)[0]) <= self.bound:
                return "in the segment before"
        return "" if float(row_error(got.output, expected.output)[0]) <= self.bound else "in"

    # What a forward writes besides its output.

    def _rewind(self, check: Verification) -> None:
        """Put the states back that the replay went on from."""
        for place, was in zip(self._states(check.batch, continued=True), check.before, strict=True):
            place.write(was)

    def _written(self, batch: ForwardBatch) -> list[_Place]:
        """Keys, values and states of the batch's tokens and requests."""
        slots = torch.from_numpy(batch.out_cache_loc).to(self.device)
        places = []
        for module, name in self._names.items():
            if isinstance(module, Attention):
                for what, cache in (("keys", "k_cache"), ("values", "v_cache")):
                    buffer = getattr(module, cache, None)
                    if buffer is not None and buffer.numel():  # a latent attention has no values
                        places.append(_Place(f"{what} of {name}", buffer, slots))
        return places + self._states(batch)

    def _states(self, batch: ForwardBatch, *, continued: bool = False) -> list[_Place]:
        """Those of the requests' rows of the request table, or only of those with a prefix."""
        if batch.rows is None:
            return []
        rows = batch.rows[batch.prefix_lens > 0] if continued else batch.rows
        index = torch.from_numpy(rows).to(self.device)
        places = []
        for module, name in self._names.items():
            if isinstance(module, RadixLinearAttention) and len(rows):
                places.append(_Place(f"convolution inputs of {name}", module.conv_state, index))
                places.append(_Place(f"state of {name}", module.state, index))
        return places


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows ``index`` of a buffer ``[slots, ...]`` that forwards write."""

    name: str
    buffer: torch.Tensor
    index: torch.Tensor

    def read(self) -> torch.Tensor:
        return self.buffer.index_select(0, self.index)

    def write(self, rows: torch.Tensor) -> None:
        self.buffer.index_copy_(0, self.index, rows)


@contextmanager
def _kept(places: Sequence[_Place]) -> Iterator[list[torch.Tensor]]:
    """Copies of what lies in ``places``; it is put back at the end."""
    kept = [place.read() for place in places]
    try:
        yield kept
    finally:
        for place, was in zip(places, kept, strict=True):
            place.write(was)


def row_error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far ``got`` is off, in the row where that is most.

    A row's error is the norm of the difference over the norm of the expected row, which counts as
    a tenth of the median row's at least: a row of next to nothing is no worse for being so.

    Args:
        got: ``[rows, ...]``.
        expected: the same shape.

    Returns:
        float32 ``[2]``: the error, infinite where NaN or Inf are not in both alike, and the row.
    """
    a, b = got.flatten(1).float(), expected.flatten(1).float()
    finite = a.isfinite() & b.isfinite()
    alike = finite | (a == b) | (a.isnan() & b.isnan())
    norms = b.where(finite, 0).norm(dim=1)
    errors = (a - b).where(finite, 0).norm(dim=1)
    scale = norms.maximum(norms.median() / 10)
    errors = errors.where(errors == 0, errors / scale)
    error, row = errors.masked_fill(~alike.all(dim=1), math.inf).max(dim=0)
    return torch.stack([error, row.float()])


def layer_of(name: str) -> int | None:
    """The layer's index in a module's name: 3 of ``model.layers.3.self_attn.attn``."""
    found = re.search(r"\.(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _shape(batch: ForwardBatch) -> str:
    """The batch in words."""
    new, cached = (
        " ".join(map(str, lens[:SHOWN].tolist())) + (" …" if len(lens) > SHOWN else "")
        for lens in (batch.extend_lens, batch.prefix_lens)
    )
    return (
        f"{batch.num_tokens} tokens of {batch.batch_size} requests (new {new}, behind cached "
        f"{cached})"
    )

"""Tensors of safetensors files to their places on a device.

Files are memory-mapped and never read whole: of a tensor that is divided among ranks, only this
rank's part is touched. To a GPU the bytes go through small pinned buffers, which several threads
fill and empty in turn: a copy from pageable memory would wait for one thread's copy into the
driver's own buffer, piece after piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from breakgraph.layers import CheckpointSlot

THREADS = 8
BUFFER_BYTES = 8 << 20
"""Of one pinned buffer; each thread has two. It takes 0.15 ms to send, far longer than to begin."""

Job: TypeAlias = tuple[Path, str, CheckpointSlot]


class UnreadableFileError(ValueError):
    """A file is not whole, or not there any more."""


def read_tensors(
    places: Mapping[Path, Mapping[str, str]],
    slots: Mapping[str, CheckpointSlot],
    device: torch.device,
) -> None:
    """Copy tensors into their slots on ``device``, cast to the slots' types.

    Args:
        places: for each file, the slot of each of its tensors.
        slots: where they go, by name; those without a target are of other ranks.

    Raises:
        UnreadableFileError: a file is no whole safetensors file.
    """
    jobs = [
        (file, name, slots[slot])
        for file, names in places.items()
        for name, slot in names.items()
        if slots[slot].target is not None
    ]
    if device.type == "cpu":
        read_one_by_one(jobs)
    else:
        read_in_threads(jobs, device)


def read_one_by_one(jobs: Sequence[Job]) -> None:
    """Copy in this thread: to a CPU, where memory is the bound, more were no faster."""
    with ExitStack() as stack:
        files = _Files(stack)
        for path, name, slot in jobs:
            for target, source in _pieces(files[path], name, slot):
                target.copy_(source)


def read_in_threads(jobs: Sequence[Job], device: torch.device) -> None:
    """Copy in threads that take the next tensor when they are done with one."""
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    workers = max(1, min(THREADS, os.cpu_count() or 1, len(jobs)))
    with ThreadPoolExecutor(workers, thread_name_prefix="breakgraph-weights") as pool:
        for done in [pool.submit(_work, queue, device) for _ in range(workers)]:
            done.result()


@contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises UnreadableFileError, also where reading it fails."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error


class _Files:
    """The files of one thread, opened when they are first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._files = stack, dict[Path, Any]()

    def __getitem__(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(opened_file(path))
        return self._files[path]


def _work(queue: SimpleQueue[Job], device: torch.device) -> None:
    """Take jobs until there are none; returns when all copies are done."""
    with ExitStack() as stack, torch.no_grad():
        files, upload = _Files(stack), stack.enter_context(Upload.to(device))
        while True:
            try:
                path, name, slot = queue.get_nowait()
            except Empty:
                return
            for target, source in _pieces(files[path], name, slot):
                upload.copy(target, source)


def _pieces(
    file: Any, name: str, slot: CheckpointSlot
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of a slot's target, and what goes there: views of the mapped file, but for rows that
    the checkpoint has in another order."""
    target = slot.target
    if target is None:
        return
    if slot.columns is not None:
        yield target, file.get_slice(name)[:, slot.columns]
    elif not slot.rows:
        whole = file.get_tensor(name)
        yield target, whole if slot.order is None else whole[slot.order.to("cpu")]
    elif slot.order is not None:
        part = file.get_slice(name)
        yield target, torch.cat([part[rows] for rows in slot.rows])[slot.order.to("cpu")]
    else:
        part = file.get_slice(name)
        sizes = [rows.stop - rows.start for rows in slot.rows]
        for piece, rows in zip(target.split(sizes), slot.rows, strict=True):
            if len(piece):
                yield piece, part[rows]


class Upload:
    """Copies from mapped memory to a device through two buffers: while one is sent, the other is
    filled.

    Args:
        device: of the targets; on a CPU the buffers are plain memory.
        buffer_bytes: of one buffer.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @staticmethod
    @contextmanager
    def to(device: torch.device) -> Iterator[Upload]:
        """One on a stream of its own, behind what the device is doing now; waits at the end."""
        if device.type == "cpu":
            yield Upload(device)
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                yield Upload(device)
            finally:
                stream.synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``source``, on the host, to ``target`` of the same shape; casts on the host."""
        if target.dim() == 0 or not target.is_contiguous():
            target.copy_(source)
            return
        if target.dim() > 2:  # a row is then a small part of a buffer
            target, source = target.flatten(0, -2), source.flatten(0, -2)
        row_bytes = max(1, target[:1].numel() * target.element_size())
        rows = max(1, len(self._buffers[0]) // row_bytes)
        if row_bytes > len(self._buffers[0]):
            target.copy_(source)
            return
        for begin in range(0, len(target), rows):
            self._send(target[begin : begin + rows], source[begin : begin + rows])

    def _send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        room = self._buffers[self._turn][: target.numel() * target.element_size()]
        if source.dtype == target.dtype and source.is_contiguous():
            # By numpy: each copy of torch's would start threads of its own in each thread here.
            np.copyto(room.numpy(), _bytes_of(source))
        else:
            room.view(target.dtype).view(target.shape).copy_(source)
        target.copy_(room.view(target.dtype).view(target.shape), non_blocking=True)
        if self._cuda:
            event = self._sent[self._turn] = torch.cuda.Event()
            event.record()


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.flatten().view(torch.uint8).numpy()
    return array

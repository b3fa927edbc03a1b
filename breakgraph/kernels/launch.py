"""What the Triton kernels share: making them late, block sizes, and the checks of their arguments.

Triton is imported on the first launch on CUDA and never before, so that a machine without a GPU
needs none. No launch depends on the number of rows other than by its grid, and sizes and strides
are compile-time constants: what a warm-up of one row count compiled serves the capture of every
other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def import_triton() -> tuple[Any, Any]:
    """``triton`` and ``triton.language``. Raises RuntimeError if Triton is not installed."""
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise RuntimeError(
            "the fused kernels on CUDA are Triton's, and triton is not installed: "
            "pip install triton, or run on the CPU, where plain torch ops take their place"
        ) from error
    return triton, triton.language


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel on ``device`` may start while the one ahead of it in the stream still runs.

    Programmatic dependent launch, of compute capability 9 on, saves the 1 µs in which a chip is
    empty between two kernels. The kernel waits (``gdc_wait``) before it reads or writes what
    others do, and lets the next one start (``gdc_launch_dependents``) at its own start.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a CUDA ``device``."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


def check_rows(**tensors: torch.Tensor) -> None:
    """Refuse what a kernel would misread: anything but ``[rows, size]`` with dense rows.

    Raises:
        ValueError: a tensor is not two-dimensional, its last dimension has gaps, or the tensors'
            shapes differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
                "[rows, size] with a dense last dimension is needed: call .contiguous() first"
            )
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"the shapes differ and must not: {listed}")

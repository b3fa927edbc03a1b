"""A kernel is compiled once for each set of constants, dtypes and alignments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from breakgraph.kernels.direct_launch import DirectLaunch, Specialization, specialized
from breakgraph.kernels.launch import launches_early


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Kernel:
    """Stands in for what ``triton.jit`` makes: ``kernel[grid](...)`` compiles and launches."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.options: list[dict[str, int]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: int) -> Compiled:
            self.compiled.append(Compiled())
            self.options.append(options)
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    return Kernel()


def test_a_second_launch_goes_to_the_driver_with_the_new_addresses(kernel: Kernel) -> None:
    launch, special = DirectLaunch(kernel), Specialization((3, 0.5), warps=2, stages=3)
    first, second, plan = torch.zeros(64), torch.zeros(64), torch.zeros(9, dtype=torch.int32)
    launch((1, 2, 3), (first,), (plan[1:],), special)
    launch((4, 5, 6), (second,), (plan[2:],), special)
    (compiled,) = kernel.compiled
    assert kernel.options == [{"num_warps": 2, "num_stages": 3}]
    grid_and_stream, rest = compiled.launches[0][:4], compiled.launches[0][4:]
    assert grid_and_stream == (4, 5, 6, 7)
    assert rest[:5] == ("function", "metadata", None, None, None)
    assert rest[5:] == (second.data_ptr(), plan[2:].data_ptr(), 3, 0.5)


def test_what_needs_other_code_is_compiled_again(kernel: Kernel) -> None:
    launch, special = DirectLaunch(kernel), Specialization((3,), warps=2)
    x, plan = torch.zeros(64), torch.zeros(9, dtype=torch.int32)
    launch((1, 1, 1), (x,), (plan,), special)
    launch((1, 1, 1), (x[1:],), (plan,), special)  # not aligned to 16 bytes
    launch((1, 1, 1), (x.double(),), (plan,), special)
    launch((1, 1, 1), (x,), (plan.long(),), special)
    launch((1, 1, 1), (x,), (plan,), Specialization((4,), warps=2))
    assert len(kernel.compiled) == 5
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_an_early_kernel_is_compiled_to_start_before_the_one_ahead_ends(kernel: Kernel) -> None:
    launch, x = DirectLaunch(kernel), torch.zeros(64)
    launch((1, 1, 1), (x,), (), specialized((3,), 2, early=True))
    launch((1, 1, 1), (x,), (), specialized((3,), 2))
    assert [options.get("launch_pdl", False) for options in kernel.options] == [True, False]
    assert not launches_early(x.device)


def test_constants_that_are_equal_but_of_other_types_are_told_apart() -> None:
    assert specialized((3, False), 2) is specialized((3, False), 2)
    assert specialized((3, 0.0), 2).constants[1] is not False
    assert specialized((3, True), 2).constants[1] is True
    assert type(specialized((3, 1), 2).constants[1]) is int

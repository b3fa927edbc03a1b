"""The CUDA side of ``gated_products``: the launches of the C++ kernel beside this file.

All that a launch hands over, tensor maps too, depends on addresses and sizes alone, is made once
and never written again; so any thread may launch, and a capture finds made what a warm-up made. A
device's first launch compiles the kernel for every tile, so that no later one compiles, and keeps
what the compiler made for the next process.

With a product this large the chip is bound by its power, so what counts is how few bytes move for
it: a tile is as large as the registers allow, the blocks of a cluster share a tile of the input,
and the product stays in registers until it is activated.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from breakgraph.kept_files import keep, kept_path
from breakgraph.kernels.launch import processors

SOURCE = Path(__file__).with_suffix(".cu")

DEPTH, THREADS, ACROSS = 64, 384, 2
"""Summed over at once; of a block; the blocks of a cluster, beside each other in the result."""

GROUP_ROWS = 2048
"""Rows whose tiles follow each other, so that they find a tile of the weight in L2."""

INVALID_CONTEXT = 201
"""What CUDA's driver says in a thread without one."""


class Tile(NamedTuple):
    """What a block makes of the result, by how many stages of loads."""

    rows: int
    columns: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """The stages, the result, two barriers a stage, and room to align by 1024."""
        stage = 2 * DEPTH * (self.rows + 2 * self.columns)
        return self.stages * (stage + 16) + 2 * self.rows * self.columns + 1024

    @property
    def store_columns(self) -> int:
        """Of one store: a swizzled line of 128 bytes, or of 64."""
        return 64 if self.columns % 64 == 0 else 32


TILES = (Tile(256, 96, 3), Tile(128, 128, 4), Tile(128, 96, 5))
"""Where all fill the chip alike the first takes 3 to 7 % less time under load than the second."""


def takes(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies with ``weight``, on CUDA; see ``serves_gated``."""
    features, size = weight.shape[0] // 2, weight.shape[1]
    fits = weight.is_contiguous() and weight.data_ptr() % 16 == size % 8 == features % 8 == 0
    return fits and weight.dtype == torch.bfloat16 and _compiles(weight.device)


def gated_product_on_cuda(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``gated_product``. Raises RuntimeError if CUDA refuses a call, or the source."""
    out = x.new_empty(len(x), weight.shape[0] // 2)
    if not len(x):
        return out
    if x.data_ptr() % 16 or x.stride(0) % 8:  # the copy engine takes 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    try:
        _launch(x, weight, out)
    except _InvalidContextError:  # a thread that has asked CUDA for nothing yet
        _enter(x.get_device())
        _launch(x, weight, out)
    return out


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    (rows, size), features, device = x.shape, out.shape[1], x.get_device()
    plan = _plan(device, torch._C._cuda_getCurrentRawStream(device), rows, size, features)
    tile = plan.tile
    arguments = (
        _tensor_map(x.data_ptr(), rows, size, x.stride(0), tile.rows // ACROSS, DEPTH),
        _tensor_map(weight.data_ptr(), 2 * features, size, size, tile.columns, DEPTH),
        _tensor_map(out.data_ptr(), rows, features, features, 16, tile.store_columns),
        *plan.sizes,
    )
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    at = ctypes.addressof(pointers)
    _check(_driver().cuLaunchKernelEx(plan.config, plan.function, at, 0))


def best_tile(rows: int, features: int, clusters: int) -> Tile:
    """The tile whose waves of ``clusters`` take the shortest, of equals the first of ``TILES``."""

    def time(tile: Tile) -> int:
        return -(-_cluster_tiles(tile, rows, features) // clusters) * tile.rows * tile.columns

    return min(TILES, key=time)


def _cluster_tiles(tile: Tile, rows: int, features: int) -> int:
    return -(-rows // tile.rows) * -(-features // (ACROSS * tile.columns))


class _Plan(NamedTuple):
    """A launch but for its tensors."""

    tile: Tile
    function: Any
    config: Any
    sizes: tuple[ctypes.c_int, ...]


@lru_cache(maxsize=4096)
def _plan(device: int, stream: int, rows: int, size: int, features: int) -> _Plan:
    clusters = processors(torch.device("cuda", device)) // ACROSS
    tile = best_tile(rows, features, clusters)
    driver = _driver()
    kinds = driver.CUlaunchAttributeID
    cluster, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x = ACROSS
    cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
    early.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX = ACROSS * min(clusters, _cluster_tiles(tile, rows, features))
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX, config.sharedMemBytes, config.hStream = THREADS, tile.shared_bytes, stream
    config.attrs, config.numAttrs = [cluster, early], 2
    sizes = tuple(map(ctypes.c_int, (rows, features, size, GROUP_ROWS // tile.rows)))
    return _Plan(tile, _functions(device)[tile], config, sizes)


@lru_cache(maxsize=16384)
def _tensor_map(
    address: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int
) -> ctypes.Array[ctypes.c_char]:
    """128 bytes that tell the copy engine of a bfloat16 matrix and the boxes to take of it."""
    driver = _driver()
    swizzles = driver.CUtensorMapSwizzle
    line = {64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B, 32: swizzles.CU_TENSOR_MAP_SWIZZLE_64B}
    made = _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(2 * stride)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            line[box_columns],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.create_string_buffer(ctypes.string_at(made.getPtr(), 128), 128)


@cache
def _functions(device: int) -> dict[Tile, Any]:
    """The kernel on ``device`` for each tile; to compile all three takes 1.2 s."""
    driver = _driver()
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    functions = {}
    with torch.cuda.device(device):
        _enter(device)
        for tile in TILES:
            module = _check(driver.cuModuleLoadData(_cubin(tile)))
            functions[tile] = _check(driver.cuModuleGetFunction(module, b"gated_product_tiles"))
            _check(driver.cuFuncSetAttribute(functions[tile], limit, tile.shared_bytes))
    return functions


@cache
def _cubin(tile: Tile) -> bytes:
    """The kernel's machine code, by an earlier process or compiled."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    source = (product_source(tile.columns) + SOURCE.read_text(encoding="utf-8")).encode()
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages}
    options = [b"-arch=sm_90a", b"-std=c++17", *(f"-D{n}={v}".encode() for n, v in sizes.items())]
    version = repr(_check(nvrtc.nvrtcVersion())).encode()
    digest = hashlib.sha256(b"\n".join((source, *options, version))).hexdigest()[:16]
    kept = kept_path(f"gated-product-{digest}.cubin")
    if kept.exists():
        return kept.read_bytes()
    cubin = _compiled(nvrtc, source, options)
    keep(kept, cubin, "a compiled kernel")
    return cubin


def _compiled(nvrtc: Any, source: bytes, options: list[bytes]) -> bytes:
    program = _check(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(
            f"{SOURCE.name} does not compile (--matrix-products cublas does without it): "
            f"{log.decode(errors='replace')}"
        )
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


def product_source(columns: int) -> str:
    """The C++ function that issues one matrix instruction, of 64 rows and twice ``columns``: it
    names each of a thread's ``columns`` sums."""
    names = ", ".join(f"%{index}" for index in range(columns))
    sums = ", ".join(f'"+f"(sum[{index}])' for index in range(columns))
    return f"""__device__ __forceinline__ void multiply(
    float (&sum)[{columns}], unsigned long long a, unsigned long long b, int add) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{columns + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{2 * columns}k16.f32.bf16.bf16 {{{names}}}, "
    "%{columns}, %{columns + 1}, p, 1, 1, 0, 0;\\n}}\\n"
    : {sums} : "l"(a), "l"(b), "r"(add));
}}
"""


@cache
def _compiles(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        _driver()
        return bool(importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()[0] == 0)
    except (ImportError, RuntimeError):
        return False


@cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _enter(device: int) -> None:
    """Make the device's context, torch's, this thread's."""
    _check(_driver().cuCtxSetCurrent(_context(device)))


@cache
def _context(device: int) -> Any:
    return _check(_driver().cuDevicePrimaryCtxRetain(device))


class _InvalidContextError(RuntimeError):
    """The thread has no CUDA context."""


def _check(result: tuple[Any, ...]) -> Any:
    if result[0] != 0:
        kind = _InvalidContextError if result[0] == INVALID_CONTEXT else RuntimeError
        raise kind(f"a CUDA call for the gated product failed: {result[0]!r}")
    return result[1:] if len(result) > 2 else (*result, None)[1]

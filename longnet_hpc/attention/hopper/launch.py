"""Kernels in CUDA C++ for Hopper: compiled by NVRTC when first needed, launched through the driver, maps of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import Any

import torch

from longnet_hpc.attention.hopper.products import products

__all__ = ["compiled", "launch", "missing", "most_programs", "source_of", "tensor_map"]

_OLDEST_CUDA = 12
"""The first major release that knows Hopper's instructions."""
_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}


def missing() -> str | None:
    """Return what this machine lacks to compile and launch kernels, if anything."""
    try:
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
            return "cuda-bindings is not installed"
        from cuda.bindings import driver, nvrtc

        compiler = nvrtc.nvrtcVersion()[1]
        version = _checked(driver.cuDriverGetVersion()) // 1000
    except (ImportError, RuntimeError) as error:  # how libraries are reported that are not there
        return str(error).splitlines()[0]
    if compiler < _OLDEST_CUDA:
        return f"NVRTC is of CUDA {compiler}, {_OLDEST_CUDA} is needed"
    return f"NVRTC is of CUDA {compiler}, the driver of {version}" if version < compiler else None


@cache
def source_of(file: str, dtype: torch.dtype, settings: tuple[tuple[str, int], ...]) -> str:
    """Return the whole source of a kernel.

    Parameters
    ----------
    file : str
        A ``.cu`` file of this package.
    dtype : torch.dtype
        ``bfloat16`` or ``float16``.
    settings : tuple of (str, int)
        What the kernel is compiled for, as names and numbers; ``HEAD_DIM`` among them.
    """
    here = resources.files(__package__)
    names = dict(settings)
    head_dim = names["HEAD_DIM"]
    lines = [f"#define {name} {value}" for name, value in settings]
    block = 128 if head_dim == 64 else 64  # queries at once, in the backward pass
    lines += [f"#define PRODUCT_D product_{head_dim}", f"#define PRODUCT_Q product_{block}"]
    if dtype == torch.bfloat16:
        lines.append("#define BFLOAT16")
    widths = tuple(sorted({64, 128, head_dim}))
    texts = {name: (here / name).read_text() for name in ("primitives.cuh", "tiles.cuh", file)}
    return "\n".join(
        [*lines, texts["primitives.cuh"], products(widths, _ELEMENTS[dtype]), texts["tiles.cuh"], texts[file]]
    )


@cache
def compiled(source: str, name: str, shared_bytes: int, device_index: int) -> Any:
    """Return a kernel, ready to launch on one device; compiling takes about a second.

    Parameters
    ----------
    source, name : str
        What to compile, and the function in it.
    shared_bytes : int
        Dynamic shared memory of a program, in bytes.
    device_index : int
        The device; its context must be current.
    """
    from cuda.bindings import driver, nvrtc

    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math"]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result[0]:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"kernel {name} does not compile: {log.decode()}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    module = _checked(driver.cuModuleLoadData(cubin))
    function = _checked(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


@cache
def most_programs(device: torch.device) -> int:
    """Return how many programs run at once where each fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(function: Any, programs: int, threads: int, shared_bytes: int, params: bytes) -> None:
    """Launch a kernel whose one parameter is a struct, on torch's current stream of the current device."""
    from cuda.bindings import driver

    buffer = ctypes.create_string_buffer(params, len(params))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
    stream = torch.cuda.current_stream().cuda_stream
    _checked(
        driver.cuLaunchKernel(
            function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
        )
    )


def tensor_map(dtype: torch.dtype, address: int, shape: Sequence[int], strides: Sequence[int], rows: int) -> bytes:
    """Return the 128 bytes that tell the copy engine how tiles of ``rows`` rows and 128 bytes lie in a tensor.

    Parameters
    ----------
    dtype : torch.dtype
        Half precision or float32.
    address : int
        Of the first element.
    shape : sequence of int
        Five dims, innermost first, in elements: columns, heads, offsets, rows, pieces.
    strides : sequence of int
        Of all but the first, which is dense, in bytes.
    rows : int
        Rows in a tile.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[dtype]
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            *(kind, 5, address),
            [wide(n) for n in shape],
            [wide(n) for n in strides],
            [narrow(n) for n in (128 // dtype.itemsize, 1, 1, rows, 1)],
            [narrow(1)] * 5,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(int(made.getPtr()), 128)


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver or of NVRTC gives back; raise RuntimeError if it failed."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None

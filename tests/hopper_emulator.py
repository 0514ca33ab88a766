"""Kernels for Hopper on a CPU: built against `emulator/hopper.h` by g++, and run in place of the driver's launches."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch

HEADER = Path(__file__).with_name("emulator") / "hopper.h"
COMPILER = shutil.which("g++")
OPTIONS = ["-std=c++17", "-O1", "-fPIC", "-w", "-Wno-psabi", "-U_FORTIFY_SOURCE"]
"""More than -O1 takes longer to build than it saves; what some g++ fortify is `_longjmp` to the stack of a fiber."""
PROGRAMS = 3
"""Programs that share the tiles of a launch."""


class StuckError(RuntimeError):
    """No thread of a program can go on."""


@functools.cache
def folder_with_system_headers():
    """Return a folder that is removed at the end, and in it the headers that each kernel includes, read by g++ once."""
    folder = tempfile.TemporaryDirectory(prefix="longnet-kernels-")
    header = Path(folder.name) / "system.h"
    header.write_text("\n".join(line for line in HEADER.read_text().splitlines() if line.startswith("#include <")))
    subprocess.run([COMPILER, *OPTIONS, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return folder


@functools.cache
def library_of(source, name):
    """Return the library of a kernel, which `launch` then calls."""
    folder = Path(folder_with_system_headers().name)
    launcher = f"""
extern "C" int emulate(const Params* params, unsigned programs, unsigned threads, unsigned seed) {{
    kernel_body = [=] {{ {name}(*params); }};
    return run_programs(programs, threads, seed);
}}
"""
    (folder / "kernel.cpp").write_text(source + launcher)
    with tempfile.NamedTemporaryFile(suffix=".so", dir=folder) as library:
        command = [COMPILER, *OPTIONS, "-shared", "-include", "system.h", "kernel.cpp", "-o", library.name]
        subprocess.run(command, cwd=folder, check=True)
        return ctypes.CDLL(library.name)


def source_of(file, dtype, settings):
    """Return the source of a kernel with the emulator in place of the GPU's instructions."""
    lines = [f"#define {name} {value}" for name, value in settings]
    if dtype == torch.bfloat16:
        lines.append("#define BFLOAT16")
    kernel = (resources.files("longnet_hpc.attention.hopper") / file).read_text()
    tiles = (resources.files("longnet_hpc.attention.hopper") / "tiles.cuh").read_text()
    return "\n".join([*lines, HEADER.read_text(), tiles, kernel])


def launch(library, programs, threads, shared_bytes, params):
    """Run a kernel to its end."""
    buffer = ctypes.create_string_buffer(len(params) + 64)
    address = -(-ctypes.addressof(buffer) // 64) * 64
    ctypes.memmove(address, params, len(params))
    if library.emulate(ctypes.c_void_p(address), programs, threads, 0):
        raise StuckError("no thread can go on")


def tensor_map(dtype, address, shape, strides, rows):
    """Return what `launch.tensor_map` does, in the emulator's form."""
    assert address % 16 == 0, "the copy engine needs addresses that are multiples of 16"
    assert all(n % 16 == 0 and 0 < n < 2**40 for n in strides), "and strides, below 2**40"
    assert all(0 < n <= 2**32 for n in shape), "and extents"
    assert 0 < rows <= 256, "and rows of a tile"
    words = [address, *shape, *strides, rows, dtype.itemsize]
    return b"".join(int(word).to_bytes(8, "little") for word in words) + bytes(32)


def install(patch):
    """Put the emulator in the place of the GPU with a pytest monkeypatch."""
    import sys

    import longnet_hpc.attention.hopper  # noqa: F401

    names = ("forward", "backward", "rows", "jobs")
    modules = {name: sys.modules[f"longnet_hpc.attention.hopper.{name}"] for name in names}
    for name in names[:-1]:
        module = modules[name]
        patch.setattr(module, "source_of", source_of)
        patch.setattr(module, "compiled", lambda source, name, shared_bytes, device: library_of(source, name))
        patch.setattr(module, "launch", launch)
        patch.setattr(module, "most_programs", lambda device: PROGRAMS)
    patch.setattr(modules["jobs"], "tensor_map", tensor_map)

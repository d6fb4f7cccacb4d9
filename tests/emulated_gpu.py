"""Runs Triton's kernels as they are compiled for an NVIDIA GPU, without having one: their PTX, executed with NumPy.

Triton's interpreter runs the Python source of a kernel, in which there are neither threads nor types of registers. Here runs what the
compiler makes of it: vectors of 16 bytes, exchange between the threads of a warp and through shared memory, predicates, roundings to
bf16. Beyond the values it finds what a GPU does not forgive:

- an access outside of the tensors that a launch was given, or at an address that is no multiple of its size;
- memory of a tensor that two warps of a launch touch, if one of them writes, because nothing orders them;
- shared memory that a warp writes and another one touches without a barrier in between;
- a barrier that some threads do not reach, or an exchange of threads of which some are elsewhere.

An instruction that is not known here is an error, too. The threads of a warp are taken to stay together where their ways do not part, as
Triton has it. Approximate functions of the hardware are exact, and nothing is said about speed. ptx_threads.py executes a program.

`install()` lets every launch of this process run so. It needs a process in which TRITON_INTERPRET was not set when Triton was imported.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
import triton
from ptx_memory import tensor_block
from ptx_program import parse
from ptx_threads import WARP, Threads
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend


class PtxBackend(CUDABackend):
    """Triton's compiler for NVIDIA, up to PTX."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:  # pyrefly: ignore[bad-override]  # there it is a cached function
        return f"{super().hash()}-emulated"


class Launcher:
    """Runs all programs of a launch, one after the other."""

    def __init__(self, source, metadata):
        self.types = list(source.signature.values())
        self.size, self.shared = WARP * metadata.num_warps, metadata.shared

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        program = parse(function)
        given = [value for value, type in zip(arguments, self.types, strict=True) if type != "constexpr"]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        bits = [value.data_ptr() if isinstance(value, torch.Tensor) else bits_of(value) for value in given]
        blocks = {t.untyped_storage().data_ptr(): tensor_block(n, t) for n, t in enumerate(tensors) if t.numel()}
        parameters = dict(zip(program.parameters, [*bits, 0, 0], strict=True))  # the last two are for scratch memory
        with np.errstate(all="ignore"):
            for place in np.ndindex(x, y, z):
                Threads(program, parameters, list(blocks.values()), place, self.size, self.shared).run()


def bits_of(value: float | bool) -> int:
    """A number as it is handed to a kernel: floats with 32 bits."""
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


class Driver:
    """Stands in for Triton's driver of a GPU."""

    launcher_cls = Launcher

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, WARP)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """The module, the kernel, its registers, its spills, and how many threads it may have."""
        return kernel, kernel.decode(), 0, 0, 1024


def install(capability: int = 90) -> None:
    """Lets every kernel that is launched in this process run here.

    Args:
        capability: the architecture that kernels are compiled for; 90 stands for sm_90.
    """
    backends["nvidia"] = type(backends["nvidia"])(PtxBackend, backends["nvidia"].driver)
    driver: Any = Driver(capability)
    triton.runtime.driver.set_active(driver)
    # The kernels are decorated when they are imported, for the compiler or for the interpreter.
    assert os.environ.get("TRITON_INTERPRET") != "1"
    importlib.import_module("profuser.kernels.fused_loss_triton")
    importlib.import_module("profuser.kernels.source_topk_triton")

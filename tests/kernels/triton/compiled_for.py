"""Compile what models launch for a GPU that is not there, and say how much shared memory it takes.

    python compiled_for.py CAPABILITY MODEL,PRECISION,STATE,BATCHxLENGTH[,BATCHxLENGTH...] ...

CAPABILITY is 86 for compute capability 8.6; a length of 1 is a step of decoding. Models have one block of the
published sizes, on the CPU, where kernels are compiled instead of launched. Prints JSON: kernels, how many;
shared, the most bytes of any kernel by its name; failed, what could not be compiled and why.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quamba.kernels.registry import _kernels_of
from quamba.kernels.triton import gemm_wide
from quamba.models.lm import MambaLM
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import load_recipe
from quamba.runtime.prefill import prefill
from quamba.runtime.step import step_of
from quamba.tuning.networks import PUBLISHED, random_network


class AbsentGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, specs: list[str]) -> dict[str, Any]:
    kernels: dict[int, tuple[str, int]] = {}
    failed: dict[str, str] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        if "INTERPRETED" in options:  # the ops take tensors of a CPU for those of the interpreter
            options["INTERPRETED"] = False
        name = self.fn.__name__
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            kernels[id(kernel)] = (name, kernel.metadata.shared)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"

    driver.set_active(AbsentGpu(capability))
    JITFunction.run = compile_only
    gemm_wide._has_engine = lambda device: capability >= 90
    for spec in specs:
        model, precision, state, *cells = spec.split(",")
        network = one_block(model, precision, state)
        for cell in cells:
            batch, length = map(int, cell.split("x"))
            launch_all(network, batch, length)
    shared: dict[str, int] = {}
    for name, size in kernels.values():
        shared[name] = max(shared.get(name, 0), size)
    return {"kernels": len(kernels), "shared": shared, "failed": failed}


def one_block(model: str, precision: str, state: str) -> MambaLM:
    config = dataclasses.replace(PUBLISHED[model], n_layer=1, vocab_size=1024)
    recipe = load_recipe(precision)
    recipe = recipe.replace(blocks=dataclasses.replace(recipe.blocks, state=state))
    network = random_network(resolve(recipe, config), torch.device("cpu"))
    return network.set_compute_dtype(torch.float16).use_kernels(_kernels_of("triton"))


@torch.inference_mode()
def launch_all(network: MambaLM, batch: int, length: int) -> None:
    if length > 1:
        prefill(network, torch.zeros(batch, length, dtype=torch.int64))
    else:
        step_of(network, network.new_cache(batch))(torch.zeros(batch, dtype=torch.int64))


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:])))

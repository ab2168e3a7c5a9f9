"""Whether whole models are right on this machine: tiny random ones against the reference in float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quamba.kernels.check import Check, first_line, is_usable, not_run
from quamba.kernels.registry import REFERENCE, Kernels
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.recipe import Override, Recipe, Solver, load_recipe
from quamba.runtime.decode import decode_step
from quamba.runtime.graph import DecodeGraph
from quamba.runtime.prefill import prefill
from quamba.runtime.step import step_of

_BATCH, _PROMPT, _STEPS = 2, 37, 8
#: Root mean square of the error of logits over that of logits. A code behind a float may move by one and then
#: moves others (0.027 with float16); an op that gives nothing costs 0.2 to 1.
_TOLERANCES = {"w8a8": 0.06, "w4a8": 0.06, "w4a16": 0.01, "w4ax": 0.06}
_STATES = {"w8a8": "int8", "w4a8": "fp16", "w4a16": "fp16", "w4ax": "fp16"}
#: Prompts run the same kernels in graphs, but libraries may choose another algorithm for a float product.
_GRAPH_TOLERANCE = 0.01


@dataclass(frozen=True)
class _Random:
    """A calibration set of random ids."""

    ids: Tensor

    def batches(self) -> Iterator[tuple[Tensor, None]]:
        yield self.ids, None

    def to_dict(self) -> dict[str, Any]:
        return {}


def check_models(kernels: Kernels, device: torch.device, share: slice | None = None) -> list[Check]:
    """A prompt and 8 steps of both families in W8A8 (int8 state), W4A8, W4A16 and W4AX (the second block at
    W4A16, the others at W4A8), and their CUDA graphs where the kernels are a GPU's own. No failure raises.

    share  of the models; None: all
    """
    checks: list[Check] = []
    alive = True
    graphs = device.type == "cuda" and kernels.name != "reference"
    models = checked_models()
    for config, recipe in models if share is None else models[share]:
        case = f"{config.family} {recipe}"
        comparisons = {f"{case}, prompt and {_STEPS} steps": _compare}
        if graphs:
            comparisons[f"{case}, CUDA graph"] = _compare_graph
        for name, compare in comparisons.items():
            if not alive:
                checks.append(not_run("model", name))
                continue
            checks.append(_check(name, partial(compare, config, recipe, kernels, device)))
            alive = bool(checks[-1].passed) or is_usable(device)
    return checks


def checked_models() -> list[tuple[ModelConfig, str]]:
    """The models of :func:`check_models` in their order, each a shape and a precision."""
    return [(config, recipe) for config in _configs() for recipe in _TOLERANCES]


def _check(name: str, compare: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        detail = compare()
    except Exception as error:
        detail = first_line(error)
    return Check("model", name, not detail, detail, time.perf_counter() - start)


def _compare(config: ModelConfig, recipe: str, kernels: Kernels, device: torch.device) -> str:
    network = _quantized(config, recipe)
    exact = copy.deepcopy(network).set_compute_dtype(torch.float64).use_kernels(REFERENCE)
    wanted_prompt, wanted_steps = _logits(exact)
    prompt, steps = _logits(_placed(network, kernels, device))
    limit = _TOLERANCES[recipe]
    faults = [_too_far("prompt", prompt, wanted_prompt, limit), _too_far("steps", steps, wanted_steps, limit)]
    return "; ".join(filter(None, faults))


@torch.inference_mode()
def _compare_graph(config: ModelConfig, recipe: str, kernels: Kernels, device: torch.device) -> str:
    network = _placed(_quantized(config, recipe), kernels, device)
    ids = _ids(network.config.vocab_size).to(device)
    prompt, steps = ids[:, :_PROMPT], ids[:, _PROMPT:].unbind(1)
    wanted_prompt, cache = prefill(network, prompt, graph=False)
    wanted_steps = torch.stack([decode_step(network, step, cache) for step in steps], dim=1)
    found_prompt, cache = prefill(network, prompt, graph=True)
    graph = DecodeGraph(network, _BATCH)
    graph.take(cache)
    found_steps = torch.stack([graph.step(step).clone() for step in steps], dim=1)
    faults = [
        _too_far("prompt", found_prompt.cpu(), wanted_prompt.cpu(), _GRAPH_TOLERANCE),
        # Fused, so that floats are rounded elsewhere than between single ops, as in another backend.
        _too_far("steps", found_steps.cpu(), wanted_steps.cpu(), _TOLERANCES[recipe]),
    ]
    return "; ".join(filter(None, faults))


def _placed(network: MambaLM, kernels: Kernels, device: torch.device) -> MambaLM:
    """A copy as ``load`` would make it: floats are float16 on a GPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return copy.deepcopy(network).set_compute_dtype(dtype).to(device).use_kernels(kernels)


@torch.inference_mode()
def _logits(network: MambaLM) -> tuple[Tensor, Tensor]:
    """Of the prompt (B, L, V) and of the steps after it (B, 8, V), on the CPU."""
    ids = _ids(network.config.vocab_size).to(network.device)
    cache = network.new_cache(_BATCH)
    prompt = network(ids[:, :_PROMPT], cache)
    step = step_of(network, cache)
    steps = [step(ids[:, i]).clone() for i in range(_PROMPT, _PROMPT + _STEPS)]
    return prompt.cpu(), torch.stack(steps, dim=1).cpu()


def _too_far(what: str, found: Tensor, wanted: Tensor, limit: float) -> str:
    if found.shape != wanted.shape:
        return f"{what}: the logits' shape is {list(found.shape)}, expected {list(wanted.shape)}"
    if not found.isfinite().all():
        return f"{what}: {int((~found.isfinite()).sum())} of {found.numel()} logits are not finite"
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return (
        "" if error <= limit else f"{what}: the logits are off by {error:.2g} of their size, allowed {limit}"
    )


def _ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocabulary, (_BATCH, _PROMPT + _STEPS), generator=generator)


def _configs() -> list[ModelConfig]:
    common: dict[str, Any] = {"d_model": 128, "n_layer": 2, "vocab_size": 200}
    return [MambaConfig(**common, d_state=16), Mamba2Config(**common, d_state=32, headdim=32, ngroups=2)]


@functools.lru_cache(maxsize=1)
def _quantized(config: ModelConfig, recipe: str) -> MambaLM:
    calibration = _Random(_ids(config.vocab_size))
    return quantize_model(_random_model(config), _recipe(recipe), calibration)[0].use_kernels(REFERENCE)


def _recipe(name: str) -> Recipe:
    """The shipped recipe without its solver, which is slow and gives weights of the same format."""
    recipe = load_recipe("w4a8" if name == "w4ax" else name)
    blocks = dataclasses.replace(recipe.blocks, state=_STATES[name])
    mixed = (Override(blocks=(1,), precision=load_recipe("w4a16").blocks),) if name == "w4ax" else ()
    return recipe.replace(blocks=blocks, overrides=mixed, solver=Solver(kind="rtn", scale="absmax"))


def _random_model(config: ModelConfig) -> MambaLM:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: _random_tensor(name, meta, generator)
        for name, meta in MambaLM.empty(config).named_tensors().items()
    }
    return MambaLM.from_tensors(config, tensors)


def _random_tensor(name: str, meta: Tensor, generator: torch.Generator) -> Tensor:
    """About the spread of trained models: the mean and the deviation by the kind of tensor."""
    mean, deviation = 0.0, meta.shape[-1] ** -0.5
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        mean, deviation = 0.5, 0.5
    elif leaf == "dt_bias":
        mean, deviation = -2.0, 1.0
    elif leaf == "D" or "norm" in name:
        mean, deviation = 1.0, 0.2
    elif leaf == "bias":
        deviation = 0.2
    elif "embedding" in name:
        deviation = 1.0
    return mean + deviation * torch.randn(meta.shape, generator=generator)

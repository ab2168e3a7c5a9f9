"""Networks with random weights, for measuring time: of a plan's formats, or of published sizes.

Weights are drawn so that activations stay of about unit size and int8 codes seldom saturate.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from quamba.kernels.registry import choose_kernels
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear
from quamba.recipes.plan import Plan
from quamba.recipes.skeleton import skeleton

PUBLISHED: dict[str, ModelConfig] = {
    "mamba2-130m": Mamba2Config(d_model=768, n_layer=24, vocab_size=50288),
    "mamba2-2.7b": Mamba2Config(d_model=2560, n_layer=64, vocab_size=50288),
    "mamba-130m": MambaConfig(d_model=768, n_layer=24, vocab_size=50280),
    "mamba-2.8b": MambaConfig(d_model=2560, n_layer=64, vocab_size=50280),
    "mamba2-8b": Mamba2Config(d_model=4096, n_layer=56, vocab_size=256000, ngroups=8, tie_embeddings=False),
}

# Standard deviations of codes drawn uniformly, of 8 and of 4 bits.
_STD_INT8, _STD_INT4 = 254 / math.sqrt(12), 15 / math.sqrt(12)
#: One step of int8 activations and states: codes reach 3.2.
_ACTIVATION_STEP = 0.025


def compute_dtype(device: torch.device) -> torch.dtype:
    """Floats between leaves: float16, which CPUs are slow with, so float32 there."""
    return torch.float16 if device.type == "cuda" else torch.float32


def one_block_plans(plan: Plan) -> list[Plan]:
    """For each kind of block in a plan, the plan of a model of one such block."""
    kinds = {str(block): block for block in plan.blocks}
    config = dataclasses.replace(plan.config, n_layer=1)
    return [dataclasses.replace(plan, config=config, blocks=(block,)) for block in kinds.values()]


def random_network(plan: Plan, device: torch.device) -> MambaLM:
    return fill(skeleton(plan).set_compute_dtype(compute_dtype(device)), device)


def fill(network: MambaLM, device: torch.device, seed: int = 0) -> MambaLM:
    """Random weights on the device, and the kernels of that device."""
    torch.manual_seed(seed)
    shapes = network.named_tensors()
    linears = {name: leaf for name, leaf in network.named_modules() if isinstance(leaf, Linear)}
    folded = {f"{name}.weight" for name, leaf in linears.items() if leaf.input_scale_folded}
    network.load_tensors({name: _random(name, shapes, folded, device) for name in shapes})
    return network.use_kernels(choose_kernels(device))


def _random(name: str, shapes: dict[str, Tensor], folded: set[str], device: torch.device) -> Tensor:
    meta = shapes[name]
    tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    if name.endswith("state_group"):
        groups = shapes[name.replace("state_group", "state_scale")].shape[0]
        order = torch.arange(tensor.numel(), device=device) * groups // tensor.numel()
        return tensor.copy_(order.view(tensor.shape))
    if tensor.dtype == torch.uint8:
        return tensor.random_(0, 256)
    if tensor.dtype == torch.int8:
        return tensor.random_(-127, 128)
    if "scale" in name.rsplit(".", 1)[-1]:
        return tensor.fill_(_scale(name, shapes, folded))
    if "A_log" in name:
        return tensor.uniform_(0, 1)
    if "dt_bias" in name:
        return tensor.fill_(-3.0)
    if tensor.ndim == 1:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    std = 1.0 if "embedding" in name else tensor.shape[1] ** -0.5
    return tensor.normal_(0.0, std)


def _scale(name: str, shapes: dict[str, Tensor], folded: set[str]) -> float:
    """That of a weight gives it the spread of the float one; of a small parameter, values up to 1.

    folded  weights whose columns contain the scales of their input
    """
    weight, _, kind = name.rpartition(".")
    if not weight.endswith(".weight"):
        return 1 / 127 if kind == "scale" else _ACTIVATION_STEP
    if kind == "scale" and f"{weight}.channel_scale" in shapes:
        return 16.0  # of 4-bit codes in a row with a scale of its own: up to 128
    data = shapes[f"{weight}.data"]
    four_bits = data.dtype == torch.uint8
    spread = 1.0 if "embedding" in name else (data.shape[1] * (2 if four_bits else 1)) ** -0.5
    if weight in folded:
        spread *= _ACTIVATION_STEP
    return spread / (_STD_INT4 if four_bits and kind == "scale" else _STD_INT8)

"""Small random models: every tensor drawn from a scale at which all paths matter."""

from __future__ import annotations

import torch

from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM


def tiny_config(family: str, **changes: object) -> ModelConfig:
    """Two layers, sizes that rotate (32, 64) and are no multiples of the kernels' tiles."""
    common = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "pad_vocab_size_multiple": 8}
    if family == "mamba2":
        return Mamba2Config(**{**common, "d_state": 16, "headdim": 8, "chunk_size": 16, **changes})
    return MambaConfig(**{**common, "d_state": 8, "dt_rank": 4, **changes})


def tiny_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> MambaLM:
    """Random weights of about the spread that trained models have."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {}
    for name, meta in MambaLM.empty(config).named_tensors().items():
        shape, leaf = tuple(meta.shape), name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            tensors[name] = draw(*shape, scale=0.5, mean=0.5)
        elif leaf == "dt_bias":
            tensors[name] = draw(*shape, mean=-2.0)
        elif leaf == "D" or "norm" in name:
            tensors[name] = draw(*shape, scale=0.2, mean=0.0 if leaf == "bias" else 1.0)
        elif leaf == "bias":
            tensors[name] = draw(*shape, scale=0.2)
        elif "conv1d" in name:
            tensors[name] = draw(*shape, scale=0.4)
        elif "embedding" in name:
            tensors[name] = draw(*shape)
        else:
            tensors[name] = draw(*shape, scale=shape[-1] ** -0.5)
    model = MambaLM.from_tensors(config, tensors)
    return model.set_compute_dtype(dtype)

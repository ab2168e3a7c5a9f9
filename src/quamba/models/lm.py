"""The language model: embedding, residual blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from quamba.formats.activation import Activation
from quamba.kernels.registry import Kernels
from quamba.models.cache import LayerCache, MambaCache
from quamba.models.config import MambaConfig, ModelConfig
from quamba.models.mamba1 import MambaMixer
from quamba.models.mamba2 import Mamba2Mixer
from quamba.modules.embedding import Embedding
from quamba.modules.leaf import Leaf
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm


class Block(nn.Module):
    """Add the residual, normalise, mix. The sum of the last block is left to the next norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = _residual_norm(config)
        self.mixer = MambaMixer(config) if isinstance(config, MambaConfig) else Mamba2Mixer(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, cache: LayerCache | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(hidden, residual)
        return self.mixer(normed, cache, mask), residual


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = _residual_norm(config)

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, layer) for layer in self.layers]

    def forward(self, ids: Tensor, cache: MambaCache | None, mask: Tensor | None) -> Activation:
        return self.read(self.embedding(ids), cache, mask)

    def read(self, hidden: Tensor, cache: MambaCache | None, mask: Tensor | None) -> Activation:
        """From embeddings (B, L, d_model) to the output of norm_f."""
        residual = None
        for i, block in enumerate(self.blocks):
            hidden, residual = block(hidden, residual, cache and cache.layers[i], mask)
        return self.norm_f(hidden, residual)[0]


class MambaLM(nn.Module):
    """A Mamba or Mamba-2 language model in any precision; which one is in the leaves.

    Built on the meta device by ``empty``; ``load_tensors`` fills it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size)
        self.tied = config.tie_embeddings
        if self.tied:
            self.lm_head.weight = self.backbone.embedding.weight

    @classmethod
    def empty(cls, config: ModelConfig) -> MambaLM:
        with torch.device("meta"):
            return cls(config).eval()

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> MambaLM:
        """A float model around the given tensors (names: docs/architecture.md), without copying them."""
        model = cls.empty(config)
        model.load_tensors(tensors)
        return model

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Assign every parameter and buffer; names must match exactly (no lm_head.weight when tied)."""
        tensors = dict(tensors)
        if self.tied:
            tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
        self.load_state_dict(tensors, strict=True, assign=True)
        self.requires_grad_(False)
        if self.tied:
            self.lm_head.weight = self.backbone.embedding.weight

    def untie(self) -> None:
        """Give the head its own copy of the embedding table, as rotation and quantization need."""
        if self.tied:
            table = self.backbone.embedding.float_weight
            self.lm_head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
            self.tied = False

    def named_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer under its saved name; a tied head is left out."""
        tensors = self.state_dict()
        if self.tied:
            tensors.pop("lm_head.weight")
        return tensors

    @property
    def blocks(self) -> list[Block]:
        return self.backbone.blocks

    @property
    def device(self) -> torch.device:
        return self.blocks[0].mixer.ssm.A_log.device

    def forward(
        self,
        ids: Tensor,
        cache: MambaCache | None = None,
        mask: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """ids (B, L) int64 -> logits (B, L, padded_vocab) float; (B, 1, padded_vocab) with last_only.

        cache  read and advanced by L tokens, so that a prompt and single tokens go one way
        mask   (B, L) bool, False at left padding; only with an empty cache
        """
        with on_device(self.device):
            hidden = self.backbone(ids, cache, mask)
            if last_only:
                hidden = _last_token(hidden)
            return self.lm_head(hidden)

    def new_cache(self, batch: int, *, working: bool = False) -> MambaCache:
        """Zeros. ``working``: for the pieces of one prompt, with SSM states that nothing rounds between."""
        return MambaCache([_new_layer(block, batch, self.device, working) for block in self.blocks])

    def working_cache(self, cache: MambaCache) -> MambaCache:
        """A copy of a cache, stored or working, as a working one."""
        return MambaCache(
            [
                LayerCache(layer.conv_state.clone(), block.mixer.ssm.working(layer.ssm_state))
                for block, layer in zip(self.blocks, cache.layers, strict=True)
            ]
        )

    def stored_cache(self, cache: MambaCache) -> MambaCache:
        """A working cache in the formats that states are stored in; shares the tensors that have them."""
        return MambaCache(
            [
                LayerCache(layer.conv_state, block.mixer.ssm.stored(layer.ssm_state))
                for block, layer in zip(self.blocks, cache.layers, strict=True)
            ]
        )

    def use_kernels(self, kernels: Kernels) -> MambaLM:
        """Bind every leaf to these kernels."""
        use_kernels(self, kernels)
        return self

    @property
    def kernels(self) -> Kernels:
        return self.lm_head.kernels

    def set_compute_dtype(self, dtype: torch.dtype) -> MambaLM:
        """Floats between leaves, and float weights of projections, in ``dtype``.

        Norm weights and the recurrence's A_log, D and dt_bias keep float32 (float64 if dtype is).
        """
        set_compute_dtype(self, dtype)
        return self


def use_kernels(module: nn.Module, kernels: Kernels) -> None:
    """``MambaLM.use_kernels`` for a part of a model."""
    for leaf in module.modules():
        if isinstance(leaf, Leaf):
            leaf.kernels = kernels


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """``MambaLM.set_compute_dtype`` for a part of a model that holds whole leaves."""
    for leaf in module.modules():
        if isinstance(leaf, Leaf):
            leaf.compute_dtype = dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in module.named_parameters():
        keep = ".ssm." in f".{name}" or "norm" in name
        parameter.data = parameter.data.to(wide if keep else dtype)


def _new_layer(block: Block, batch: int, device: torch.device, working: bool) -> LayerCache:
    layer = block.mixer.new_cache(batch, device)
    if working:
        layer.ssm_state = block.mixer.ssm.new_state(batch, device, working=True)
    return layer


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one kernels are launched on: Triton takes the current one, not that of its tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _residual_norm(config: ModelConfig) -> AddNorm:
    return AddNorm(
        config.d_model,
        config.norm_eps,
        layer_norm=not config.rms_norm,
        residual_in_fp32=config.residual_in_fp32,
    )


def _last_token(x: Activation) -> Activation:
    return x._replace(codes=x.codes[:, -1:]) if not isinstance(x, Tensor) else x[:, -1:]

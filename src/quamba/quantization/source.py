"""The float model that is quantized, one block at a time.

Wherever its tensors lie, in memory or mapped from a checkpoint's files, only the part that is worked on is
copied: in float32, on the device that computes, and rewritten as the plan says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from quamba.kernels.registry import REFERENCE
from quamba.models.lm import Block, MambaLM, set_compute_dtype, use_kernels
from quamba.models.mamba2 import Mamba2Mixer
from quamba.modules.norm import AddNorm
from quamba.quantization.parameters import round_block, round_to_float16
from quamba.recipes.plan import Plan
from quamba.transforms.fuse_norm import folded, fuse_block
from quamba.transforms.head_grouping import ChannelOrder
from quamba.transforms.reorder import reorder
from quamba.transforms.rotate import rotate_block, rotate_rows

# Of the embedding table and the head, which are as large as ten blocks: rows that are worked on at once.
SLAB_ELEMENTS = 1 << 27

_Module = TypeVar("_Module", bound=nn.Module)
Release = Callable[[Iterable[Tensor]], None]


class FloatModel:
    """
    orders   layer -> order of its heads and channels; filled once they are known
    release  told of tensors of the given model that are not needed for a while
    """

    def __init__(self, model: MambaLM, plan: Plan, device: torch.device, release: Release | None) -> None:
        self._model, self._plan, self._device = model, plan, device
        self._release = release or (lambda tensors: None)
        self.orders: dict[int, ChannelOrder] = {}

    def fused_block(self, i: int) -> Block:
        """A copy of block i, its norm in its projection if the plan says so."""
        given = self._model.blocks[i]
        block = self._copy(given)
        self._release(given.state_dict().values())
        if self._plan.folds_norms:
            fuse_block(block)
        return block

    def exact_block(self, i: int) -> Block:
        """Also reordered and rotated: the same function, with nothing rounded."""
        block = self.fused_block(i)
        if i in self.orders:
            assert isinstance(block.mixer, Mamba2Mixer)
            reorder(block.mixer, self.orders[i])
        if self._plan.rotate:
            rotate_block(block)
        return block

    def rounded_block(self, i: int) -> Block:
        """Also with its small parameters as the recipe stores them; weights to be quantized are float."""
        block = self.exact_block(i)
        round_block(block, self._plan, i)
        return block

    def embed(self, ids: Tensor, *, rotated: bool = True, rounded: bool = True) -> Tensor:
        """ids (B, L) -> rows of the float table, (B, L, d_model) float32."""
        rows = self._table[ids.flatten().to(self._table.device)]
        self._release([self._table])
        return self._table_rows(rows, rotated, rounded).view(*ids.shape, -1)

    def table_slabs(self, *, whole: bool = False) -> Iterator[Tensor]:
        """The embedding table as the plan's function has it, some rows at a time: (n, d_model) float32."""
        for rows in self._slabs(self._table, whole):
            yield self._table_rows(rows, True, True)

    def head_slabs(self, *, whole: bool = False, rounded: bool = True) -> Iterator[Tensor]:
        """The head in the same way; ``rounded``: to float16, where it stays float and the recipe says so."""
        plan = self._plan
        weight = self._table if self._model.tied else self._model.lm_head.float_weight
        norm = self._model.backbone.norm_f.weight
        for rows in self._slabs(weight, whole):
            part = self._float32(rows)
            if plan.folds_norms and norm is not None:
                part = folded(part, self._float32(norm))
            part = rotate_rows(part) if plan.rotate else part
            rounds = rounded and plan.head is None and plan.recipe.parameters != "float32"
            yield round_to_float16("lm_head.weight", part) if rounds else part

    def norm_f(self, *, rounded: bool = True) -> AddNorm:
        norm = self._copy(self._model.backbone.norm_f)
        if self._plan.folds_norms:
            norm.weight = None
        if rounded and self._plan.recipe.parameters != "float32":
            for name, parameter in norm.named_parameters(prefix="backbone.norm_f"):
                parameter.data = round_to_float16(name, parameter)
        return norm

    @property
    def _table(self) -> Tensor:
        return self._model.backbone.embedding.float_weight

    def _table_rows(self, rows: Tensor, rotated: bool, rounded: bool) -> Tensor:
        plan, rows = self._plan, self._float32(rows)
        if rotated and plan.rotate:
            rows = rotate_rows(rows)
        if rounded and plan.embedding is None and plan.recipe.parameters != "float32":
            rows = round_to_float16("backbone.embedding.weight", rows)
        return rows

    def _slabs(self, weight: Tensor, whole: bool) -> Iterator[Tensor]:
        size = len(weight) if whole else max(1, SLAB_ELEMENTS // weight.shape[1])
        for rows in weight.detach().split(size):
            yield rows
            self._release([rows])

    def _float32(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, torch.float32)

    def _copy(self, module: _Module) -> _Module:
        """On the reference kernels: calibration hooks and gradients need nothing but torch."""
        module = copy.deepcopy(module).to(self._device)
        set_compute_dtype(module, torch.float32)
        use_kernels(module, REFERENCE)
        return module

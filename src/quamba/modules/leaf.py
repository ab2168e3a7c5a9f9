"""What all leaves share: the kernels they run on, and the format of what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.formats.activation import Activation, Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.registry import REFERENCE, Kernels


class Leaf(nn.Module):
    """One op of a block.

    out_scale      None: gives floats of ``compute_dtype``; a float32 tensor, () or (C,): gives
                   int8 codes of that scale
    compute_dtype  dtype of the floats it gives; float32 unless the model says otherwise
    """

    out_scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out_scale", None)
        self.kernels: Kernels = REFERENCE
        self.compute_dtype: torch.dtype = torch.float32

    def give(self, out: Tensor) -> Activation:
        """Pair the kernel's int8 output with its scale."""
        return out if self.out_scale is None else Quantized(out, self.out_scale)


class WeightedLeaf(Leaf):
    """A leaf around one matrix, float or quantized."""

    weight: nn.Parameter | QuantizedWeight

    @property
    def float_weight(self) -> nn.Parameter:
        """The weight of a leaf that is known to be float still."""
        assert isinstance(self.weight, nn.Parameter), "this weight is quantized already"
        return self.weight

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Put a ``QuantizedWeight`` where a float parameter was."""
        del self.weight  # a module cannot be assigned over a parameter
        self.weight = weight


def parameter_or_empty(*shape: int, device: torch.device | str | None = None) -> nn.Parameter:
    """An uninitialised inference parameter; a checkpoint fills it."""
    return nn.Parameter(torch.empty(*shape, device=device), requires_grad=False)

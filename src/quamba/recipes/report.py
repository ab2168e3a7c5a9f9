"""What a quantization decided, lost and cost; saved beside the weights as ``quantization_report.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """
    recipe       as asked for
    calibration  text source, counts, seed, fingerprint
    layers       one entry a projection: name, bits, granularity; with GPTQ the loss
                 tr((W - Q) H (W - Q)^T) / tr(W H W^T) of rounding to nearest and of the solver
    head_groups  one ``ChannelOrder`` a block, where heads were grouped
    seconds      wall time a stage
    peak_gpu_bytes  the most that tensors took on the GPU; None without one
    """

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    head_groups: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gpu_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is None is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

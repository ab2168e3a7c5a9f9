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
    """

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    head_groups: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

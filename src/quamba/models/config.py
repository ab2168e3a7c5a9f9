"""Sizes and switches of the two model families.

Names are those of the state-spaces code base. Every field here changes what the model computes;
how a checkpoint's own config file maps to them is in ``checkpoints/upstream.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from quamba.errors import QuambaError, nearest, one_of

Family = Literal["mamba", "mamba2"]


@dataclass(frozen=True, kw_only=True)
class _CommonConfig:
    d_model: int
    n_layer: int
    vocab_size: int
    d_conv: int = 4
    expand: int = 2
    bias: bool = False
    conv_bias: bool = True
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    norm_eps: float = 1e-5

    family: ClassVar[Family]

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "d_conv", "expand", "pad_vocab_size_multiple"):
            _require_positive(name, getattr(self, name))

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to the padding multiple."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that ``config_from_dict`` reads back to an equal object."""
        fields = dataclasses.asdict(self)
        if "dt_limit" in fields:  # JSON has no infinity
            fields["dt_limit"] = [None if math.isinf(v) else v for v in fields["dt_limit"]]
        return {"family": self.family, **fields}


@dataclass(frozen=True, kw_only=True)
class MambaConfig(_CommonConfig):
    """Mamba1 (Gu and Dao 2023). With ``bcdt_rms_eps`` set, Falcon Mamba: B, C and dt are RMS-normalised."""

    family: ClassVar[Family] = "mamba"
    d_state: int = 16
    dt_rank: int = 0  # 0: ceil(d_model / 16)
    bcdt_rms_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_rank == 0:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        _require_positive("d_state", self.d_state)
        _require_positive("dt_rank", self.dt_rank)

    @property
    def conv_dim(self) -> int:
        return self.d_inner


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(_CommonConfig):
    """Mamba2 (Dao and Gu 2024)."""

    family: ClassVar[Family] = "mamba2"
    d_state: int = 128
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    D_has_hdim: bool = False
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    pad_vocab_size_multiple: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_state", "headdim", "ngroups", "chunk_size"):
            _require_positive(name, getattr(self, name))
        if self.d_inner % self.headdim:
            raise QuambaError(
                f"headdim {self.headdim} does not divide d_inner {self.d_inner} (expand x d_model)."
            )
        if self.nheads % self.ngroups:
            raise QuambaError(f"ngroups {self.ngroups} does not divide the number of heads {self.nheads}.")
        low, high = self.dt_limit
        if not 0.0 <= low < high:
            raise QuambaError(f"dt_limit is {self.dt_limit}, expected 0 <= low < high.")

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, then B and C of every group."""
        return self.d_inner + 2 * self.ngroups * self.d_state


ModelConfig = MambaConfig | Mamba2Config
FAMILIES: dict[str, type[MambaConfig] | type[Mamba2Config]] = {"mamba": MambaConfig, "mamba2": Mamba2Config}


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """Inverse of ``to_dict``. Unknown keys and families are errors."""
    fields = dict(fields)
    family = fields.pop("family", None)
    if family not in FAMILIES:
        raise one_of("The model family in the config", family, FAMILIES)
    cls = FAMILIES[family]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise QuambaError(f"Unknown config field '{key}' for family '{family}'.{nearest(key, known)}")
    if "dt_limit" in fields:
        low, high = fields["dt_limit"]
        fields["dt_limit"] = (float(low or 0.0), math.inf if high is None else float(high))
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in fields]
    if missing:
        raise QuambaError(f"The model config lacks {', '.join(missing)}.")
    return cls(**fields)


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise QuambaError(f"{name} is {value!r}, expected a positive integer.")

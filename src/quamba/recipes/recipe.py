"""The whole statement of what the user wants: which numbers, which rewrites, which solver.

A ``Recipe`` is immutable, comes from a shipped TOML file, a file of the user's or the command
line, is saved with the model, and is never looked at again once ``resolve`` has made it a ``Plan``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quamba.errors import QuambaError, nearest, one_of
from quamba.formats.activation import Overflow, Rounding
from quamba.formats.weight import WeightFormat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "shipped"
WEIGHTS = ("int4", "int8", "float")
ACTIVATIONS = ("int8", "float")
STATES = ("int8", "fp16", "fp32")
ACTIVATION_SCALES = ("tensor", "channel")
CONV_SCALES = ("tensor", "channel", "split")
PARAMETERS = ("float32", "float16", "int8")
ROUNDINGS = ("half_even", "half_away")
OVERFLOWS = ("saturate", "wrap")
SOLVERS = ("rtn", "gptq", "unknown")
SCALES = ("absmax", "mse")

# Share of |x| that the scales of x cover where no percentile is given. Fewer channels behind a scale need
# less clipping, and one channel none (docs/notes/activation-scales.md).
ALPHA_TENSOR = 0.9995
ALPHA_GROUPED = 0.99999
ALPHA_CHANNEL = 1.0


def _check(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise one_of(what, value, choices)


def _check_count(what: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise QuambaError(f"{what} is {value!r}, expected an integer of at least {least}.")


def _check_switch(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise QuambaError(f"{what} is {value!r}, expected true or false.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats of one block: its projections, its activations, its cached SSM state."""

    weights: str = "float"
    activations: str = "float"
    state: str = "fp16"

    def __post_init__(self) -> None:
        _check("The weight precision", self.weights, WEIGHTS)
        _check("The activation precision", self.activations, ACTIVATIONS)
        _check("The state precision", self.state, STATES)
        if self.weights == "float" and self.activations == "int8":
            raise QuambaError(
                "Float weights with int8 activations have no kernel;"
                " use weights 'int8' or activations 'float'."
            )

    @property
    def label(self) -> str:
        """``W4A8`` and the like, the names of hybrid block configurations; ``FP16`` for all float."""
        if self.weights == "float":
            return "FP16"
        return f"W{self.weights[3:]}A{8 if self.activations == 'int8' else 16}"


@dataclass(frozen=True, kw_only=True)
class Override:
    """Another precision for some blocks; later overrides win."""

    blocks: tuple[int, ...]
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class HeadGroups:
    """Head groups and channel groups per SSD group that share a scale of x and of the state."""

    heads: int = 4
    channels: int = 4

    def __post_init__(self) -> None:
        _check_count("The number of head groups", self.heads, 1)
        _check_count("The number of channel groups", self.channels, 1)


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How weights become integers.

    kind             "rtn": to the nearest; "gptq": with feedback, then refined (``quantization/gptq.py``);
                     "unknown": in models that another program made
    damping          added to the Hessian's diagonal, as a share of its mean
    act_order        columns of large input first, with scales chosen beforehand
    scale            first scales: "absmax" or "mse" (also for rtn and for embedding tables)
    refinements      rounds of least-squares scales and coordinate descent; 0 is the published GPTQ
    propagate_error  aim at the outputs of the float model, making up for what earlier layers lost
    samples          calibration sequences that make the Hessians; None means all
    """

    kind: str = "rtn"
    damping: float = 0.1
    act_order: bool = True
    scale: Literal["absmax", "mse"] = "mse"
    refinements: int = 3
    propagate_error: bool = True
    samples: int | None = None

    def __post_init__(self) -> None:
        _check("The solver", self.kind, SOLVERS)
        _check("The solver's scale", self.scale, SCALES)
        if not _is_number(self.damping) or not 0 <= self.damping < math.inf:
            raise QuambaError(f"The solver's damping is {self.damping!r}, expected a number of at least 0.")
        _check_count("The solver's refinements", self.refinements, 0)
        if self.samples is not None:
            _check_count("The solver's samples", self.samples, 1)
        _check_switch("The solver's act_order", self.act_order)
        _check_switch("The solver's propagate_error", self.propagate_error)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    name               what tables and folders call it
    blocks, overrides  precision of the blocks (the norm before a mixer belongs to its block)
    embedding          "int8", "int4" or "float"
    head               precision of norm_f's output and the head; its ``state`` means nothing
    int4, int8         how weights of that width are scaled; rows are output channels or tokens
    embedding_int8     and how embedding tables are
    dt_proj            weights of Mamba1's dt_proj where the block's are int4 (it is tiny and sensitive)
    conv_scales        int8 conv weights: one scale a "channel", a "tensor", or for each of x, B, C ("split")
    parameters         "float32": A_log, D, dt_bias and norm weights as they are; "float16": rounded to it;
                       "int8": where activations are int8, A_log, D, the conv bias and Mamba1's dt_bias are
                       int8 (scaled as the conv's weights are), and the rest is as with "float16"
    rounding           of ties by the convolution and the Hadamard rotation: "half_even" or "half_away"
    overflow           of the rotation's int8 output: "saturate", or "wrap" as in the published kernels
    activation_scales  z, dt, the conv's input and output: one scale a "channel"; or a "tensor": in Mamba2
                       one for each of z, x, B, C, dt, in Mamba1 one for x and z and one for dt, B and C;
                       sites that feed a matrix product of integers have one scale whatever this says
    percentile_alpha   share of |x| that the scales of the conv output x (and of a state with one scale a
                       tensor) cover; 1.0 is absmax; None: 0.9995 with one scale a tensor, 0.99999 with
                       group_heads, 1.0 with one a channel
    rotate             Hadamard rotation of the residual stream and of the scan output
    group_heads        Mamba2 with int8 activations: sort and cluster heads and channels; None for off
    solver             round to nearest or GPTQ
    """

    name: str
    blocks: Precision
    overrides: tuple[Override, ...] = ()
    embedding: str = "float"
    head: Precision = field(default_factory=Precision)
    int4: WeightFormat = field(default_factory=lambda: WeightFormat(4, "group", 128))
    int8: WeightFormat = field(default_factory=lambda: WeightFormat(8, "channel"))
    embedding_int4: WeightFormat = field(default_factory=lambda: WeightFormat(4, "group", 128))
    embedding_int8: WeightFormat = field(default_factory=lambda: WeightFormat(8, "channel"))
    dt_proj: str = "int8"
    conv_scales: Literal["tensor", "channel", "split"] = "channel"
    parameters: Literal["float32", "float16", "int8"] = "float32"
    rounding: Rounding = "half_even"
    overflow: Overflow = "saturate"
    activation_scales: Literal["tensor", "channel"] = "channel"
    percentile_alpha: float | None = None
    rotate: bool = True
    group_heads: HeadGroups | None = None
    solver: Solver = field(default_factory=Solver)
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise QuambaError(
                f"The recipe has version {self.version}, this release reads version 1; update quamba."
            )
        if not isinstance(self.name, str) or not self.name:
            raise QuambaError(f"The recipe's name is {self.name!r}, expected a text.")
        _check("The embedding precision", self.embedding, WEIGHTS)
        _check("The precision of dt_proj", self.dt_proj, WEIGHTS)
        _check("conv_scales", self.conv_scales, CONV_SCALES)
        _check("parameters", self.parameters, PARAMETERS)
        _check("rounding", self.rounding, ROUNDINGS)
        _check("overflow", self.overflow, OVERFLOWS)
        _check("activation_scales", self.activation_scales, ACTIVATION_SCALES)
        _check_switch("rotate", self.rotate)
        alpha = self.percentile_alpha
        if alpha is not None and not (_is_number(alpha) and 0.5 < alpha <= 1.0):
            raise QuambaError(
                f"percentile_alpha is {alpha!r}, expected a share above 0.5 and at most 1.0"
                " (1.0 is the absolute maximum)."
            )
        tables = (self.embedding_int4, self.embedding_int8)
        for bits, format in ((4, self.int4), (8, self.int8), *zip((4, 8), tables, strict=True)):
            if format.bits != bits:
                raise QuambaError(
                    f"The recipe's int{bits} format says bits = {format.bits}, expected {bits}."
                )
        for format in tables:
            if format.granularity in ("split", "two_level"):
                raise QuambaError(
                    f"An embedding table has granularity '{format.granularity}',"
                    " expected 'tensor', 'channel' or 'group'."
                )
            if format.multiples is not None:
                raise QuambaError(
                    f"The int{format.bits} format of an embedding table has multiples {format.multiples},"
                    " expected none; they are for products of integers."
                )

    def replace(self, **changes: Any) -> Recipe:
        return dataclasses.replace(self, **changes)

    @property
    def alpha(self) -> float:
        """percentile_alpha with its default filled in."""
        if self.percentile_alpha is not None:
            return self.percentile_alpha
        if self.group_heads:
            return ALPHA_GROUPED
        return ALPHA_TENSOR if self.activation_scales == "tensor" else ALPHA_CHANNEL

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that ``from_dict`` reads back to an equal recipe."""
        fields = dataclasses.asdict(self)
        fields["overrides"] = [
            {"blocks": list(o.blocks), "precision": dataclasses.asdict(o.precision)} for o in self.overrides
        ]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """From JSON or TOML. Unknown keys are errors; ``blocks`` and ``head`` may be labels like "W4A8"."""
        fields = dict(fields)
        _refuse_unknown("recipe", fields, cls)
        for key in ("name", "blocks"):
            if key not in fields:
                raise QuambaError(f"The recipe lacks '{key}'.")
        for key in ("blocks", "head"):
            if key in fields:
                fields[key] = _precision(fields[key])
        overrides = fields.get("overrides", ())
        if not isinstance(overrides, list | tuple):
            raise QuambaError(f"The recipe's overrides are {overrides!r}, expected a list of tables.")
        fields["overrides"] = tuple(_override(o) for o in overrides)
        for key in ("int4", "int8", "embedding_int4", "embedding_int8"):
            if key in fields:
                fields[key] = WeightFormat.from_dict(_build_fields(WeightFormat, key, fields[key]))
        if fields.get("group_heads") is not None:
            fields["group_heads"] = _build(HeadGroups, "group_heads", fields["group_heads"])
        if "solver" in fields:
            fields["solver"] = _build(Solver, "solver", fields["solver"])
        return cls(**fields)


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or a TOML file by path."""
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise QuambaError(f"The recipe file '{path}' does not exist.")
    else:
        path = SHIPPED / f"{name_or_path}.toml"
        if not path.is_file():
            raise one_of("The recipe", str(name_or_path), shipped_names())
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QuambaError(f"The recipe file '{path}' is not valid TOML: {error}.") from error


def precision(weight_bits: int, activation_bits: int, state: str | None = None) -> Precision:
    """The published pairs 8/8, 4/8 and 4/16; the state is fp16 unless given."""
    if (weight_bits, activation_bits) not in ((8, 8), (4, 8), (4, 16)):
        raise QuambaError(
            f"w_bits {weight_bits} with a_bits {activation_bits} is no supported pair;"
            " choose 8 and 8, 4 and 8, or 4 and 16."
        )
    activations = "int8" if activation_bits == 8 else "float"
    return Precision(
        weights=f"int{weight_bits}",
        activations=activations,
        state=state or "fp16",
    )


_LABELS = {
    "W8A8": Precision(weights="int8", activations="int8"),
    "W4A8": Precision(weights="int4", activations="int8"),
    "W4A16": Precision(weights="int4", activations="float"),
    "FP16": Precision(weights="float", activations="float"),
}


def _precision(value: object) -> Precision:
    if isinstance(value, str):
        if value.upper() not in _LABELS:
            raise one_of("The precision", value, _LABELS)
        return _LABELS[value.upper()]
    return _build(Precision, "precision", value)


def _override(value: object) -> Override:
    fields = _build_fields(Override, "override", value)
    blocks = fields.get("blocks")
    if not isinstance(blocks, list | tuple) or not all(type(b) is int and b >= 0 for b in blocks):
        raise QuambaError(
            f"An override's blocks are {blocks!r}, expected a list of block numbers such as [0, 5]."
        )
    return Override(blocks=tuple(blocks), precision=_precision(fields.get("precision")))


def _build(cls: type[Any], what: str, value: object) -> Any:
    return cls(**_build_fields(cls, what, value))


def _build_fields(cls: type[Any], what: str, value: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise QuambaError(f"The recipe's {what} is {value!r}, expected a table of fields.")
    _refuse_unknown(what, value, cls)
    return dict(value)


def _refuse_unknown(what: str, fields: Mapping[str, Any], cls: type[Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise QuambaError(f"Unknown {what} field '{key}'.{nearest(key, known)}")

"""Every entry of a published ``pytorch_model.bin``: its name, dtype and shape, or that it is a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quamba.checkpoints.zoo.config import ZooConfig
from quamba.checkpoints.zoo.packing import padded
from quamba.models.config import Mamba2Config, MambaConfig

#: Columns that share a 4-bit group scale.
GROUP_SIZE = 128
#: To what the output columns of a linear are padded.
COLUMN_MULTIPLES = {"W8A8": 16, "W4A8": 64, "W4A16": 256}
#: Head groups and channel groups a head of grouped Mamba2 checkpoints.
GROUPS = (4, 4)


@dataclass(frozen=True)
class Entry:
    """One value of the file.

    kind        "tensor", "float" (a Python float), "none" (Python's None); in files also what else was found
    transposed  a matrix whose memory is that of its transpose: strides (1, rows)
    """

    kind: str = "tensor"
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    transposed: bool = False

    def __str__(self) -> str:
        if self.kind == "tensor":
            return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"
        return {"float": "a number", "none": "None"}.get(self.kind, self.kind)


Layout = dict[str, Entry]
FLOAT, NONE = Entry("float"), Entry("none")


def i8(*shape: int) -> Entry:
    return Entry(dtype=torch.int8, shape=shape)


def i32(*shape: int) -> Entry:
    return Entry(dtype=torch.int32, shape=shape)


def f16(*shape: int) -> Entry:
    return Entry(dtype=torch.float16, shape=shape)


def f32(*shape: int) -> Entry:
    return Entry(dtype=torch.float32, shape=shape)


def zoo_layout(config: ZooConfig, *, grouped: bool) -> Layout:
    """All entries of the model's file, in their order there.

    grouped  Mamba2 blocks with int8 activations have scales for 4 x 4 groups of heads and channels
    """
    model = config.model
    rows, d_model = model.padded_vocab_size, model.d_model
    layout = _under("backbone.embedding.", _embedding(config.embedding, rows, d_model))
    for i, label in enumerate(config.layers):
        norm, mixer = config.layer_prefixes(i)
        layout |= _under(norm, _norm(d_model, label != "W4A16"))
        if isinstance(model, MambaConfig):
            layout |= _under(mixer, _mamba(model, label))
        else:
            layout |= _under(mixer, _mamba2(model, label, grouped))
    layout |= _under("backbone.norm_f.", _norm(d_model, config.head in ("W8A8", "W4A8")))
    return layout | _under("lm_head.", linear(config.head, d_model, rows))


def linear(label: str, inputs: int, outputs: int, *, parallel: bool = False) -> Layout:
    """A projection of that precision; ``parallel``: int8 with a scale a column (Mamba2's in_proj)."""
    if label == "FP16":
        return {"weight": f16(outputs, inputs)}
    columns = padded(outputs, COLUMN_MULTIPLES[label])
    if label == "W8A8":
        weight = Entry(dtype=torch.int8, shape=(inputs, columns), transposed=True)
        if parallel:
            return {"weight": weight, "a": f32(1, 1), "b": f32(1, columns)}
        return {"weight": weight, "a": f32(1, 1), "b": f32(1, 1), "alpha": FLOAT}
    packed = {"workspace": i32(columns // 64 * 16), "weight": i32(inputs // 16, 2 * columns)}
    group = f16(inputs // GROUP_SIZE, columns)
    if label == "W4A16":
        return {**packed, "scale": group}
    return {**packed, "input_scale": f32(), "s_channel": f32(1, columns), "s_group": group}


def _under(prefix: str, layout: Layout) -> Layout:
    return {prefix + name: entry for name, entry in layout.items()}


def _embedding(bits: str, rows: int, columns: int) -> Layout:
    if bits == "float":
        return {"weight": f16(rows, columns)}
    weight = i8(rows, columns) if bits == "int8" else i32(rows, columns // 8)
    return {"weight": weight, "scales": f16(rows)}


def _norm(d_model: int, quantized: bool) -> Layout:
    return {"weight": f16(d_model), **({"output_scale": FLOAT} if quantized else {})}


def _mamba(model: MambaConfig, label: str) -> Layout:
    inner, states, rank = model.d_inner, model.d_state, model.dt_rank
    in_proj = _under("in_proj.", linear(label, model.d_model, 2 * inner))
    x_proj = _under("x_proj.", linear(label, inner, rank + 2 * states))
    out_proj = _under("out_proj.", linear(label, inner, model.d_model))
    if label == "W4A16":
        return {
            **{"A_log": f32(inner, states), "D": f32(inner), "dt_proj_bias": f32(inner)},
            **in_proj,
            **_float_conv(inner, model.d_conv),
            **x_proj,
            "dt_proj.weight": f16(inner, rank),
            **out_proj,
        }
    scan = {
        **{"dt_bias": i8(inner), "dt_bias_scale": f32(), "A_log": i8(inner, states), "A_scale": f32()},
        **{"D": i8(inner), "D_scale": f32()},
        **{f"{name}_scale": f32() for name in ("u", "dt", "B", "C", "z", "ssm_state")},
    }
    scales = {f"{name}_scale": FLOAT for name in ("weight", "bias", "input", "output")}
    return {
        **in_proj,
        **_under("conv1d.", {"weight": i8(inner, model.d_conv), "bias": i8(inner), **scales}),
        **x_proj,
        **_under("dt_proj.", linear("W8A8", rank, inner)),  # int8 in W4A8 too
        **_under("selective_scan.", scan),
        "had.x_H_scale": FLOAT,
        **out_proj,
    }


def _mamba2(model: Mamba2Config, label: str, grouped: bool) -> Layout:
    inner, heads, channels = model.d_inner, model.nheads, model.conv_dim
    in_proj = _under("in_proj.", linear(label, model.d_model, inner + channels + heads, parallel=True))
    out_proj = _under("out_proj.", linear(label, inner, model.d_model))
    if label == "W4A16":
        return {
            **{"dt_bias": f16(heads), "A_log": f16(heads), "D": f32(heads)},
            **in_proj,
            **_float_conv(channels, model.d_conv),
            "norm.weight": f16(inner),
            **out_proj,
        }
    ranges, x, bc, state = _group_shapes(model, grouped)
    scalars = [f"{w}{part}_scale" for w in ("", "w", "b") for part in ("x", "B", "C")]
    conv = {
        **{"weight": i8(channels, model.d_conv), "bias": i8(channels), **ranges},
        **{"x_out_scales": f32(*x), "B_out_scales": f32(*bc), "C_out_scales": f32(*bc)},
        **{name: FLOAT for name in scalars},
    }
    scan = {
        **{"dt_bias": f16(heads), "A_log": i8(heads), "A_log_scale": f32(), "D": i8(heads), "D_scale": f32()},
        **{"dt_scale": f32(), "ssm_state_scale": f32(*state), "x_scales": f32(*x), **ranges},
        **{"B_scale": f32(*bc), "C_scale": f32(*bc)},
    }
    return {
        **in_proj,
        **_under("conv1d.", conv),
        **_under("qchunk_scan.", scan),
        **{"norm.weight": f16(inner), "norm.z_scale": FLOAT, "norm.output_scale": NONE},
        "had.x_H_scale": FLOAT,
        **out_proj,
    }


def _group_shapes(
    model: Mamba2Config, grouped: bool
) -> tuple[Layout, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The range tensors, and the shapes of the scales of x, of B and C, and of the state."""
    if not grouped:
        return {}, (), (), ()
    shape = (model.ngroups, *GROUPS)
    ranges = {"x_head_group_range": i32(*shape[:2]), "x_dim_group_range": i32(*shape)}
    return ranges, shape, (model.ngroups,), (*shape, model.d_state)


def _float_conv(channels: int, width: int) -> Layout:
    return {"conv1d.weight": f16(channels, 1, width), "conv1d.bias": f16(channels)}

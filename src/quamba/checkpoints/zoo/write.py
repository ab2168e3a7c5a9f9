"""Write a model as a published checkpoint, where that format can hold it (docs/zoo.md)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from quamba.checkpoints.tensors import written_beside
from quamba.checkpoints.zoo import packing
from quamba.checkpoints.zoo.config import ZooConfig, zoo_config_fields
from quamba.checkpoints.zoo.layout import COLUMN_MULTIPLES, GROUPS, Entry, Layout, zoo_layout
from quamba.checkpoints.zoo.limits import zoo_config_of
from quamba.checkpoints.zoo.packing import padded
from quamba.checkpoints.zoo.read import channel_groups, undivided
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, MambaConfig
from quamba.models.lm import MambaLM
from quamba.recipes.plan import Plan, output_parts, projections
from quamba.recipes.skeleton import skeleton

CONFIG_FILE, WEIGHT_FILE = "config.json", "pytorch_model.bin"

#: Padding columns of 4-bit weights: u = 0 in both nibbles of a byte, that is q = -8, with group scale 0.
_NO_CODES = 0x88
_NO_CHANNEL_SCALE = 1e-6

Value = Tensor | float | None
Values = dict[str, Value]


def write_zoo(
    folder: str | Path,
    network: MambaLM,
    plan: Plan,
    *,
    tokenizer_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> list[str]:
    """Write ``config.json`` and ``pytorch_model.bin`` as the published code does; inverse of ``read_zoo``.

    network          tensors of the shapes that ``plan`` gives, on any device
    tokenizer_files  copied into the folder; the published code reads none of its own
    folder           appears complete or not at all; one that is there and not empty needs ``overwrite``
    returns          sentences on what the file does not say as the network does: values that changed when
                     they were rounded, and files that the published code cannot load
    Raises QuambaError, in one sentence, for what the format cannot hold, before anything is written.
    """
    config = zoo_config_of(plan)
    tensors = _tensors(network, plan)
    layout = zoo_layout(config, grouped=plan.group_heads is not None)
    writer = _Writer(config, plan, tensors)
    stored = _as_laid_out(writer.values(), layout)
    with written_beside(folder, overwrite=overwrite) as new:
        for file in tokenizer_files:
            shutil.copyfile(file, new / file.name)
        fields = json.dumps(zoo_config_fields(config), indent=4)
        (new / CONFIG_FILE).write_text(fields + "\n", encoding="utf-8")
        torch.save(stored, new / WEIGHT_FILE)
    return _misreadings(config, plan) + writer.changes()


def _tensors(network: MambaLM, plan: Plan) -> dict[str, Tensor]:
    """The network's tensors on the CPU, those of the plan and no others."""
    found = network.named_tensors()
    expected = skeleton(plan).named_tensors()
    wrong = [
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    ]
    if wrong:
        raise QuambaError(f"The network's tensors do not fit its plan, first '{min(wrong)}'.")
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _misreadings(config: ZooConfig, plan: Plan) -> list[str]:
    """What is known to differ for the published code, whatever the values are."""
    notes = []
    integers = any(label != "W4A16" for label in config.layers)
    if config.model.family == "mamba2" and integers and plan.group_heads is None:
        notes.append(
            "The published code cannot load this file: it expects 4 x 4 head groups in Mamba2 blocks with"
            " int8 activations, and the model has none."
        )
    if config.head == "FP16":
        notes.append("The published code cannot load this file: it fails on a float head.")
    if integers and plan.recipe.rounding != "half_away":
        notes.append(
            "This model rounds ties to even in its convolutions and rotations; whoever reads the file rounds"
            " them away from zero."
        )
    return notes


class _Writer:
    """Puts the tensors of a network under the published names, block by block."""

    def __init__(self, config: ZooConfig, plan: Plan, tensors: dict[str, Tensor]) -> None:
        self._config, self._model, self._plan = config, config.model, plan
        self._tensors = tensors
        self._changes: dict[str, float] = {}

    def values(self) -> Values:
        found = _under("backbone.embedding.", self._embedding())
        for i, label in enumerate(self._config.layers):
            norm, mixer = self._config.layer_prefixes(i)
            block = f"backbone.layers.{i}."
            found |= _under(norm, self._norm(f"{block}norm", label != "W4A16"))
            if label == "W4A16":
                found |= _under(mixer, self._float_mixer(f"{block}mixer."))
            elif isinstance(self._model, MambaConfig):
                found |= _under(mixer, self._mamba(block, label, self._model))
            else:
                found |= _under(mixer, self._mamba2(block, label, self._model))
        integers = self._config.head in ("W8A8", "W4A8")
        found |= _under("backbone.norm_f.", self._norm("backbone.norm_f", integers))
        s_in = self._one("backbone.norm_f.out_scale") if integers else None
        return found | _under("lm_head.", self._linear("lm_head", self._config.head, s_in))

    def changes(self) -> list[str]:
        """A sentence for each kind of tensor with values that the file rounds."""
        return [
            f"{name} is rounded for the file; values change by up to {change:.1e} of themselves."
            for name, change in self._changes.items()
        ]

    def _embedding(self) -> Values:
        name = "backbone.embedding.weight"
        if self._config.embedding == "float":
            return {"weight": self._float(name, torch.float16)}
        data = self._tensors[f"{name}.data"]
        weight = packing.pack_embedding(data) if self._config.embedding == "int4" else data
        return {"weight": weight, "scales": self._tensors[f"{name}.scale"][:, 0]}

    def _norm(self, name: str, quantized: bool) -> Values:
        """A norm whose weight is in the next projection."""
        ones = torch.ones(self._model.d_model, dtype=torch.float16)
        scale: Values = {"output_scale": self._one(f"{name}.out_scale").item()} if quantized else {}
        return {"weight": ones, **scale}

    def _mamba(self, block: str, label: str, model: MambaConfig) -> Values:
        mixer = f"{block}mixer."
        names = ("in_proj", "conv1d", "x_proj", "dt_proj", "rotate")
        xz, x, selection, dt, y = (self._one(f"{mixer}{name}.out_scale") for name in names)
        normed = self._one(f"{block}norm.out_scale")
        conv = f"{mixer}conv1d."
        scan: Values = {
            **self._int8_parameter(f"{mixer}ssm.dt_bias", "dt_bias", "dt_bias_scale"),
            **self._int8_parameter(f"{mixer}ssm.A_log", "A_log", "A_scale"),
            **self._int8_parameter(f"{mixer}ssm.D", "D", "D_scale"),
            **{"u_scale": x, "dt_scale": dt, "B_scale": selection, "C_scale": selection, "z_scale": xz},
            "ssm_state_scale": self._one(f"{mixer}ssm.state_scale"),
        }
        return {
            **_under("in_proj.", self._linear(f"{mixer}in_proj", label, normed, xz)),
            "conv1d.weight": self._tensors[f"{conv}weight.data"],
            "conv1d.bias": self._tensors[f"{conv}bias.data"],
            "conv1d.weight_scale": self._one(f"{conv}weight.scale").item(),
            "conv1d.bias_scale": self._one(f"{conv}bias.scale").item(),
            "conv1d.input_scale": xz.item(),
            "conv1d.output_scale": x.item(),
            **_under("x_proj.", self._linear(f"{mixer}x_proj", label, x, selection)),
            **_under("dt_proj.", self._linear(f"{mixer}dt_proj", "W8A8", selection, dt)),
            **_under("selective_scan.", scan),
            "had.x_H_scale": y.item(),
            **_under("out_proj.", self._linear(f"{mixer}out_proj", label, y)),
        }

    def _mamba2(self, block: str, label: str, model: Mamba2Config) -> Values:
        mixer = f"{block}mixer."
        in_parts, conv_parts = output_parts(model, "in_proj"), output_parts(model, "conv1d")
        assert in_parts is not None and conv_parts is not None
        z, x, B, C, dt = outputs = self._parts(f"{mixer}in_proj.out_scale", in_parts, "z x B C dt")
        weights = self._parts(f"{mixer}conv1d.weight.scale", conv_parts, "x B C")
        biases = self._parts(f"{mixer}conv1d.bias.scale", conv_parts, "x B C")
        normed, y = self._one(f"{block}norm.out_scale"), self._one(f"{mixer}rotate.out_scale")
        in_scale = _spread(outputs, in_parts)
        ranges, x_out, bc_out, state = self._grouped_scales(mixer, model, conv_parts)
        B_out, C_out = bc_out
        conv: Values = {
            "weight": self._tensors[f"{mixer}conv1d.weight.data"],
            "bias": self._tensors[f"{mixer}conv1d.bias.data"],
            **ranges,
            **{"x_out_scales": x_out, "B_out_scales": B_out, "C_out_scales": C_out},
            **{"x_scale": x.item(), "B_scale": B.item(), "C_scale": C.item()},
            **{f"w{part}_scale": scale.item() for part, scale in zip("xBC", weights, strict=True)},
            **{f"b{part}_scale": scale.item() for part, scale in zip("xBC", biases, strict=True)},
        }
        scan: Values = {
            "dt_bias": self._float(f"{mixer}ssm.dt_bias", torch.float16),
            **self._int8_parameter(f"{mixer}ssm.A_log", "A_log", "A_log_scale"),
            **self._int8_parameter(f"{mixer}ssm.D", "D", "D_scale"),
            **{"dt_scale": dt, "ssm_state_scale": state, "x_scales": x_out},
            **ranges,
            **{"B_scale": B_out, "C_scale": C_out},
        }
        return {
            **_under("in_proj.", self._linear(f"{mixer}in_proj", label, normed, in_scale)),
            **_under("conv1d.", conv),
            **_under("qchunk_scan.", scan),
            "norm.weight": self._float(f"{mixer}norm.weight", torch.float16),
            **{"norm.z_scale": z.item(), "norm.output_scale": None, "had.x_H_scale": y.item()},
            **_under("out_proj.", self._linear(f"{mixer}out_proj", label, y)),
        }

    def _float_mixer(self, mixer: str) -> Values:
        """A block with float activations: only its projections are integers."""
        half = torch.float16
        mamba2 = isinstance(self._model, Mamba2Config)
        small = half if mamba2 else torch.float32
        found: Values = {
            "dt_bias" if mamba2 else "dt_proj_bias": self._float(f"{mixer}ssm.dt_bias", small),
            "A_log": self._float(f"{mixer}ssm.A_log", small),
            "D": self._float(f"{mixer}ssm.D", torch.float32),
            "conv1d.weight": self._float(f"{mixer}conv1d.weight", half)[:, None],
            "conv1d.bias": self._float(f"{mixer}conv1d.bias", half),
        }
        if mamba2:
            found["norm.weight"] = self._float(f"{mixer}norm.weight", half)
        for name in projections(self._model):
            label = "FP16" if name == "dt_proj" else "W4A16"
            found |= _under(f"{name}.", self._linear(f"{mixer}{name}", label))
        return found

    def _linear(
        self, name: str, label: str, s_in: Tensor | None = None, s_out: Tensor | None = None
    ) -> Values:
        """Codes and scales of a projection, its output columns padded as the kernels want them.

        s_in   float32 (), the scale of its int8 input
        s_out  float32, of its int8 output: (), or (rows,) for the projection with a scale a column
        """
        if label == "FP16":
            return {"weight": self._float(f"{name}.weight", torch.float16)}
        data, scale = self._tensors[f"{name}.weight.data"], self._tensors[f"{name}.weight.scale"]
        columns = padded(len(data), COLUMN_MULTIPLES[label])
        if label == "W8A8":
            assert s_in is not None
            weight = _pad_rows(data, columns, 0).t()
            if s_out is not None and s_out.ndim:
                quotient = self._quotient(f"{name}.weight.scale", scale[:, 0].expand(len(data)), s_out)
                return {"weight": weight, "a": s_in.view(1, 1), "b": _pad_rows(quotient, columns, 0)[None]}
            a = s_in if s_out is None else s_in / s_out
            alpha = scale * s_in if s_out is None else scale * s_in / s_out
            return {"weight": weight, "a": a.view(1, 1), "b": scale, "alpha": alpha.item()}
        codes, groups = _pad_rows(data, columns, _NO_CODES), _pad_rows(scale, columns, 0)
        found: Values = {
            "workspace": torch.zeros(columns // packing.TILE_COLUMNS * packing.TILE_ROWS, dtype=torch.int32),
            "weight": packing.pack_tiles(codes, "w4a16" if label == "W4A16" else "w4a8_group"),
            "scale" if label == "W4A16" else "s_group": packing.permute_group_scale(groups.t().contiguous()),
        }
        if label == "W4A8":
            channel = self._tensors[f"{name}.weight.channel_scale"][:, 0]
            if s_out is not None:
                channel = self._quotient(f"{name}.weight.channel_scale", channel, s_out)
            channel = _pad_rows(channel, columns, _NO_CHANNEL_SCALE)[None]
            found |= {"input_scale": s_in, "s_channel": packing.permute_channel_scale(channel)}
        return found

    def _int8_parameter(self, name: str, data: str, scale: str) -> Values:
        return {data: self._tensors[f"{name}.data"], scale: self._one(f"{name}.scale")}

    def _grouped_scales(
        self, mixer: str, model: Mamba2Config, parts: tuple[int, ...]
    ) -> tuple[Values, Tensor, list[Tensor], Tensor]:
        """The ranges of the groups, and the scales of x, of B and C, and of the state."""
        name = f"{mixer}conv1d.out_scale"
        x, *bc = self._tensors[name].split(list(parts))
        state = self._tensors[f"{mixer}ssm.state_scale"]
        if self._plan.group_heads is None:
            one_x, *one_bc = self._parts(name, parts, "x B C")
            return {}, one_x, one_bc, self._one(f"{mixer}ssm.state_scale")
        shape = (model.ngroups, *GROUPS)
        heads, channels = self._ranges(f"{mixer}ssm.state_group", model)
        group = self._tensors[f"{mixer}ssm.state_group"].long()
        x_out = torch.ones(len(state))  # of a group without channels: never used, but scales are positive
        x_out[group] = x
        if not torch.equal(x_out[group], x):
            raise _too_fine(f"'{name}'", "each of the 4 x 4 head groups for x")
        bc_out = [scale.view(model.ngroups, model.d_state) for scale in bc]
        if not all(bool((scale == scale[:, :1]).all()) for scale in bc_out):
            raise _too_fine(f"'{name}'", "each SSD group for B and C")
        ranges: Values = {"x_head_group_range": heads, "x_dim_group_range": channels}
        first = [scale[:, 0] for scale in bc_out]
        return ranges, x_out.view(shape), first, state.view(*shape, model.d_state)

    def _ranges(self, name: str, model: Mamba2Config) -> tuple[Tensor, Tensor]:
        """Ends of head groups and of their channel groups; inverse of ``read.channel_groups``."""
        group = self._tensors[name]
        of_head, of_channel = GROUPS
        n_heads = model.nheads // model.ngroups
        local = group.view(model.ngroups, n_heads, model.headdim) % (of_head * of_channel)
        head, channel = local[..., 0] // of_channel, local % of_channel
        heads = torch.stack([(head <= end).sum(-1) for end in range(of_head)], -1).to(torch.int32)
        ends = torch.stack([(channel <= end).sum(-1) for end in range(of_channel)], -1).to(torch.int32)
        # The channels of a head group are those of its last head; none of an empty group is ever asked for.
        last = (heads.long() - 1).clamp(min=0)[..., None].expand(-1, -1, of_channel)
        channels = ends.gather(1, last)
        if not torch.equal(channel_groups(heads, channels, n_heads, model.headdim), group):
            raise QuambaError(
                f"'{name}' is not made of 4 consecutive ranges of heads with 4 consecutive ranges of channels"
                " each, as the published format needs it; quantize with a recipe such as 'zoo-w4a8' and"
                " group_heads."
            )
        return heads, channels

    def _parts(self, name: str, parts: tuple[int, ...], letters: str) -> list[Tensor]:
        """One scale () for each part of the channels, from scales of one, of each part or of each channel."""
        scale = self._tensors[name].reshape(-1).expand(sum(parts))
        pieces = scale.split(list(parts))
        if not all(bool((piece == piece[0]).all()) for piece in pieces):
            raise _too_fine(f"'{name}'", f"each of {', '.join(letters.split())}")
        return [piece[0] for piece in pieces]

    def _one(self, name: str) -> Tensor:
        """The scale () that all channels share."""
        scale = self._tensors[name].reshape(-1)
        if not bool((scale == scale[0]).all()):
            raise _too_fine(f"'{name}'", "the whole tensor")
        return scale[0]

    def _float(self, name: str, dtype: torch.dtype) -> Tensor:
        """A float tensor in the dtype that the file has for it."""
        value = self._tensors[name]
        stored = value.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise QuambaError(
                f"'{name}' holds {float(value.abs().max()):.3g}, expected no more than the"
                f" {torch.finfo(dtype).max:.5g} that {str(dtype).removeprefix('torch.')} holds, in which the"
                " published format stores it; keep this model in our own format."
            )
        self._note(name, value, stored)
        return stored

    def _quotient(self, name: str, scale: Tensor, s_out: Tensor) -> Tensor:
        """What is stored in the place of a scale of weights, with the scale of the output in it."""
        quotient = scale / s_out
        self._note(name, scale, undivided(quotient, s_out))
        return quotient

    def _note(self, name: str, value: Tensor, stored: Tensor) -> None:
        """Remember how much a value changes on its way through the file."""
        changed = value != stored
        if bool(changed.any()):
            before, after = value[changed].double(), stored[changed].double()
            largest = float(((after - before) / before).abs().max())
            name = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
            self._changes[name] = max(largest, self._changes.get(name, 0.0))


def _too_fine(what: str, one_for: str) -> QuambaError:
    return QuambaError(
        f"{what} has more scales than the published format, which has one for {one_for}; quantize with a"
        " recipe such as 'zoo-w4a8' or keep this model in our own format."
    )


def _pad_rows(tensor: Tensor, rows: int, value: float) -> Tensor:
    """(n, ...) to (rows, ...), contiguous; the tensor itself if it has them all."""
    padding = tensor.new_full((rows - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, padding]) if len(padding) else tensor.contiguous()


def _spread(scales: list[Tensor], parts: tuple[int, ...]) -> Tensor:
    return torch.cat([scale.expand(size) for scale, size in zip(scales, parts, strict=True)])


def _under(prefix: str, values: Values) -> Values:
    return {prefix + name: value for name, value in values.items()}


def _as_laid_out(values: Values, layout: Layout) -> Values:
    """The values in the order of the file, each as the file has it and in memory of its own."""
    assert values.keys() == layout.keys(), values.keys() ^ layout.keys()
    seen: set[int] = set()
    stored = {name: _own(values[name], layout[name], seen) for name in layout}
    for name, entry in layout.items():
        assert _conforms(stored[name], entry), (name, stored[name], entry)
    return stored


def _own(value: Value, entry: Entry, seen: set[int]) -> Value:
    """A tensor with the strides of the entry that no other shares; a view would be saved with its whole base.

    seen  addresses of the tensors before it
    """
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if value.stride() != _strides(entry) or storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
        rows = value.t() if entry.transposed else value
        rows = rows.new_empty(rows.shape).copy_(rows)
        value = rows.t() if entry.transposed else rows
    seen.add(value.untyped_storage().data_ptr())
    return value


def _strides(entry: Entry) -> tuple[int, ...]:
    if entry.transposed:
        return 1, entry.shape[0]
    return torch.empty(entry.shape, device="meta").stride()


def _conforms(value: Value, entry: Entry) -> bool:
    if isinstance(value, Tensor):
        kind, dtype, shape = "tensor", value.dtype, tuple(value.shape)
        return (kind, dtype, shape, value.stride()) == (entry.kind, entry.dtype, entry.shape, _strides(entry))
    return entry.kind == ("none" if value is None else "float")

"""Read a published checkpoint into the module tree that our own quantizer builds (docs/zoo.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.checkpoints.quantized import StoredModel
from quamba.checkpoints.source import read_json
from quamba.checkpoints.tensors import TensorSource, open_tensors
from quamba.checkpoints.zoo import packing
from quamba.checkpoints.zoo.config import ZooConfig, is_zoo_config, parse_zoo_config
from quamba.checkpoints.zoo.layout import GROUP_SIZE, Entry, Layout, zoo_layout
from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat, round_significant
from quamba.models.config import Mamba2Config, MambaConfig
from quamba.recipes.plan import Plan, output_parts, projections, resolve
from quamba.recipes.recipe import HeadGroups, Override, Precision, Recipe, Solver
from quamba.recipes.skeleton import skeleton

PRECISIONS = {
    "W8A8": Precision(weights="int8", activations="int8", state="int8"),
    "W4A8": Precision(weights="int4", activations="int8", state="int8"),
    "W4A16": Precision(weights="int4", activations="float", state="fp16"),
    "FP16": Precision(),
}
#: Scales that the file holds as quotients are taken apart to this relative error, two float32 roundings.
_QUOTIENT_ERROR = 2.0**-21

Tensors = dict[str, Tensor]


def is_zoo(folder: str | Path) -> bool:
    """Whether the folder's config.json is that of a published checkpoint; no weight file is looked at."""
    path = Path(folder) / "config.json"
    return path.is_file() and is_zoo_config(read_json(path))


def read_zoo_plan(folder: str | Path) -> Plan:
    """What a published checkpoint holds, from its config.json and the names of its tensors."""
    folder = Path(folder)
    config = parse_zoo_config(read_json(folder / "config.json"))
    return resolve(zoo_recipe(config, _is_grouped(config, open_tensors(folder))), config.model)


def read_zoo(folder: str | Path, source: str = "") -> StoredModel:
    """A published checkpoint as a model of ours, on the CPU, its floats in float16 as they are stored.

    source  what the user asked for; the folder if empty
    Raises QuambaError, in one sentence, for a config.json that is not understood, for entries that are
    missing, unknown, misshapen or of another type (each of them named), and for scales that contradict
    each other.
    """
    folder = Path(folder)
    config = parse_zoo_config(read_json(folder / "config.json"))
    file = open_tensors(folder)
    grouped = _is_grouped(config, file)
    _check_entries(file, zoo_layout(config, grouped=grouped), folder)
    plan = resolve(zoo_recipe(config, grouped), config.model)
    network = skeleton(plan).set_compute_dtype(torch.float16)
    tensors = _Reader(config, file, folder).tensors()
    expected = network.named_tensors()
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    for name, like in expected.items():
        assert tensors[name].shape == like.shape, (name, tensors[name].shape, like.shape)
        tensors[name] = tensors[name].to(like.dtype)
    network.load_tensors(tensors)
    return StoredModel(network, plan, source or str(folder), None, {})


def zoo_recipe(config: ZooConfig, grouped: bool) -> Recipe:
    """What the published quantizer does to a model, said in our terms (docs/zoo.md)."""
    most = max(config.layers, key=config.layers.count)
    others = [i for i, label in enumerate(config.layers) if label != most]
    overrides = tuple(Override(blocks=(i,), precision=PRECISIONS[config.layers[i]]) for i in others)
    integers = any(label != "W4A16" for label in config.layers)
    return Recipe(
        name=f"zoo-{'w4ax' if config.hybrid else most.lower()}",
        blocks=PRECISIONS[most],
        overrides=overrides,
        embedding=config.embedding,
        head=Precision(
            weights=PRECISIONS[config.head].weights, activations=PRECISIONS[config.head].activations
        ),
        int4=WeightFormat(4, "two_level", GROUP_SIZE),
        int8=WeightFormat(8, "split"),
        embedding_int4=WeightFormat(4, "channel", scale_bits=16),
        embedding_int8=WeightFormat(8, "channel", scale_bits=16),
        dt_proj="int8" if integers else "float",
        conv_scales="split",
        parameters="int8" if integers else "float16",
        rounding="half_away",
        activation_scales="tensor",
        group_heads=HeadGroups() if grouped else None,
        solver=Solver(kind="unknown"),
    )


def _is_grouped(config: ZooConfig, file: TensorSource) -> bool:
    """Whether any block has ranges of heads and channels; the file alone knows."""
    return any(name.endswith(".x_head_group_range") for name in file)


class _Reader:
    """Takes a checked file apart, block by block, into tensors under our names."""

    def __init__(self, config: ZooConfig, file: TensorSource, folder: Path) -> None:
        self._config, self._model = config, config.model
        self._file, self._folder = file, folder

    def tensors(self) -> Tensors:
        found = self._embedding()
        for i, label in enumerate(self._config.layers):
            norm, mixer = self._config.layer_prefixes(i)
            block = f"backbone.layers.{i}."
            found |= _under(block, self._norm(norm, label != "W4A16"))
            found |= _under(f"{block}mixer.", self._mixer(mixer, norm, label))
        integers = self._config.head in ("W8A8", "W4A8")
        found |= {f"backbone.norm_f.{k[5:]}": v for k, v in self._norm("backbone.norm_f.", integers).items()}
        if integers:
            self._check_input("backbone.norm_f.output_scale", "lm_head.", self._config.head)
        return found | _under("lm_head.", self._linear("lm_head.", self._config.head, self._rows, None))

    @property
    def _rows(self) -> int:
        return self._model.padded_vocab_size

    def _embedding(self) -> Tensors:
        weight = self._file.get("backbone.embedding.weight")
        if self._config.embedding == "float":
            return {"backbone.embedding.weight": weight}
        data = packing.unpack_embedding(weight) if self._config.embedding == "int4" else weight
        scale = self._file.get("backbone.embedding.scales")[:, None]
        return {"backbone.embedding.weight.data": data, "backbone.embedding.weight.scale": scale}

    def _norm(self, prefix: str, quantized: bool) -> Tensors:
        """Its output scale; the weight is in the next projection."""
        if not bool((self._file.get(f"{prefix}weight") == 1).all()):
            raise QuambaError(
                f"'{prefix}weight' in '{self._folder}' is not all ones, expected a norm whose weight was"
                " folded into the next projection."
            )
        return {"norm.out_scale": self._scale(f"{prefix}output_scale")} if quantized else {}

    def _mixer(self, prefix: str, norm: str, label: str) -> Tensors:
        if label == "W4A16":
            return self._float_mixer(prefix)
        self._check_input(f"{prefix}had.x_H_scale", f"{prefix}out_proj.", label)
        if isinstance(self._model, MambaConfig):
            found = self._mamba(prefix, norm, label, self._model)
        else:
            self._check_input(f"{norm}output_scale", f"{prefix}in_proj.", label)
            found = self._mamba2(prefix, label, self._model)
        out_proj = self._linear(f"{prefix}out_proj.", label, self._model.d_model, None)
        return (
            found
            | _under("out_proj.", out_proj)
            | {"rotate.out_scale": self._scale(f"{prefix}had.x_H_scale")}
        )

    def _mamba(self, prefix: str, norm: str, label: str, model: MambaConfig) -> Tensors:
        conv, scan = f"{prefix}conv1d.", f"{prefix}selective_scan."
        xz, x = self._scale(f"{conv}input_scale"), self._scale(f"{conv}output_scale")
        selection, dt = self._scale(f"{scan}B_scale"), self._scale(f"{scan}dt_scale")
        self._agree(f"{scan}z_scale", f"{conv}input_scale", xz)
        self._agree(f"{scan}u_scale", f"{conv}output_scale", x)
        self._agree(f"{scan}C_scale", f"{scan}B_scale", selection)
        self._check_input(f"{norm}output_scale", f"{prefix}in_proj.", label, xz)
        self._check_input(f"{conv}output_scale", f"{prefix}x_proj.", label, selection)
        self._check_input(f"{scan}B_scale", f"{prefix}dt_proj.", "W8A8", dt)
        sizes = {name: size[0] for name, size in projections(model).items()}
        in_proj = self._linear(f"{prefix}in_proj.", label, sizes["in_proj"], xz)
        x_proj = self._linear(f"{prefix}x_proj.", label, sizes["x_proj"], selection)
        dt_proj = self._linear(f"{prefix}dt_proj.", "W8A8", sizes["dt_proj"], dt)
        return {
            **_under("in_proj.", in_proj | {"out_scale": xz.repeat(sizes["in_proj"])}),
            **_under("x_proj.", x_proj | {"out_scale": selection.repeat(sizes["x_proj"])}),
            **_under("dt_proj.", dt_proj | {"out_scale": dt.repeat(sizes["dt_proj"])}),
            "conv1d.weight.data": self._file.get(f"{conv}weight"),
            "conv1d.weight.scale": self._scale(f"{conv}weight_scale").view(1, 1),
            "conv1d.bias.data": self._file.get(f"{conv}bias"),
            "conv1d.bias.scale": self._scale(f"{conv}bias_scale"),
            "conv1d.out_scale": x.repeat(model.d_inner),
            **self._int8_parameter("ssm.A_log", f"{scan}A_log", f"{scan}A_scale"),
            **self._int8_parameter("ssm.D", f"{scan}D", f"{scan}D_scale"),
            **self._int8_parameter("ssm.dt_bias", f"{scan}dt_bias", f"{scan}dt_bias_scale"),
            "ssm.state_scale": self._scale(f"{scan}ssm_state_scale").view(1, 1),
        }

    def _mamba2(self, prefix: str, label: str, model: Mamba2Config) -> Tensors:
        conv, scan = f"{prefix}conv1d.", f"{prefix}qchunk_scan."
        for one, other in (
            ("x_out_scales", "x_scales"),
            ("B_out_scales", "B_scale"),
            ("C_out_scales", "C_scale"),
        ):
            self._agree(conv + one, scan + other, self._scale(scan + other))
        parts = output_parts(model, "in_proj")
        conv_parts = output_parts(model, "conv1d")
        assert parts is not None and conv_parts is not None
        names = (f"{prefix}norm.z_scale", *(f"{conv}{part}_scale" for part in "xBC"), f"{scan}dt_scale")
        outputs = _spread([self._scale(name) for name in names], parts)
        in_proj = self._linear(f"{prefix}in_proj.", label, sum(parts), outputs)
        groups = self._channel_groups(prefix, model)
        bc = [self._scale(f"{conv}{part}_out_scales").expand(model.ngroups) for part in "BC"]
        x_out = self._scale(f"{conv}x_out_scales").reshape(-1)[groups.long()]
        state = self._scale(f"{scan}ssm_state_scale")
        grouped = state.ndim > 0
        return {
            **_under("in_proj.", in_proj | {"out_scale": outputs}),
            "conv1d.weight.data": self._file.get(f"{conv}weight"),
            "conv1d.weight.scale": _spread([self._scale(f"{conv}w{p}_scale") for p in "xBC"], conv_parts)[
                :, None
            ],
            "conv1d.bias.data": self._file.get(f"{conv}bias"),
            "conv1d.bias.scale": _spread([self._scale(f"{conv}b{p}_scale") for p in "xBC"], conv_parts),
            "conv1d.out_scale": torch.cat([x_out, *(s.repeat_interleave(model.d_state) for s in bc)]),
            **self._int8_parameter("ssm.A_log", f"{scan}A_log", f"{scan}A_log_scale"),
            **self._int8_parameter("ssm.D", f"{scan}D", f"{scan}D_scale"),
            "ssm.dt_bias": self._file.get(f"{scan}dt_bias"),
            "ssm.state_scale": state.reshape(-1, model.d_state if grouped else 1),
            **({"ssm.state_group": groups} if grouped else {}),
            "norm.weight": self._file.get(f"{prefix}norm.weight"),
        }

    def _float_mixer(self, prefix: str) -> Tensors:
        """A block with float activations: only its projections are integers."""
        found: Tensors = {}
        for name, (rows, _) in projections(self._model).items():
            label = "FP16" if name == "dt_proj" else "W4A16"
            found |= _under(f"{name}.", self._linear(f"{prefix}{name}.", label, rows, None))
        dt_bias = "dt_proj_bias" if isinstance(self._model, MambaConfig) else "dt_bias"
        found |= {
            "conv1d.weight": self._file.get(f"{prefix}conv1d.weight")[:, 0],
            "conv1d.bias": self._file.get(f"{prefix}conv1d.bias"),
            "ssm.A_log": self._file.get(f"{prefix}A_log"),
            "ssm.D": self._file.get(f"{prefix}D"),
            "ssm.dt_bias": self._file.get(f"{prefix}{dt_bias}"),
        }
        if isinstance(self._model, Mamba2Config):
            found["norm.weight"] = self._file.get(f"{prefix}norm.weight")
        return found

    def _linear(self, prefix: str, label: str, rows: int, out_scale: Tensor | None) -> Tensors:
        """Codes and scales of a projection; padding columns are dropped.

        out_scale  float32 () or (rows,), what the stored scales of 4-bit and parallel int8 weights are
                   divided by; None where the output is float
        """
        weight = self._file.get(f"{prefix}weight")
        if label == "FP16":
            return {"weight": weight}
        if label == "W8A8":
            scale = self._file.get(f"{prefix}b")
            if scale.shape[1] > 1:
                assert out_scale is not None
                scale = undivided(scale[0, :rows], out_scale)[:, None]
            return {"weight.data": weight.t()[:rows].contiguous(), "weight.scale": scale}
        stored = self._file.get(f"{prefix}scale" if label == "W4A16" else f"{prefix}s_group")
        groups = packing.unpermute_group_scale(stored)[:, :rows].t().contiguous()
        found = {
            "weight.data": packing.unpack_tiles(weight, "w4a16" if label == "W4A16" else "w4a8_group")[:rows],
            # A row of zeros has scale 0 / 0 where weights were rounded to nearest.
            "weight.scale": groups.nan_to_num(0.0),
        }
        if label == "W4A8":
            channel = packing.unpermute_channel_scale(self._file.get(f"{prefix}s_channel"))[0, :rows]
            found["weight.channel_scale"] = (channel if out_scale is None else undivided(channel, out_scale))[
                :, None
            ]
        return found

    def _int8_parameter(self, name: str, data: str, scale: str) -> Tensors:
        return {f"{name}.data": self._file.get(data), f"{name}.scale": self._scale(scale)}

    def _channel_groups(self, prefix: str, model: Mamba2Config) -> Tensor:
        """(d_inner,) int32: the group of each channel of x; zeros where there are no groups."""
        name = f"{prefix}conv1d.x_head_group_range"
        if name not in self._file:
            return torch.zeros(model.d_inner, dtype=torch.int32)
        heads, channels = (self._file.get(f"{prefix}conv1d.x_{kind}_group_range") for kind in ("head", "dim"))
        for kind, ends, last in (
            ("head", heads, model.nheads // model.ngroups),
            ("dim", channels, model.headdim),
        ):
            name = f"{prefix}conv1d.x_{kind}_group_range"
            if not torch.equal(ends, self._file.get(f"{prefix}qchunk_scan.x_{kind}_group_range")):
                raise QuambaError(f"'{name}' in '{self._folder}' differs between conv1d and qchunk_scan.")
            sizes = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1]))
            if bool((sizes < 0).any()) or bool((ends[..., -1] != last).any()):
                raise QuambaError(
                    f"'{name}' in '{self._folder}' is {ends.tolist()}, expected ends of groups that rise to"
                    f" {last}."
                )
        return channel_groups(heads, channels, model.nheads // model.ngroups, model.headdim)

    def _scale(self, name: str) -> Tensor:
        """A scale as float32, a number of the file as a scalar; positive and finite."""
        value = self._file.values[name] if name in self._file.values else self._file.get(name)
        scale = torch.as_tensor(value, dtype=torch.float32)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise QuambaError(
                f"'{name}' in '{self._folder}' holds {_first_bad(scale)!r}, expected positive scales."
            )
        return scale

    def _check_input(self, name: str, prefix: str, label: str, out_scale: Tensor | None = None) -> None:
        """The scale ``name`` and the one that the projection behind it has stored for its input.

        Int8 projections store s_in / s_out where their output is int8 (``out_scale`` is s_out), and a second
        time multiplied with the scale of their weight.
        """
        wanted, stored = self._scale(name), f"{prefix}input_scale"
        if label == "W8A8":
            stored = f"{prefix}a"
            wanted = wanted if out_scale is None else wanted / out_scale
            if f"{prefix}alpha" in self._file.values:
                self._agree(
                    f"{prefix}alpha", f"{name} and {prefix}b", wanted * self._scale(f"{prefix}b").view(())
                )
        self._agree(stored, name, wanted)

    def _agree(self, name: str, other: str, wanted: Tensor) -> None:
        """Two places of the file that must say the same, up to the rounding of quotients."""
        mine = self._scale(name)
        mine = mine.view(()) if wanted.ndim == 0 and mine.numel() == 1 else mine
        if mine.shape != wanted.shape or bool(((mine - wanted).abs() > _QUOTIENT_ERROR * wanted).any()):
            raise QuambaError(
                f"'{name}' in '{self._folder}' is {_shown(mine)}, expected {_shown(wanted)} as {other} says."
            )


def channel_groups(heads: Tensor, channels: Tensor, n_heads: int, headdim: int) -> Tensor:
    """The group of each channel of x from the ends of head groups and of their channel groups.

    heads     (G, A) int32, cumulative ends in heads of the SSD group
    channels  (G, A, B) int32, cumulative ends in channels of a head
    returns   (G * n_heads * headdim,) int32: (g * A + head group) * B + channel group
    """
    groups, head_groups = heads.shape
    dim_groups = channels.shape[2]
    head, position = torch.arange(n_heads), torch.arange(headdim)
    found = []
    for g in range(groups):
        of_head = (head[:, None] >= heads[g]).sum(1)
        of_channel = (position[:, None] >= channels[g, of_head][:, None]).sum(-1)
        found.append((g * head_groups + of_head[:, None]) * dim_groups + of_channel)
    return torch.stack(found).flatten().to(torch.int32)


def undivided(quotient: Tensor, divisor: Tensor) -> Tensor:
    """c from float32(c / s) and s: a c of 11 significant bits if one divides to it, else their product."""
    product = quotient * divisor
    short = round_significant(product)
    return torch.where((short - product).abs() <= _QUOTIENT_ERROR * product, short, product)


def _spread(scales: list[Tensor], parts: tuple[int, ...]) -> Tensor:
    return torch.cat([scale.expand(size) for scale, size in zip(scales, parts, strict=True)])


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _first_bad(scale: Tensor) -> float:
    return float(scale[~(torch.isfinite(scale) & (scale > 0))].flatten()[0])


def _shown(scale: Tensor) -> str:
    return f"{float(scale):.9g}" if scale.ndim == 0 else f"shape {list(scale.shape)}"


def _check_entries(file: TensorSource, layout: Layout, folder: Path) -> None:
    """Refuse a file that does not hold exactly these entries, naming all that are wrong."""
    found = {name: Entry(dtype=file.dtype(name), shape=file.shape(name)) for name in file}
    found |= {name: _entry_of(value) for name, value in file.values.items()}
    _refuse_float_model(found, layout, folder)
    wrong = [
        f"{name} is {found[name]} instead of {entry}"
        for name, entry in layout.items()
        if name in found and str(found[name]) != str(entry)
    ]
    kinds = {
        "missing": _by_layer(name for name in layout if name not in found),
        "unknown": _by_layer(name for name in found if name not in layout),
        "wrong": wrong,
    }
    faults = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise QuambaError(f"The entries of '{file.files[0]}' do not fit config.json; {'; '.join(faults)}.")


def _refuse_float_model(found: Layout, layout: Layout, folder: Path) -> None:
    name = next(name for name in layout if name.endswith(".in_proj.weight"))
    entry = found.get(name) or found.get(re.sub(r"\.mixers\.\w+\.", ".mixer.", name))
    if entry is not None and entry.dtype is not None and entry.dtype.is_floating_point:
        raise QuambaError(
            f"The weights in '{folder}' are those of a float model ('{name}' is {entry}), expected the"
            " integers that its config.json promises."
        )


def _entry_of(value: Any) -> Entry:
    if value is None:
        return Entry("none")
    if isinstance(value, float) and math.isfinite(value):
        return Entry("float")
    return Entry(f"the {type(value).__name__} {value!r}"[:60])


def _by_layer(names: Iterable[str]) -> list[str]:
    """Names, with those that differ in the layer alone as one: ``layers.{0,1,5}.norm.weight``."""
    grouped: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.layers\.(\d+)\.", name)
        key = name if match is None else name.replace(match[0], ".layers.{}.", 1)
        grouped.setdefault(key, []).extend([] if match is None else [int(match[1])])
    return [key.replace("{}", _numbers(layers)) if layers else key for key, layers in grouped.items()]


def _numbers(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    listed = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return listed[0] if len(listed) == 1 and "-" not in listed[0] else "{" + ",".join(listed) + "}"

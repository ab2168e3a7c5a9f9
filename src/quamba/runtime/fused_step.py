"""The step of one token as few launches on a GPU: ``kernels/triton/decode`` put together for one model.

``fused_step`` looks once at every leaf of a model and binds what the kernels need; running it then asks
nothing more. The result is that of ``MambaLM.forward`` on one token, up to roundings of floats in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, split
from quamba.formats.parameter import as_tensor
from quamba.formats.weight import QuantizedWeight
from quamba.models.cache import LayerCache, MambaCache
from quamba.models.lm import Block, MambaLM, on_device
from quamba.models.mamba1 import MambaMixer
from quamba.models.mamba2 import Mamba2Mixer
from quamba.modules.conv import CausalConv1d
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm
from quamba.modules.rotate import Rotate

if TYPE_CHECKING:
    from quamba.kernels.triton.decode.project import ConvStep
    from quamba.kernels.triton.decode.ssd import Part
    from quamba.kernels.triton.decode.vectors import Normed, Vector

#: Sequences that are decoded this way: each costs all products of words again, and batches have tensor cores.
#: Where the one becomes faster than the other was measured at 4 and 16 only.
MOST_SEQUENCES = 4
#: Channels of the residual stream and features of a projection up to which every program of the projection
#: norms the residual again: a launch of its own takes longer.
MOST_NORMED_CHANNELS, MOST_NORMED_FEATURES = 1024, 8192

Launch = Callable[[], None]
#: What a projection reads, and its scale if that is codes.
_Input: TypeAlias = "tuple[Vector | Normed, Tensor | None]"


class _UnfusedError(Exception):
    """Why a model cannot be run this way."""


@dataclass(frozen=True)
class FusedStep:
    """The launches of a step, on fixed buffers.

    logits     (B, padded_vocab), overwritten by every step
    per_block  launches of a block; a step has the lookup, the last norm and the head besides
    """

    logits: Tensor
    per_block: int
    embed: Callable[[Tensor], None]
    launches: tuple[Launch, ...]

    @property
    def description(self) -> str:
        return f"fused, {self.per_block} launches a block, for up to {MOST_SEQUENCES} sequences"

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (B,) int64 -> logits; the cache it was made for is advanced."""
        with on_device(self.logits.device):
            self.embed(ids)
            for launch in self.launches:
                launch()
        return self.logits


def fused_step(network: MambaLM, cache: MambaCache) -> FusedStep | str:
    """The step of a model that advances ``cache``, or one sentence that says why there is none."""
    try:
        return _Builder(network, cache).build()
    except _UnfusedError as reason:
        return str(reason)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _UnfusedError(f"no fused step: {reason}.")


class _Builder:
    """Walks through the leaves in the order of a forward pass and collects launches."""

    def __init__(self, network: MambaLM, cache: MambaCache) -> None:
        self.network, self.cache, self.batch = network, cache, cache.batch_size
        self.floats = network.lm_head.compute_dtype
        self.launches: list[Launch] = []

    def build(self) -> FusedStep:
        network = self.network
        _require(self.batch <= MOST_SEQUENCES, f"it is for at most {MOST_SEQUENCES} sequences")
        _require(self.floats != torch.float64, "it computes in float32 at most")
        norm = network.backbone.norm_f
        residual_dtype = torch.float32 if norm.residual_in_fp32 else self.floats
        self.residual = self._new(network.config.d_model, residual_dtype)
        self.rounds_to = self._new(1, self.floats)
        before = per_block = 0
        for block, states in zip(network.blocks, self.cache.layers, strict=True):
            before = len(self.launches)
            self._block(block, states)
            per_block = len(self.launches) - before
        logits = self._linear(self._norm(norm, network.lm_head), network.lm_head)
        return FusedStep(_values(logits), per_block, self._embed, tuple(self.launches))

    def _embed(self, ids: Tensor) -> None:
        from quamba.kernels.triton.embedding import embed

        embed(ids, self.network.backbone.embedding.weight, self.residual, self.floats)

    def _block(self, block: Block, states: LayerCache) -> None:
        mixer = block.mixer
        x = self._norm(block.norm, mixer.in_proj)
        mix = self._mamba2 if isinstance(mixer, Mamba2Mixer) else self._mamba
        self._linear(mix(x, mixer, states), mixer.out_proj, residual=self.residual)

    def _norm(self, leaf: AddNorm, reader: Linear) -> _Input:
        from quamba.kernels.triton.decode.norm import norm
        from quamba.kernels.triton.decode.vectors import Normed

        _require(not leaf.layer_norm, "LayerNorm has no kernel in it")
        scale = leaf.out_scale
        _require(scale is None or scale.numel() == 1, "norms give codes of one scale in it")
        channels = self.residual.shape[1]
        short = channels <= MOST_NORMED_CHANNELS and reader.out_features <= MOST_NORMED_FEATURES
        if short and channels % 32 == 0 and isinstance(reader.weight, QuantizedWeight):
            return Normed(self.residual, leaf.weight, scale, leaf.eps), scale
        out = self._new_input(reader, channels, scale)
        self._launch(norm, self.residual, leaf.weight, scale, out, leaf.eps)
        return out, scale

    def _linear(
        self, x: _Input, leaf: Linear, *, conv: ConvStep | None = None, residual: Tensor | None = None
    ) -> Activation:
        from quamba.kernels.triton.decode.project import Matrix, project

        vector, scale = x
        matrix = Matrix.of(leaf.weight, vector)
        _require(matrix is not None, f"its kernels do not multiply {_described(leaf.weight)}")
        if scale is not None:  # one for all channels, or the weight would have them
            scale = None if leaf.input_scale_folded else scale[0] if scale.ndim else scale
        out = self.rounds_to
        if residual is None:
            out = self._new(leaf.out_features, self.floats if leaf.out_scale is None else torch.int8)
        options: dict[str, Any] = {"out_scale": leaf.out_scale, "conv": conv, "residual": residual}
        self._launch(project, vector, matrix, out, x_scale=scale, bias=leaf.bias, **options)
        return _activation(out, leaf.out_scale)

    def _conv(self, leaf: CausalConv1d, first: int, states: LayerCache, before: Linear) -> ConvStep:
        """The convolution as the end of the projection ``before`` it."""
        from quamba.kernels.triton.decode.project import ConvStep

        codes = before.out_scale is not None
        _require(
            codes == (leaf.out_scale is not None), "projection and convolution give the same format in it"
        )
        weight = leaf.weight
        scale: Tensor | None = None
        if isinstance(weight, QuantizedWeight):
            whole = codes and weight.format.bits == 8 and weight.scale.shape[1] == 1
            _require(whole, "int8 taps have int8 inputs in it")
            taps, scale = weight.codes(), weight.scale
        else:
            taps = weight
        _require(taps.is_contiguous() and states.conv_state[0].is_contiguous(), "taps are contiguous in it")
        bias = None if leaf.bias is None else as_tensor(leaf.bias)
        away = leaf.rounding == "half_away"
        return ConvStep(first, states.conv_state, taps, scale, bias, leaf.out_scale, away)

    def _mamba2(self, x: _Input, mixer: Any, states: LayerCache) -> _Input:
        from quamba.kernels.triton.decode.ssd import square_parts, ssd_gate

        assert isinstance(mixer, Mamba2Mixer)
        ssm, norm = mixer.ssm, mixer.norm
        d_inner, conv_dim, nheads = mixer.in_proj_sizes
        headdim = d_inner // nheads
        projected = self._linear(
            x, mixer.in_proj, conv=self._conv(mixer.conv1d, d_inner, states, mixer.in_proj)
        )
        values = _values(projected)
        z, _, dt = _parts(projected, 0, mixer.in_proj_sizes)
        xBC = _activation(values[:, d_inner : d_inner + conv_dim], mixer.conv1d.out_scale)
        x_part, B, C = _parts(xBC, d_inner, mixer.conv_sizes)
        A, D, dt_bias = (t.contiguous() for t in ssm.real_parameters())
        sums = square_parts(self.batch, nheads, headdim, ssm.state_shape[-1])
        mixed, squares = self._new(d_inner, torch.float32), self._new(sums, torch.float32)
        options: dict[str, Any] = {
            **ssm.sizes,
            "state_scale": ssm.state_scale,
            "state_group": ssm.state_group,
            "norm_before_gate": norm.norm_before_gate,
        }
        parts = {"x": x_part, "B": B, "C": C, "z": z, "dt": dt}
        state, weight = states.ssm_state, norm.weight
        self._launch(ssd_gate, values, parts, A, D, dt_bias, weight, state, mixed, squares, **options)
        ngroups = d_inner // norm.group_size
        factors: dict[str, Any] = {"squares": squares, "eps": norm.eps, "ngroups": ngroups}
        return self._mix(mixed, mixer.rotate, mixer.out_proj, **factors)

    def _mamba(self, x: _Input, mixer: Any, states: LayerCache) -> _Input:
        from quamba.kernels.triton.decode.scan import TimeSteps, scan_gate
        from quamba.kernels.triton.decode.vectors import Vector

        assert isinstance(mixer, MambaMixer)
        _require(not mixer.normalises_selection, "norms of B, C and dt have no kernel in it")
        ssm, d_inner = mixer.ssm, mixer.in_proj_sizes[0]
        projected = self._linear(x, mixer.in_proj, conv=self._conv(mixer.conv1d, 0, states, mixer.in_proj))
        values = _values(projected)
        u = _activation(values[:, :d_inner], mixer.conv1d.out_scale)
        selected = self._linear((Vector(values[:, :d_inner]), mixer.conv1d.out_scale), mixer.x_proj)
        rank, B, C = _parts(selected, 0, mixer.x_proj_sizes)
        parts = {
            "u": _parts(u, 0, [d_inner])[0],
            "z": _parts(projected, 0, mixer.in_proj_sizes)[1],
            "rank": rank.with_one_scale(),
            "B": B,
            "C": C,
        }
        dt = mixer.dt_proj
        steps = TimeSteps.of(dt.weight, dt.out_scale, self.floats == torch.float16)
        _require(steps is not None and dt.bias is None, "its kernels do not project these time steps")
        assert steps is not None
        A, D, dt_bias = (t.contiguous() for t in ssm.real_parameters())
        mixed, selection, state = self._new(d_inner, torch.float32), _values(selected), states.ssm_state
        options: dict[str, Any] = {"state_scale": ssm.state_scale, "state_group": ssm.state_group}
        self._launch(scan_gate, values, selection, parts, steps, A, D, dt_bias, state, mixed, **options)
        return self._mix(mixed, mixer.rotate, mixer.out_proj)

    def _mix(self, mixed: Tensor, rotate: Rotate, reader: Linear, **options: Any) -> _Input:
        from quamba.kernels.triton.decode.mix import block_size, mix

        channels, scale = mixed.shape[1], rotate.out_scale
        ngroups = options.get("ngroups", 1)
        if rotate.enabled:
            size = block_size(channels, ngroups)
        else:
            size = next((s for s in (64, 32) if channels // ngroups % s == 0), None)
        _require(size is not None, f"no kernel of it takes {channels} channels in {ngroups} groups")
        _require(scale is None or scale.numel() == 1, "rotations give codes of one scale in it")
        out = self._new_input(reader, channels, scale)
        options |= {"size": size, "rotate": rotate.enabled, "out_scale": scale}
        options |= {"half_away": rotate.rounding == "half_away", "wrap": rotate.overflow == "wrap"}
        self._launch(mix, mixed, out, **options)
        return out, scale

    def _new_input(self, reader: Linear, channels: int, scale: Tensor | None) -> Vector:
        """For what a projection will read: codes of a scale, or wide codes for integer weights, or floats."""
        from quamba.kernels.triton.decode.vectors import Vector

        at = (self.batch, channels, self.network.device)
        weight = reader.weight if isinstance(reader.weight, QuantizedWeight) else None
        split = weight is not None and weight.format.bits == 4 and weight.channel_scale is None
        if scale is not None:
            return Vector.codes(*at, split)
        return Vector.floats(*at, self.floats) if weight is None else Vector.wide(*at, split)

    def _launch(self, kernel: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.launches.append(functools.partial(kernel, *args, **kwargs))

    def _new(self, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.batch, columns, dtype=dtype, device=self.network.device)


def _activation(values: Tensor, scale: Tensor | None) -> Activation:
    return values if scale is None else Quantized(values, scale)


def _values(x: Activation) -> Tensor:
    return x.codes if isinstance(x, Quantized) else x


def _parts(x: Activation, first: int, sizes: Sequence[int]) -> list[Part]:
    """Where the parts of x begin in its buffer, x itself beginning at ``first``, and their scales."""
    from quamba.kernels.triton.decode.ssd import Part

    parts = []
    for part, size in zip(split(x, sizes), sizes, strict=True):
        parts.append(Part(first, part.scale if isinstance(part, Quantized) else None))
        first += size
    return parts


def _described(weight: Tensor | QuantizedWeight) -> str:
    return weight.extra_repr() if isinstance(weight, QuantizedWeight) else f"{weight.dtype} weights"

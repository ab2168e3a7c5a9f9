"""Small inputs for every op: decoding and prompts, every format, and where GPU kernels went wrong before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.formats.packing import pack_int4
from quamba.formats.weight import QuantizedWeight, WeightFormat

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Largest errors as a share of an output's root mean square, four times and more what the reference has.
_FLOAT32 = 1e-5
_SCAN = 5e-5
#: Prompts of Mamba2 multiply on units of 16 bits (``kernels/triton/ssd_chunks.py``): in two parts of 8 bits,
#: or with a result in float16 once, which errs by 2e-4 on average and ten times that in a hundred thousand.
_SSD_SCAN = 1e-3
_SSD_SCAN_HALF = 4e-3
#: Weights times float16: each product is rounded to float16.
_HALF = 4e-3
#: Numbers inside an op are float16: their errors add up like those of any sum.
_HALF_INSIDE = 1e-3
_SPLIT = 2e-4  # inputs of 15 bits (kernels/cpu/linear.py)
_EXACT = 0.0

_WEIGHTS = {
    "int8 channel": WeightFormat(8, "channel"),
    "int8 tensor": WeightFormat(8, "tensor"),
    "int4 group": WeightFormat(4, "group", 128),
    "int4 multiples": WeightFormat(4, "group", 128, multiples=16),
    "int4 group of 64": WeightFormat(4, "group", 64),
    "int4 channel": WeightFormat(4, "channel"),
    "int4 two-level": WeightFormat(4, "two_level", 128),
}
_USUAL = ("int8 channel", "int4 group", "int4 two-level")
_TABLES = {
    "int8": WeightFormat(8, "channel"),
    "int8 tensor": WeightFormat(8, "tensor"),
    "int4": WeightFormat(4, "channel"),
    "int4 group": WeightFormat(4, "group", 16),
}


class Draw:
    """Random arguments on the CPU, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> Tensor:
        """Normal, float32."""
        return torch.randn(*shape, generator=self._generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, both ends included."""
        return torch.randint(low, high + 1, shape, generator=self._generator)

    def powers(self, low: int, high: int, *shape: int) -> Tensor:
        """Scales that multiply without rounding: float32 powers of two."""
        return torch.exp2(self.integers(low, high, *shape).float())

    def codes(self, *shape: int) -> Tensor:
        return self.integers(-128, 127, *shape).to(torch.int8)

    def quantized(self, *shape: int, per_channel: bool = False) -> Quantized:
        channels = shape[-1:] if per_channel else ()
        return Quantized(self.codes(*shape), self.uniform(0.01, 0.03, *channels))

    def weight(self, rows: int, columns: int, format: WeightFormat, exact: bool = False) -> QuantizedWeight:
        """Scales are powers of two if ``exact``; with two levels or multiples only those of rows are."""
        codes = self.integers(format.qmin, format.qmax, rows, columns).to(torch.int8)
        data = pack_int4(codes) if format.bits == 4 else codes
        shape = format.scale_shape((rows, columns))
        if format.granularity == "two_level":
            group = self.uniform(1.0, 15.0, *shape).to(format.scale_dtype)
            return QuantizedWeight(data, group, format, self.powers(-9, -6, rows, 1))
        if format.multiples is not None:
            multiples = self.integers(1, format.multiples, *shape)
            scale = self.powers(-12, -10, rows, 1) * multiples
            return QuantizedWeight(data, scale.to(format.scale_dtype), format)
        step = 0.02 if format.bits == 8 else 0.3
        scale = self.powers(-8, -6, *shape) if exact else self.uniform(step / 10, step, *shape)
        return QuantizedWeight(data, scale.to(format.scale_dtype), format)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    make       its positional and named arguments, on the CPU; a ``state`` among them is an output, too
    tolerance  as a share of the root mean square of an output; 0: every bit is known
    device     the only kind of device where it is worth its time; None: all
    """

    op: str
    name: str
    make: Callable[[Draw], Arguments]
    tolerance: float
    device: str | None = None


def all_cases(device_type: str) -> list[Case]:
    """For "cuda" or "cpu", the ops in the order of a model's pass."""
    tables = (_quantize, _embedding, _linear, _norms, _conv, _selective_scan, _ssd, _hadamard)
    return [case for cases in tables for case in cases() if case.device in (None, device_type)]


def _quantize() -> Iterator[Case]:
    def ties(rounding: str, overflow: str, d: Draw) -> Arguments:
        x = d.integers(-700, 700, 17, 150).float() / 8
        return (x, torch.tensor(0.25)), {"rounding": rounding, "overflow": overflow}

    def plain(shape: tuple[int, ...], dtype: torch.dtype, scales: tuple[int, ...], d: Draw) -> Arguments:
        return (d.floats(*shape).to(dtype), d.uniform(0.01, 0.04, *scales)), {}

    for rounding in ("half_even", "half_away"):
        for overflow in ("saturate", "wrap"):
            name = f"ties, {rounding}, {overflow}"
            yield Case("quantize", name, partial(ties, rounding, overflow), _EXACT)
    yield Case("quantize", "one row", partial(plain, (1, 2560), torch.float32, ()), _FLOAT32)
    yield Case("quantize", "17 rows, scale a channel", partial(plain, (17, 150), torch.float32, (150,)), 1e-6)
    yield Case("quantize", "float16", partial(plain, (2, 3, 768), torch.float16, ()), 1e-6)


def _embedding() -> Iterator[Case]:
    def lookup(format: WeightFormat | None, dtype: torch.dtype, d: Draw) -> Arguments:
        table = d.floats(37, 208) if format is None else d.weight(37, 208, format)
        return (d.integers(0, 36, 2, 5), table), {"out_dtype": dtype}

    yield Case("embedding", "float", partial(lookup, None, torch.float32), _EXACT)
    for name, format in _TABLES.items():
        yield Case("embedding", name, partial(lookup, format, torch.float32), _EXACT)
        yield Case("embedding", f"{name} to float16", partial(lookup, format, torch.float16), 1e-6)


def _linear() -> Iterator[Case]:
    def integers(sizes: tuple[int, int, int], format: WeightFormat, to_codes: bool, d: Draw) -> Arguments:
        rows, features, inputs = sizes
        x = Quantized(d.codes(rows, inputs), torch.tensor(2.0**-5))
        weight = d.weight(features, inputs, format, exact=True)
        if not to_codes:
            return (x, weight), {}
        bias = d.integers(-2000, 2000, features).float() / 1024
        return (x, weight, bias), {"out_scale": d.powers(-3, 1, features)}

    def scales(rows: int, format: WeightFormat, d: Draw) -> Arguments:
        x = Quantized(d.codes(rows, 384), torch.tensor(0.013))
        return (x, d.weight(37, 384, format), d.floats(37)), {"out_scale": torch.tensor(0.7)}

    def folded(d: Draw) -> Arguments:
        weight = d.weight(12, 128, _WEIGHTS["int8 channel"], exact=True)
        return (d.quantized(5, 128, per_channel=True), weight), {"input_scale_folded": True}

    def halves(rows: int, format: WeightFormat, dtype: torch.dtype, d: Draw) -> Arguments:
        weight = d.weight(37, 384, format)
        return (d.floats(rows, 384).to(dtype), weight, d.floats(37)), {"out_dtype": dtype}

    def floats(d: Draw) -> Arguments:
        return (d.floats(5, 96), d.floats(40, 96), d.floats(40)), {}

    for name, format in _WEIGHTS.items():
        for rows in (1, 4, 5, 17) if name in _USUAL else (1, 17):
            make = partial(integers, (rows, 40, 256), format, False)
            yield Case("linear", f"int8 x {name}, {rows} rows", make, _EXACT)
        make = partial(integers, (4, 33, 256), format, True)
        yield Case("linear", f"int8 x {name}, 4 rows to codes", make, _EXACT)
        yield Case("linear", f"int8 x {name}, any scales", partial(scales, 5, format), _FLOAT32)
    for name in ("int8 channel", "int4 group", "int4 multiples"):
        format = _WEIGHTS[name]
        # The last has tiles enough for the kernels of prompts.
        for sizes in ((1, 3, 1280), (70, 130, 384), (17, 7, 128), (130, 140, 256), (257, 2850, 256)):
            make = partial(integers, sizes, format, False)
            yield Case("linear", f"int8 x {name}, {'x'.join(map(str, sizes))}", make, _EXACT)
    yield Case("linear", "int8 x int8 channel, folded scale", folded, _EXACT)
    for name in ("int8 channel", "int4 group", "int4 channel", "int4 two-level"):
        for rows in (1, 4, 5, 17):
            make = partial(halves, rows, _WEIGHTS[name], torch.float16)
            yield Case("linear", f"float16 x {name}, {rows} rows", make, _HALF)
    make = partial(halves, 3, _WEIGHTS["int4 group"], torch.float32)
    yield Case("linear", "float32 x int4 group, 3 rows", make, _FLOAT32, "cuda")
    yield Case("linear", "float32 x int4 group, 3 rows", make, _SPLIT, "cpu")
    yield Case("linear", "float32 x float32", floats, _FLOAT32)


def _norms() -> Iterator[Case]:
    def add(shape: tuple[int, ...], center: bool, to_codes: bool, d: Draw) -> Arguments:
        weight, bias = d.floats(shape[-1]), (d.floats(shape[-1]) if center else None)
        named = {"out_scale": torch.tensor(0.03) if to_codes else None, "center": center, "eps": 1e-5}
        return (d.floats(*shape), d.floats(*shape), weight, bias), named

    def first(d: Draw) -> Arguments:
        return (d.floats(2, 3, 768).half(), None, None), {"eps": 1e-5, "residual_dtype": torch.float32}

    def bare(per_channel: bool, d: Draw) -> Arguments:
        return (d.quantized(5, 272, per_channel=per_channel),), {"eps": 1e-6}

    def gated(rows: int, groups: int, before: bool, codes: bool, d: Draw) -> Arguments:
        width = 192 * groups
        z: Activation = d.quantized(rows, width) if codes else d.floats(rows, width)
        named = {"eps": 1e-5, "group_size": 192, "norm_before_gate": before}
        return (d.floats(rows, width), z, d.floats(width)), named

    for shape in ((1, 1, 2560), (2, 17, 150)):
        for center in (False, True):
            kind = f"{'LayerNorm' if center else 'RMSNorm'} of {'x'.join(map(str, shape))}"
            yield Case("add_norm", kind, partial(add, shape, center, False), _FLOAT32)
            yield Case("add_norm", f"{kind} to codes", partial(add, shape, center, True), _FLOAT32)
    yield Case("add_norm", "float16, no residual", first, _FLOAT32)
    yield Case("rms_norm", "int8", partial(bare, False), _FLOAT32)
    yield Case("rms_norm", "int8, scale a channel", partial(bare, True), _FLOAT32)
    for rows, groups, before, codes in ((1, 1, False, True), (17, 2, False, False), (4, 8, True, True)):
        name = f"{rows} rows, {groups} groups, norm {'first' if before else 'last'}"
        yield Case("gated_rms_norm", name, partial(gated, rows, groups, before, codes), _FLOAT32)


def _conv() -> Iterator[Case]:
    def args(length: int, codes: bool, kept: str, to_codes: bool, d: Draw) -> Arguments:
        x: Activation = d.floats(2, length, 150)
        weight: Tensor | QuantizedWeight = d.floats(150, 4)
        if codes:
            x = d.quantized(2, length, 150, per_channel=True)
            weight = d.weight(150, 4, WeightFormat(8, "channel"))
        named: dict[str, Any] = {}
        if kept == "state":
            named["state"] = d.codes(2, 3, 150) if codes else d.floats(2, 3, 150)
        if kept == "padding":
            named["mask"] = torch.ones(2, length, dtype=torch.bool)
            named["mask"][1, : length // 2] = False
        if to_codes:
            named["out_scale"] = d.uniform(0.01, 0.05, 150)
        return (x, weight, d.floats(150)), named

    for codes in (True, False):
        for length, kept in ((1, "state"), (2, "state"), (70, "state"), (70, "padding"), (3, "nothing")):
            for to_codes in (True, False):
                ends = f"{'int8' if codes else 'float'} to {'int8' if to_codes else 'float'}"
                name = f"{ends}, {length} tokens with {kept}"
                make = partial(args, length, codes, kept, to_codes)
                yield Case("causal_conv1d", name, make, _FLOAT32)


def _states(d: Draw, kind: str, batch: int, channels: tuple[int, ...], d_state: int) -> dict[str, Any]:
    """``state`` and what goes with it: none, float32, float16, int8 of one scale a channel, or of groups."""
    shape = (batch, *channels, d_state)
    if kind == "none":
        return {}
    if not kind.startswith("int8"):
        return {"state": d.floats(*shape).to(torch.float16 if kind == "float16" else torch.float32)}
    if kind == "int8":
        return {"state": d.codes(*shape), "state_scale": d.uniform(0.01, 0.03, *channels, 1)}
    group = d.integers(0, 2, math.prod(channels)).int()
    return {"state": d.codes(*shape), "state_scale": d.uniform(0.01, 0.03, 3, d_state), "state_group": group}


_STATES = ("float32", "float16", "int8", "int8 groups")
#: State, inputs, tokens and whether some are padding.
_PROMPTS = (
    ("none", "float", 1, False),
    ("float32", "float", 33, True),
    ("float16", "int8", 130, False),
    ("int8", "int8 channels", 70, True),
    ("int8 groups", "float", 64, False),
    ("none", "int8 channels", 64, True),
)


def _padding(batch: int, length: int) -> Tensor:
    """Left padding in the last sequence."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 3] = False
    return mask


def _maybe_codes(d: Draw, inputs: str, *shape: int) -> Activation:
    """ "float", "float16", "int8" of one scale, or "int8 channels"."""
    if inputs.startswith("float"):
        return d.floats(*shape).to(torch.float16 if inputs == "float16" else torch.float32)
    return d.quantized(*shape, per_channel=inputs == "int8 channels")


def _out(inputs: str) -> dict[str, Any]:
    """float16 gives float16."""
    return {"out_dtype": torch.float16} if inputs.endswith("float16") else {}


def _selective_scan() -> Iterator[Case]:
    def args(
        tokens: tuple[int, ...], channels: int, inputs: str, state: str, masked: bool, d: Draw
    ) -> Arguments:
        u, dt, z = (_maybe_codes(d, inputs, *tokens, channels) for _ in range(3))
        B, C = (_maybe_codes(d, inputs, *tokens, 16) for _ in range(2))
        A = -torch.exp(d.floats(channels, 16))
        named = _states(d, state, tokens[0], (channels,), 16) | _out(inputs)
        if masked:
            named["mask"] = _padding(*tokens)
        return (u, dt, A, B, C, d.floats(channels), z, d.floats(channels) - 2), named

    for state in _STATES:
        for inputs in ("float", "int8"):
            make = partial(args, (3,), 150, inputs, state, False)
            yield Case("selective_scan_step", f"{inputs}, state {state}", make, _SCAN)
    for inputs in ("int8 channels", "float16"):
        make = partial(args, (1,), 5120, inputs, "float16", False)
        yield Case("selective_scan_step", f"{inputs}, 5120 channels", make, _SCAN)
    make = partial(args, (2, 17), 150, "float16", "float16", False)
    yield Case("selective_scan", "float16, 17 tokens, state float16", make, _SCAN)
    for state, inputs, length, masked in _PROMPTS:
        name = f"{inputs}, {length} tokens{' padded' if masked else ''}, state {state}"
        make = partial(args, (2, length), 150, inputs, state, masked)
        yield Case("selective_scan", name, make, _SCAN)
    make = partial(args, (1, 300), 1536, "int8 channels", "float16", False)
    yield Case("selective_scan", "300 tokens, 1536 channels", make, _SCAN, device="cuda")


def _ssd() -> Iterator[Case]:
    def args(
        tokens: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        inputs: str,
        state: str,
        masked: bool,
        d: Draw,
    ) -> Arguments:
        heads, headdim, groups, d_state = sizes
        x, dt = (_maybe_codes(d, inputs, *tokens, n) for n in (heads * headdim, heads))
        B, C = (_maybe_codes(d, inputs, *tokens, groups * d_state) for _ in range(2))
        named = _states(d, state, tokens[0], (heads, headdim), d_state)
        named |= {"headdim": headdim, "ngroups": groups, **_out(inputs)}
        if masked:
            named |= {"mask": _padding(*tokens), "dt_limit": (0.05, 0.3)}
        return (x, dt, -torch.exp(d.floats(heads)), B, C, d.floats(heads), d.floats(heads) - 2), named

    small, published = (4, 20, 2, 12), (12, 64, 1, 128)
    for state in _STATES:
        for inputs in ("float", "int8 channels"):
            yield Case(
                "ssd_step",
                f"{inputs}, state {state}",
                partial(args, (3,), small, inputs, state, False),
                _SCAN,
            )
    for inputs, batch in (("int8", 1), ("int8", 4), ("float16", 1)):
        make = partial(args, (batch,), published, inputs, "float16", False)
        yield Case("ssd_step", f"12 heads of 64 x 128, {inputs}, batch {batch}", make, _SCAN)
    for state, inputs, length, masked in _PROMPTS:
        name = f"{inputs}, {length} tokens{' padded' if masked else ''}, state {state}"
        make = partial(args, (2, length), small, inputs, state, masked)
        yield Case("ssd_scan", name, make, _SSD_SCAN)
    for length in (63, 128, 512):
        for inputs in ("float", "float16", "int8 channels", "int8 to float16"):
            make = partial(args, (1, length), published, inputs, "float16", False)
            tolerance = _SSD_SCAN_HALF if inputs.endswith("float16") else _SSD_SCAN
            yield Case("ssd_scan", f"12 heads of 64 x 128, {inputs}, {length} tokens", make, tolerance)
    for inputs in ("float", "int8 channels"):
        make = partial(args, (12, 63), published, inputs, "float32", False)
        name = f"12 heads of 64 x 128, {inputs}, 12 sequences of 63 tokens"
        yield Case("ssd_scan", name, make, _SSD_SCAN, device="cuda")


def _hadamard() -> Iterator[Case]:
    def plain(rows: int, n: int, dtype: torch.dtype, transpose: bool, d: Draw) -> Arguments:
        return (d.floats(rows, n).to(dtype), transpose), {}

    def ties(rounding: str, overflow: str, d: Draw) -> Arguments:
        x = d.integers(-60, 60, 3, 64).float()
        return (x, torch.tensor(0.25)), {"rounding": rounding, "overflow": overflow}

    def codes(rows: int, n: int, d: Draw) -> Arguments:
        return (d.floats(rows, n), torch.tensor(0.03)), {}

    def gated(
        rows: int, n: int, groups: int, dtype: torch.dtype, to_codes: bool, before: bool, d: Draw
    ) -> Arguments:
        z: Activation = d.quantized(rows, n, per_channel=True) if to_codes else d.floats(rows, n).to(dtype)
        named = {"eps": 1e-5, "group_size": n // groups, "norm_before_gate": before, "out_dtype": dtype}
        named["out_scale"] = torch.tensor(0.03) if to_codes else None
        return (d.floats(rows, n).to(dtype), z, d.floats(n)), named

    sizes = ((1, 1536), (17, 1536), (1, 5120), (5, 5120), (1, 8192), (17, 8192), (3, 80), (5, 256))
    for rows, n in sizes:
        yield Case("hadamard", f"{rows}x{n}", partial(plain, rows, n, torch.float32, False), _FLOAT32)
        yield Case("hadamard_quantize", f"{rows}x{n}", partial(codes, rows, n), _FLOAT32)
    yield Case("hadamard", "3x80 transposed", partial(plain, 3, 80, torch.float32, True), _FLOAT32)
    for rows in (1, 17):
        make = partial(plain, rows, 1536, torch.float16, False)
        yield Case("hadamard", f"{rows}x1536 float16", make, _FLOAT32)
    for rounding in ("half_even", "half_away"):
        for overflow in ("saturate", "wrap"):
            name = f"ties, {rounding}, {overflow}"
            yield Case("hadamard_quantize", name, partial(ties, rounding, overflow), _EXACT)
    for rows, n, groups in ((1, 5120, 1), (17, 1536, 1), (17, 8192, 8), (3, 80, 2)):
        for to_codes in (False, True):
            kind = f"{rows}x{n}, {groups} groups{' to codes' if to_codes else ''}"
            make = partial(gated, rows, n, groups, torch.float32, to_codes, False)
            yield Case("gated_norm_hadamard", kind, make, _FLOAT32)
            make = partial(gated, rows, n, groups, torch.float16, to_codes, False)
            yield Case("gated_norm_hadamard", f"float16, {kind}", make, _HALF_INSIDE)
    make = partial(gated, 5, 1536, 3, torch.float32, False, True)
    yield Case("gated_norm_hadamard", "5x1536, norm first", make, _FLOAT32)

from __future__ import annotations

import json
import math

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.weight import (
    MOST_MULTIPLES,
    QuantizedWeight,
    WeightFormat,
    apply_scale,
    round_significant,
)

FORMATS = [
    *(
        WeightFormat(bits, granularity, 16 if granularity == "group" else None)
        for bits in (4, 8)
        for granularity in ("tensor", "channel", "group")
    ),
    WeightFormat(4, "tensor", scale_bits=16),
    WeightFormat(8, "channel", scale_bits=16),
    WeightFormat(4, "group", 16, scale_bits=32),
    WeightFormat(8, "split", parts=(1, 5)),
    WeightFormat(8, "split", scale_bits=16, parts=(2, 3, 1)),
]
IDS = [f"int{f.bits}-{f.granularity}-{f.scale_bits}" for f in FORMATS]
TWO_LEVEL = WeightFormat(4, "two_level", 16)
MULTIPLES = WeightFormat(4, "group", 16, multiples=16)


def random_weight(format: WeightFormat, shape: tuple[int, int] = (6, 48), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(format.qmin, format.qmax + 1, shape, dtype=torch.int8, generator=generator)
    scale = (torch.rand(format.scale_shape(shape), generator=generator) + 0.01).to(format.scale_dtype)
    return codes, scale, QuantizedWeight.from_codes(codes, scale, format)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_codes_survive_and_real_is_scale_times_code(format):
    codes, scale, weight = random_weight(format)
    assert torch.equal(weight.codes(), codes)
    width = format.group_width(48)
    for dtype in (torch.float64, torch.float32, torch.float16):
        real = weight.dequantize(dtype)
        assert real.dtype == dtype and real.shape == (6, 48)
        for n, k in [(0, 0), (2, 15), (2, 16), (5, 47)]:
            row = 0 if format.granularity == "tensor" else n
            assert real[n, k] == scale[row, k // width].to(dtype) * codes[n, k].to(dtype)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_state_dict_has_two_keys_and_fills_an_empty_weight(format):
    codes, scale, weight = random_weight(format)
    state = weight.state_dict()
    assert sorted(state) == ["data", "scale"]
    empty = QuantizedWeight.empty((6, 48), format, "meta")
    assert empty.shape == weight.shape
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.codes(), codes) and torch.equal(empty.scale, scale)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_casting_the_model_changes_no_buffer(format):
    codes, scale, weight = random_weight(format)
    leaf = torch.nn.Linear(2, 2, bias=False)
    leaf.weight = None
    leaf.other, leaf.quantized = torch.nn.Parameter(torch.ones(2)), weight
    for cast in (leaf.half, leaf.double, leaf.bfloat16, lambda: leaf.to("cpu", torch.float64)):
        cast()
        assert leaf.other.dtype != torch.float32
        assert weight.scale.dtype == format.scale_dtype and torch.equal(weight.scale, scale)
        assert torch.equal(weight.codes(), codes)


def test_an_empty_weight_can_leave_the_meta_device():
    weight = QuantizedWeight.empty((4, 32), WeightFormat(4, "group", 16), "meta").to_empty(device="cpu")
    assert weight.data.shape == (4, 16) and weight.data.device.type == "cpu"
    assert weight.scale.dtype == torch.float16 and weight.scale.shape == (4, 2)


def test_bytes():
    weight = QuantizedWeight.empty((6, 256), WeightFormat(4, "group", 128))
    assert weight.nbytes == 6 * 128 + 6 * 2 * 2
    assert QuantizedWeight.empty((6, 256), WeightFormat(8, "channel")).nbytes == 6 * 256 + 6 * 4


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_format_survives_json(format):
    assert WeightFormat.from_dict(json.loads(json.dumps(format.to_dict()))) == format


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"granularity": "tensor"}, torch.float32),
        ({"granularity": "channel"}, torch.float32),
        ({"granularity": "split"}, torch.float32),
        ({"granularity": "group", "group_size": 16}, torch.float16),
        ({"granularity": "two_level", "group_size": 16}, torch.float16),
        ({"granularity": "two_level", "group_size": 16, "scale_bits": 16}, torch.float16),
        ({"granularity": "tensor", "scale_bits": 16}, torch.float16),
        ({"granularity": "split", "scale_bits": 16}, torch.float16),
        ({"granularity": "group", "group_size": 16, "scale_bits": 32}, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_scales(fields, dtype):
    format = WeightFormat(4, **fields)
    assert format.scale_dtype == dtype
    smallest = torch.tensor(format.smallest_scale, dtype=torch.float64)
    assert smallest > 0 and smallest.to(dtype) == smallest
    assert WeightFormat.from_dict(json.loads(json.dumps(format.to_dict()))) == format


def significant_bits(x):
    """Of the mantissa of a positive float32, its leading one counted."""
    mantissa = int(torch.tensor(x).view(torch.int32)) & (2**23 - 1) | 2**23
    return 24 - (mantissa & -mantissa).bit_length() + 1


@pytest.mark.parametrize("up", [False, True])
def test_round_significant(up):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, generator=generator) * 2.0 ** torch.randint(-120, 120, (500,), generator=generator)
    x = torch.cat([x, x.clamp(2.0**-14, 6e4).half().float(), torch.tensor([2 - 2.0**-23, 1.0, 1 + 2.0**-11])])
    rounded = round_significant(x, up=up)
    for value, found in zip(x.tolist(), rounded.tolist(), strict=True):
        step = 2.0 ** (math.frexp(value)[1] - 11)
        whole = value / step  # exact, and below 2^11
        expected = math.ceil(whole) if up else math.floor(whole + 0.5)
        assert found == expected * step
        assert significant_bits(found) <= 11


def two_levels(shape=(6, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
    scale = 10 ** (torch.rand(TWO_LEVEL.scale_shape(shape), generator=generator) * 2 - 3)
    return codes, scale.half()


def test_two_levels_are_taken_apart():
    codes, scale = two_levels()
    weight = QuantizedWeight.from_codes(codes, scale, TWO_LEVEL)
    assert torch.equal(weight.codes(), codes)
    assert weight.scale.dtype == torch.float16 and weight.scale.shape == (6, 3)
    assert weight.channel_scale.dtype == torch.float32 and weight.channel_scale.shape == (6, 1)
    products = apply_scale(codes, scale, torch.float64)
    reach = products.abs().amax(1, keepdim=True) / 127
    assert (weight.channel_scale >= reach * (1 - 1e-7)).all()
    assert (weight.channel_scale <= reach * (1 + 2.0**-10)).all()
    assert all(significant_bits(s) <= 11 for s in weight.channel_scale.flatten().tolist())
    assert torch.equal(weight.scale, (scale.float() / weight.channel_scale).half())
    integers, row_scale = weight.integers()
    assert row_scale is weight.channel_scale
    assert integers.dtype == torch.int8
    for n, k in [(0, 0), (1, 15), (2, 16), (5, 47)]:
        assert int(integers[n, k]) == round(float(weight.scale[n, k // 16]) * int(codes[n, k]))
    assert integers.abs().amax(1).tolist() == [127] * 6
    # Half a step of the row, and float16's rounding of the group's scale.
    assert ((weight.dequantize() - products).abs() <= 0.5625 * weight.channel_scale).all()
    assert torch.equal(weight.dequantize(torch.float64), integers.double() * weight.channel_scale.double())
    assert weight.nbytes == 6 * 24 + 6 * 3 * 2 + 6 * 4


def test_two_levels_of_rows_and_groups_of_zeros():
    codes, scale = two_levels()
    codes[2], codes[3:, 16:32], scale[3:, 1] = 0, 0, 60000
    codes[5, :16], codes[5, 32:], scale[5, 0] = 1, 0, 2.0**-24
    weight = QuantizedWeight.from_codes(codes, scale, TWO_LEVEL)
    for buffer in weight.buffers():
        assert buffer.double().isfinite().all()
    assert (weight.scale > 0).all() and (weight.channel_scale > 0).all()
    real = weight.dequantize()
    assert not real[2].any() and not real[3:, 16:32].any()
    assert real[5, :16] == pytest.approx(2.0**-24, rel=1e-3)


def test_two_level_state():
    codes, scale = two_levels()
    weight = QuantizedWeight.from_codes(codes, scale, TWO_LEVEL)
    assert sorted(weight.state_dict()) == ["channel_scale", "data", "scale"]
    empty = QuantizedWeight.empty((6, 48), TWO_LEVEL, "meta")
    assert empty.channel_scale.is_meta
    empty.load_state_dict(weight.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), weight.dequantize())
    before = weight.dequantize()
    for cast in (weight.half, weight.double, lambda: weight.to("cpu", torch.bfloat16)):
        cast()
        assert weight.channel_scale.dtype == torch.float32 and weight.scale.dtype == torch.float16
        assert torch.equal(weight.dequantize(), before)
    assert WeightFormat(4, "channel").one_level == WeightFormat(4, "channel")
    assert TWO_LEVEL.one_level == WeightFormat(4, "group", 16)


def test_channel_scales_belong_to_two_levels():
    codes, scale = two_levels()
    weight = QuantizedWeight.from_codes(codes, scale, TWO_LEVEL)
    with pytest.raises(TypeError, match="'two_level'"):
        QuantizedWeight(weight.data, weight.scale, TWO_LEVEL)
    with pytest.raises(TypeError, match="'group'"):
        QuantizedWeight(weight.data, weight.scale, TWO_LEVEL.one_level, weight.channel_scale)
    with pytest.raises(
        QuambaError, match=r"channel_scale .*float16 \[6, 1\], expected torch.float32 \[6, 1\]"
    ):
        QuantizedWeight(weight.data, weight.scale, TWO_LEVEL, weight.channel_scale.half())


def multiples(unit: list[float], times: list[list[int]], seed: int = 0):
    """Scales times units, and random codes."""
    scale = torch.tensor(unit)[:, None] * torch.tensor(times).float()
    assert torch.equal(scale.half().float(), scale)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (len(unit), 16 * scale.shape[1]), dtype=torch.int8, generator=generator)
    return QuantizedWeight.from_codes(codes, scale.half(), MULTIPLES)


def test_a_row_with_multiples_is_integers_of_one_scale():
    units = [2.0**-9, 127 * 2.0**-15, 2.0**-24, 97 * 2.0**-24, 113 * 2.0**-16]
    weight = multiples(units, [[16, 1, 7], [15, 13, 11], [3, 16, 1], [16, 15, 2], [5, 5, 16]])
    found = weight.row_unit()
    assert found.dtype == torch.float32 and found.shape == (5, 1)
    assert found.flatten().tolist() == units
    integers = apply_scale(weight.codes(), weight.scale.float() / found, torch.float32)
    assert torch.equal(integers, integers.round()) and integers.min() >= -128 and integers.max() <= 127
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(weight.dequantize(dtype), integers.to(dtype) * found.to(dtype))


def test_the_unit_of_a_row_is_its_largest():
    weight = multiples([2.0**-9, 3 * 2.0**-9, 2.0**-9], [[16, 4, 8], [9, 9, 9], [6, 9, 15]])
    assert weight.row_unit().flatten().tolist() == [2.0**-7, 27 * 2.0**-9, 3 * 2.0**-9]


@pytest.mark.parametrize("bad", [2.0**-9 * 2.5, 2.0**-9 * 17, 0.0, float("nan"), -(2.0**-9)])
def test_scales_that_are_no_multiples_are_named(bad):
    weight = multiples([2.0**-9, 2.0**-9], [[16, 2, 3], [16, 15, 3]])
    weight.scale[1, 1] = bad
    with pytest.raises(QuambaError, match=r"scales of row 1 .* are not 1 to 16 times one number"):
        weight.row_unit()


def test_multiples_of_a_format():
    assert WeightFormat.from_dict(MULTIPLES.to_dict()) == MULTIPLES
    assert MULTIPLES.one_level == MULTIPLES
    assert "multiples to 16" in repr(multiples([1.0], [[3]]))
    # With the least code they reach the least int8.
    assert MOST_MULTIPLES * MULTIPLES.qmin == -128


def test_groups():
    format = WeightFormat(4, "group", 128)
    assert [format.n_groups(k) for k in (32, 128, 384)] == [1, 1, 3]
    assert format.group_width(32) == 32
    assert WeightFormat(8, "channel").n_groups(130) == 1
    with pytest.raises(QuambaError, match=r"group_size 128 does not divide in_features 200.* 100"):
        format.n_groups(200)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3, "granularity": "tensor"}, "bits is 3"),
        ({"bits": 4, "granularity": "grup", "group_size": 128}, "Did you mean 'group'"),
        ({"bits": 4, "granularity": "group"}, "group_size is None"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "group_size is 0"),
        ({"bits": 8, "granularity": "channel", "group_size": 128}, "expected None"),
        ({"bits": 8, "granularity": "channel", "groupsize": 128}, "Did you mean 'group_size'"),
        ({"bits": 8}, "lacks granularity"),
        ({"bits": 8, "granularity": "two_level", "group_size": 128}, "expected 4 bits and scale_bits 16"),
        (
            {"bits": 4, "granularity": "two_level", "group_size": 16, "scale_bits": 32},
            "scale_bits 32, expected",
        ),
        ({"bits": 4, "granularity": "two_level"}, "group_size is None with granularity 'two_level'"),
        ({"bits": 4, "granularity": "channel", "multiples": 16}, "granularity 'channel' .* has multiples"),
        (
            {"bits": 8, "granularity": "group", "group_size": 16, "multiples": 16},
            "of 8 bits, .* has multiples",
        ),
        (
            {"bits": 4, "granularity": "group", "group_size": 16, "scale_bits": 32, "multiples": 4},
            "expected 4 bits, granularity 'group' and scale_bits 16",
        ),
        (
            {"bits": 4, "granularity": "group", "group_size": 16, "multiples": 17},
            "multiples is 17, .* 2 to 16",
        ),
        ({"bits": 4, "granularity": "group", "group_size": 16, "multiples": 1}, "multiples is 1, .* 2 to 16"),
        (
            {"bits": 4, "granularity": "group", "group_size": 16, "multiples": 2.5},
            "multiples is 2.5, .* 2 to 16",
        ),
        ({"bits": 8, "granularity": "split", "group_size": 128}, "expected None"),
        ({"bits": 8, "granularity": "channel", "parts": [1, 2]}, "only granularity 'split' has parts"),
        ({"bits": 8, "granularity": "channel", "scale_bits": 8}, "number of scale bits is 8"),
    ],
)
def test_bad_formats_are_named(fields, message):
    with pytest.raises(QuambaError, match=message):
        WeightFormat.from_dict(fields)


def test_wrong_buffers_are_named():
    format = WeightFormat(4, "group", 16)
    _, scale, weight = random_weight(format)
    with pytest.raises(QuambaError, match=r"scale .*float32.*expected torch\.float16"):
        QuantizedWeight(weight.data, scale.float(), format)
    with pytest.raises(QuambaError, match=r"data .*int8"):
        QuantizedWeight(weight.data.view(torch.int8), scale, format)
    with pytest.raises(QuambaError, match=r"expected torch.float16 \[6, 3\]"):
        QuantizedWeight(weight.data, scale[:, :2], format)
    with pytest.raises(QuambaError, match="even number of columns, not 33"):
        QuantizedWeight.empty((4, 33), WeightFormat(4, "channel"))

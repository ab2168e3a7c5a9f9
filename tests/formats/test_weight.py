from __future__ import annotations

import json

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.weight import QuantizedWeight, WeightFormat

FORMATS = [
    WeightFormat(bits, granularity, 16 if granularity == "group" else None)
    for bits in (4, 8)
    for granularity in ("tensor", "channel", "group")
]
IDS = [f"int{f.bits}-{f.granularity}" for f in FORMATS]


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

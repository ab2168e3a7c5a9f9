"""A decoding step of these ops is captured into a CUDA graph and replayed on new inputs."""

from __future__ import annotations

import pytest
import torch
from rounding import random_codes
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.triton.conv import causal_conv1d
from quamba.kernels.triton.embedding import embedding
from quamba.kernels.triton.hadamard import gated_norm_hadamard, hadamard, hadamard_quantize
from quamba.kernels.triton.norm import add_norm, gated_rms_norm, rms_norm
from quamba.kernels.triton.quantize import quantize

CHANNELS = 2560


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_captured_and_replayed() -> None:
    device = torch.device("cuda")
    scale = torch.tensor(0.02, device=device)
    table = QuantizedWeight(
        random_codes(50, CHANNELS, low=-127), torch.full((50, 1), 0.01), WeightFormat(8, "channel")
    ).to(device)
    taps = QuantizedWeight(
        random_codes(CHANNELS, 4, low=-127), torch.full((1, 1), 0.004), WeightFormat(8, "tensor")
    ).to(device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=device)
    residual = torch.zeros(2, 1, CHANNELS, device=device)
    state = torch.zeros(2, 3, CHANNELS, dtype=torch.int8, device=device)

    def step() -> list[Tensor]:
        x = embedding(ids, table, out_dtype=torch.float16)
        codes, summed = add_norm(x, residual, None, eps=1e-5, out_scale=scale)
        conv = causal_conv1d(Quantized(codes, scale), taps, None, state=state, out_scale=scale)
        z = Quantized(conv, scale)
        gated = gated_rms_norm(summed, z, None, eps=1e-5, group_size=CHANNELS)
        rotated = hadamard(gated)
        fused = gated_norm_hadamard(summed, z, None, eps=1e-5, group_size=CHANNELS, out_scale=scale)
        return [
            conv,
            rotated,
            quantize(rotated, scale),
            hadamard_quantize(gated, scale),
            fused,
            rms_norm(z, eps=1e-5),
        ]

    step()  # compiles, and moves the matrices of the rotation to the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ids.copy_(torch.tensor([[7], [30]]))
    residual.normal_()
    state.copy_(random_codes(2, 3, CHANNELS))
    before = state.clone()
    graph.replay()
    given, after = [t.clone() for t in captured], state.clone()
    state.copy_(before)
    for ours, eager in zip(given, step(), strict=True):
        assert torch.equal(ours, eager)
    assert torch.equal(after, state)

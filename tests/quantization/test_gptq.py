from __future__ import annotations

import itertools
import math

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.weight import QuantizedWeight, WeightFormat, apply_scale, round_significant
from quamba.quantization import gptq
from quamba.quantization.gptq import (
    PLAIN_GPTQ,
    GptqConfig,
    _refit_scale,
    accumulate_code_moments,
    accumulate_cross,
    accumulate_hessian,
    relative_loss,
    solve,
)
from quamba.quantization.rtn import absmax_scale, mse_scale, round_to_nearest

INT4_GROUPS = WeightFormat(4, "group", 16)
TWO_LEVEL = WeightFormat(4, "two_level", 16)
MULTIPLES = WeightFormat(4, "group", 16, multiples=16)
FORMATS = [
    *(
        WeightFormat(bits, granularity, 16 if granularity == "group" else None)
        for bits in (4, 8)
        for granularity in ("tensor", "channel", "group")
    ),
    WeightFormat(4, "channel", scale_bits=16),
    WeightFormat(4, "split", parts=(10, 1, 13)),
    WeightFormat(8, "split", parts=(10, 1, 13)),
    TWO_LEVEL,
]
IDS = [f"int{f.bits}-{f.granularity}-{f.scale_bits}" for f in FORMATS]
CONFIGS = {"default": GptqConfig(), "plain": PLAIN_GPTQ}


def layer(rows=24, columns=64, tokens=400, seed=0, dtype=torch.float32):
    """A random weight and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)
    mix += 2 * torch.randn(columns, 1, generator=generator, dtype=torch.float64) / columns
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    x *= torch.linspace(0.2, 3, columns).double()[torch.randperm(columns, generator=generator)]
    return weight.to(dtype), (2 / tokens * x.T @ x).to(dtype)


def same(a, b):
    return torch.equal(a.data, b.data) and torch.equal(a.scale, b.scale)


def test_hessian_is_the_mean_over_any_batches():
    x = torch.randn(7, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian, count = torch.zeros(12, 12, dtype=torch.float64), 0
    for batch in (x[:1], x[1:6], x[6:], x[:0]):
        count = accumulate_hessian(hessian, batch, count)
    flat = x.view(-1, 12)
    assert count == 35
    torch.testing.assert_close(hessian, 2 / 35 * flat.T @ flat, rtol=1e-13, atol=1e-13)


def test_cross_moments_have_the_float_inputs_in_the_rows():
    x, x_hat = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cross = torch.zeros(4, 4, dtype=torch.float64)
    assert accumulate_cross(cross, x, x_hat, 0) == 9
    torch.testing.assert_close(cross, 2 / 9 * sum(torch.outer(a, b) for a, b in zip(x, x_hat, strict=True)))


def test_moments_of_codes_are_those_of_their_real_values(monkeypatch):
    monkeypatch.setattr(gptq, "_EXACT_TOKENS", 5)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (7, 5, 12), generator=generator).to(torch.int8)
    codes[0, 0] = -128
    scale = torch.tensor(0.03)
    hessian, count = torch.zeros(12, 12, dtype=torch.float64), 0
    for batch in (codes[:0], codes[:1], codes[1:6], codes[6:]):
        count = accumulate_code_moments(hessian, batch, scale, count)
    x = codes.view(-1, 12).double() * scale.double()
    assert count == 35
    torch.testing.assert_close(hessian, 2 / 35 * x.T @ x, rtol=1e-13, atol=0)
    largest = torch.full((1 << 17, 16), -128, dtype=torch.int8)
    monkeypatch.undo()
    full = torch.zeros(16, 16)
    accumulate_code_moments(full, largest, torch.tensor(1.0), 0)
    assert bool((full == 2 * 128**2).all())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_block_size_changes_no_code_at_fixed_scales(format, config):
    weight, hessian = layer(dtype=torch.float64)
    scale = mse_scale(weight, format)
    codes = [
        solve(weight, hessian, format, GptqConfig(**{**config.to_dict(), "block_size": size}), scale=scale)[0]
        for size in (1, 7, 16, 24, 64, 1000)
    ]
    for other in codes[1:]:
        assert same(codes[0], other)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_block_size_changes_no_code_when_scales_are_chosen(config):
    weight, hessian = layer(dtype=torch.float64)
    solutions = [
        solve(weight, hessian, INT4_GROUPS, GptqConfig(**{**config.to_dict(), "block_size": size}))[0]
        for size in (5, 16, 40, 64)
    ]
    for other in solutions[1:]:
        assert same(solutions[0], other)


def test_rounding_with_feedback_is_gptq_with_the_inverse_hessian():
    """The published recurrence (inverse, its upper Cholesky factor U, updates W -= err U)."""
    weight, hessian = layer(dtype=torch.float64)
    format = WeightFormat(4, "channel")
    scale = absmax_scale(weight, format)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, codes = weight.clone(), torch.empty_like(weight)
    for i in range(64):
        codes[:, i] = torch.round(left[:, i] / scale[:, 0].double()).clamp(-8, 7)
        error = (left[:, i] - codes[:, i] * scale[:, 0].double()) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    solution, _ = solve(weight, hessian, format, PLAIN_GPTQ, scale=scale)
    assert torch.equal(solution.codes(), codes.to(torch.int8))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_hessian_is_round_to_nearest(format, config, dtype):
    weight, _ = layer(dtype=dtype)
    for choose in (absmax_scale, mse_scale):
        scale = choose(weight, format)
        solution, _ = solve(weight, torch.eye(64), format, config, scale=scale)
        assert same(solution, round_to_nearest(weight, format, scale=scale))
    assert solve(weight, 0 * torch.eye(64), format, config, scale=scale)[0].codes().equal(solution.codes())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_below_round_to_nearest(format, config, seed):
    weight, hessian = layer(seed=seed)
    solution, losses = solve(weight, hessian, format, config)
    assert losses.gptq < 0.8 * losses.rtn
    nearest = round_to_nearest(weight, format)
    for loss, quantized in ((losses.gptq, solution), (losses.rtn, nearest)):
        error = weight.double() - quantized.dequantize(torch.float64)
        expected = torch.trace(error @ hessian.double() @ error.T) / torch.trace(
            weight.double() @ hessian.double() @ weight.double().T
        )
        assert loss == pytest.approx(float(expected), rel=1e-4)
    assert losses.gptq_sqnr_db - losses.rtn_sqnr_db == pytest.approx(
        10 * math.log10(losses.rtn / losses.gptq)
    )


def test_refinement_lowers_the_loss_of_every_row_and_reaches_a_fixed_point():
    weight, hessian = layer(dtype=torch.float64)
    kwargs = {"damping": 0.0, "act_order": True}

    def row_losses(refinements, sweeps=1):
        config = GptqConfig(**kwargs, refinements=refinements, sweeps=sweeps)
        error = weight - solve(weight, hessian, INT4_GROUPS, config)[0].dequantize(torch.float64)
        return ((error @ hessian) * error).sum(1)

    losses = [row_losses(n) for n in range(5)]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(losses[3].sum()) < 0.95 * float(losses[0].sum())
    settled, again = (
        solve(weight, hessian, INT4_GROUPS, GptqConfig(**kwargs, refinements=n, sweeps=4))[0]
        for n in (30, 31)
    )
    assert same(settled, again)


def test_settled_codes_cannot_be_improved_one_by_one():
    weight, hessian = layer(rows=6, dtype=torch.float64)
    config = GptqConfig(damping=0.0, refinements=30, sweeps=4)
    solution, _ = solve(weight, hessian, INT4_GROUPS, config)
    real = solution.dequantize(torch.float64)
    step = solution.scale.double().repeat_interleave(16, 1)
    error = weight - real
    best = ((error @ hessian) * error).sum(1)
    for k, move in itertools.product(range(64), (-1, 1)):
        allowed = (solution.codes()[:, k] + move >= -8) & (solution.codes()[:, k] + move <= 7)
        other = error.clone()
        other[:, k] -= move * step[:, k]
        worse = ((other @ hessian) * other).sum(1) >= best * (1 - 1e-12)
        assert bool((worse | ~allowed).all())


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_scales_of_known_codes_are_found(format):
    """From scales that are off by a little and the right codes, least squares finds the right scales."""
    _, hessian = layer(dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(format.qmin, format.qmax + 1, (24, 64), generator=generator).double()
    codes[2, :16] = 0
    right = (torch.rand(format.scale_shape((24, 64)), generator=generator) + 0.5).to(format.scale_dtype)
    if format.granularity == "split":
        right = round_significant(right[[0] * 10 + [10] + [11] * 13])
    wrong = (right.double() * 1.03).to(format.scale_dtype)
    found = _refit_scale(
        apply_scale(codes, right, torch.float64), hessian, codes.T.contiguous(), wrong, format
    )
    if format.group_size is not None:
        right[2, 0] = wrong[2, 0]  # all codes 0: any scale will do, the old one stays
    short = format.scale_dtype == torch.float16 or format.granularity == "split"
    torch.testing.assert_close(found, right, rtol=0 if short else 2e-7, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_do_not_depend_on_each_other_and_share_short_scales(bits, config):
    weight, hessian = layer(dtype=torch.float64)
    weight[10:] *= 7
    whole, _ = solve(weight, hessian, WeightFormat(bits, "split", parts=(10, 14)), config)
    for rows in (slice(0, 10), slice(10, 24)):
        alone = WeightFormat(bits, "split", parts=(rows.stop - rows.start,))
        part, _ = solve(weight[rows], hessian, alone, config)
        assert torch.equal(part.codes(), whole.codes()[rows])
        assert torch.equal(part.scale, whole.scale[rows])
        assert len(part.scale.unique()) == 1
    assert torch.equal(round_significant(whole.scale), whole.scale)
    assert float(whole.scale[0]) < float(whole.scale[-1]) / 3


def test_refitted_scales_of_a_part_are_those_of_all_its_rows():
    """The gain of a part is that of one problem with its rows one behind the other."""
    weight, hessian = layer(dtype=torch.float64)
    format, tensor = WeightFormat(4, "split", parts=(24,)), WeightFormat(4, "tensor")
    scale = absmax_scale(weight, format)
    codes = round_to_nearest(weight, format, scale=scale).codes().double().T.contiguous()
    found = _refit_scale(weight, hessian, codes, scale, format)
    expected = _refit_scale(weight, hessian, codes, scale[:1], tensor)
    assert not torch.equal(found, scale)
    assert found.unique().tolist() == [float(round_significant(expected))]


def test_two_levels_are_solved_as_groups_and_measured_as_integers():
    weight, hessian = layer()
    whole, losses = solve(weight, hessian, TWO_LEVEL)
    groups, of_groups = solve(weight, hessian, TWO_LEVEL.one_level)
    assert whole.format == TWO_LEVEL
    assert torch.equal(whole.codes(), groups.codes())
    expected = QuantizedWeight.from_codes(groups.codes(), groups.scale, TWO_LEVEL)
    assert torch.equal(whole.scale, expected.scale)
    assert torch.equal(whole.channel_scale, expected.channel_scale)
    assert losses.gptq == relative_loss(weight, whole.dequantize(), hessian)
    assert losses.gptq != of_groups.gptq
    assert losses.rtn == relative_loss(weight, round_to_nearest(weight, TWO_LEVEL).dequantize(), hessian)
    assert losses.gptq < losses.rtn


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_multiples_stay_multiples(config):
    """Whatever chooses and refits them, and at little cost against scales that are free."""
    weight, hessian = layer()
    found, losses = solve(weight, hessian, MULTIPLES, config)
    times = found.scale.float() / found.row_unit()
    assert torch.equal(times, times.round()) and times.min() >= 1 and times.max() <= 16
    _, free = solve(weight, hessian, WeightFormat(4, "group", 16), config)
    assert losses.gptq < losses.rtn
    assert losses.gptq < 1.2 * free.gptq


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_rank_deficient_hessian(config, damping):
    weight, hessian = layer(tokens=10)
    config = GptqConfig(**{**config.to_dict(), "damping": damping})
    _, losses = solve(weight, hessian, INT4_GROUPS, config)
    assert math.isfinite(losses.gptq) and losses.gptq < losses.rtn


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dead_columns_are_rounded_and_disturb_no_other(config):
    weight, hessian = layer(dtype=torch.float64)
    dead = [0, 5, 16, 17, 63]
    hessian[dead] = 0
    hessian[:, dead] = 0
    scale = absmax_scale(weight, INT4_GROUPS)
    solution, losses = solve(weight, hessian, INT4_GROUPS, config, scale=scale)
    assert torch.equal(
        solution.codes()[:, dead], round_to_nearest(weight, INT4_GROUPS, scale=scale).codes()[:, dead]
    )
    assert losses.gptq < losses.rtn
    changed = weight.clone()
    changed[:, dead] += 0.1
    other, _ = solve(changed, hessian, INT4_GROUPS, config, scale=scale)
    alive = [k for k in range(64) if k not in dead]
    assert torch.equal(other.codes()[:, alive], solution.codes()[:, alive])


def test_one_dead_group():
    weight, hessian = layer()
    hessian[16:32] = 0
    hessian[:, 16:32] = 0
    solution, losses = solve(weight, hessian, INT4_GROUPS)
    assert bool((solution.scale > 0).all()) and losses.gptq < losses.rtn
    error = (weight - solution.dequantize())[:, 16:32].square().mean()
    assert float(error) < float(weight[:, 16:32].square().mean()) / 50


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_zero_rows_and_groups(config):
    weight, hessian = layer()
    weight[3] = 0
    weight[:, 16:32] = 0
    solution, losses = solve(weight, hessian, INT4_GROUPS, config)
    assert bool((solution.scale > 0).all()) and bool(torch.isfinite(solution.scale).all())
    assert int(solution.codes()[3].abs().max()) == 0
    assert losses.gptq < losses.rtn
    assert solve(torch.zeros(3, 64), hessian, INT4_GROUPS, config)[1].gptq == 0.0


def test_narrow_and_indivisible_weights():
    weight, hessian = layer(columns=12)
    solution, losses = solve(weight, hessian, INT4_GROUPS)
    assert solution.scale.shape == (24, 1) and losses.gptq < losses.rtn
    weight, hessian = layer(columns=40)
    with pytest.raises(QuambaError, match="group_size 16 does not divide in_features 40"):
        solve(weight, hessian, INT4_GROUPS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("shape", "bits"), [((1, 2), 4), ((1, 1), 8), ((5, 1), 8), ((1, 64), 4), ((64, 2), 4)]
)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_tiny_shapes(shape, bits, granularity, config):
    weight, hessian = layer(*shape)
    format = WeightFormat(bits, granularity, 128 if granularity == "group" else None)
    solution, losses = solve(weight, hessian, format, config)
    assert solution.shape == shape and math.isfinite(losses.gptq)


def test_deterministic_and_without_side_effects():
    weight, hessian = layer()
    before = weight.clone(), hessian.clone()
    first, second = (solve(weight, hessian, INT4_GROUPS)[0] for _ in range(2))
    assert same(first, second)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_rows_do_not_depend_on_each_other():
    weight, hessian = layer(dtype=torch.float64)
    whole, _ = solve(weight, hessian, INT4_GROUPS)
    part, _ = solve(weight[5:9], hessian, INT4_GROUPS)
    assert torch.equal(part.codes(), whole.codes()[5:9]) and torch.equal(part.scale, whole.scale[5:9])


def test_cross_moments_undo_a_known_distortion():
    """If x_hat = A x, then W A^-1 on x_hat is W on x; equal moments change nothing."""
    weight, hessian = layer(columns=16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    eye = torch.eye(16, dtype=torch.float64)
    distortion = eye + 0.2 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    seen, cross = distortion @ hessian @ distortion.T, hessian @ distortion.T
    format = WeightFormat(8, "channel")
    config = GptqConfig(damping=1e-9)

    def output_loss(quantized):
        error = torch.cat([weight, -quantized.dequantize(torch.float64)], dim=1)
        joint = torch.cat([torch.cat([hessian, cross], 1), torch.cat([cross.T, seen], 1)])
        return float(((error @ joint) * error).sum() / ((weight @ hessian) * weight).sum())

    without, _ = solve(weight, seen, format, config)
    corrected, losses = solve(weight, seen, format, config, cross=cross)
    assert output_loss(without) > 0.1
    assert output_loss(corrected) < 1e-4
    assert losses.gptq < losses.rtn
    neutral, _ = solve(weight, seen, format, config, cross=seen)
    assert same(neutral, without)


def test_a_half_precision_weight_is_solved_in_float32():
    weight, hessian = layer()
    assert same(
        solve(weight.half(), hessian, INT4_GROUPS)[0], solve(weight.half().float(), hessian, INT4_GROUPS)[0]
    )


def test_int8_per_channel_gains_too():
    weight, hessian = layer()
    _, losses = solve(weight, hessian, WeightFormat(8, "channel"))
    assert losses.gptq < 0.8 * losses.rtn < 1e-4


def test_matmul_precision_is_restored():
    weight, hessian = layer()
    torch.set_float32_matmul_precision("high")
    try:
        solve(weight, hessian, INT4_GROUPS)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bad_inputs_are_named():
    weight, hessian = layer()
    with pytest.raises(QuambaError, match=r"Hessian has shape \[3, 3\], expected \[64, 64\]"):
        solve(weight, torch.eye(3), INT4_GROUPS)
    with pytest.raises(QuambaError, match="Hessian of a layer holds NaN"):
        solve(weight, hessian * float("nan"), INT4_GROUPS)
    with pytest.raises(QuambaError, match="not positive semidefinite"):
        solve(
            weight, torch.eye(64) + 50 * (torch.eye(64).roll(1, 0) + torch.eye(64).roll(-1, 0)), INT4_GROUPS
        )
    with pytest.raises(QuambaError, match="weight to be quantized holds NaN"):
        solve(weight / 0, hessian, INT4_GROUPS)
    with pytest.raises(QuambaError, match="damping of GPTQ is -1"):
        GptqConfig(damping=-1)
    with pytest.raises(QuambaError, match="block_size of GPTQ is 0"):
        GptqConfig(block_size=0)
    with pytest.raises(QuambaError, match="Did you mean 'absmax'"):
        GptqConfig(scale="absmx")


def test_config_survives_a_dict():
    config = GptqConfig(damping=0.5, refinements=0)
    assert GptqConfig(**config.to_dict()) == config


def test_losses_of_nothing():
    assert relative_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4)) == 0.0

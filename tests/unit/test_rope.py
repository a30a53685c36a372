import math
from types import SimpleNamespace

import pytest
import torch

from gsa_platform.errors import UserError
from gsa_platform.model.rope import RotaryTable, apply_rotary


def yarn(factor=4.0, original_context=4096, beta_fast=32.0, beta_slow=1.0, kind="yarn"):
    return SimpleNamespace(
        kind=kind,
        factor=factor,
        original_context=original_context,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
    )


def rotate(table, x, start=0):
    return apply_rotary(x, *table.cos_sin(torch.arange(start, start + x.shape[1])))


def test_pairs_are_rotated_by_position_times_frequency():
    x = torch.zeros(1, 3, 1, 8)
    x[..., 1] = 1.0  # second pair: channels 1 and 5
    out = rotate(RotaryTable(8, theta=10000.0), x)
    angle = 2 * 10000.0 ** (-1 / 4)
    assert out[0, 2, 0, 1].item() == pytest.approx(math.cos(angle))
    assert out[0, 2, 0, 5].item() == pytest.approx(math.sin(angle))
    assert torch.equal(out[:, 0], x[:, 0])


def test_norm_is_preserved():
    x = torch.randn(2, 50, 3, 16)
    torch.testing.assert_close(rotate(RotaryTable(16), x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shift", [7, 131000])
def test_products_depend_on_relative_position_only(shift):
    table = RotaryTable(32)
    q, k = torch.randn(1, 20, 2, 32), torch.randn(1, 20, 2, 32)

    def products(start):
        return torch.einsum("bthe,bshe->bhts", rotate(table, q, start), rotate(table, k, start))

    torch.testing.assert_close(products(shift), products(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(products(0), torch.einsum("bthe,bshe->bhts", q, k), atol=1e-2)


def test_decoding_with_an_offset_equals_the_full_pass():
    x, table = torch.randn(2, 12, 2, 8), RotaryTable(8, scaling=yarn())
    full = rotate(table, x)
    steps = [rotate(table, x[:, t : t + 1], start=t) for t in range(12)]
    assert torch.equal(torch.cat(steps, dim=1), full)


def test_positions_per_sample():
    table, x = RotaryTable(8), torch.randn(2, 5, 3, 8)
    positions = torch.stack((torch.arange(5), torch.arange(5) + 40))
    out = apply_rotary(x, *table.cos_sin(positions))
    assert torch.equal(out[0], rotate(table, x[:1])[0])
    assert torch.equal(out[1], rotate(table, x[1:], start=40)[0])


def test_angles_are_exact_at_long_range():
    cos, _ = RotaryTable(128).cos_sin(torch.tensor([131071]))
    expected = [math.cos(131071 * 10000.0 ** (-i / 64)) for i in range(64)]
    assert cos.dtype == torch.float32
    assert (cos[0].double() - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-7


def test_low_precision_inputs_keep_their_dtype():
    x = torch.randn(1, 9, 1, 8)
    out = rotate(RotaryTable(8), x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), rotate(RotaryTable(8), x), atol=0.03, rtol=0.02)


def test_yarn_with_factor_one_is_plain():
    table, plain = RotaryTable(64, scaling=yarn(factor=1.0)), RotaryTable(64)
    torch.testing.assert_close(
        table.inverse_frequencies(), plain.inverse_frequencies(), rtol=1e-15, atol=0
    )
    assert table.mscale == 1.0


def test_yarn_limits():
    table, plain = RotaryTable(128, scaling=yarn()), RotaryTable(128)
    scaled, base = table.inverse_frequencies(), plain.inverse_frequencies()
    turns = 4096 * base / (2 * math.pi)
    fast, slow = turns > 40, turns < 0.8
    assert fast.any() and slow.any()
    assert torch.equal(scaled[fast], base[fast])
    torch.testing.assert_close(scaled[slow], base[slow] / 4, rtol=1e-12, atol=0)
    ratio = base / scaled
    assert (ratio.diff() >= 0).all()
    between = ratio[(turns < 20) & (turns > 2)]
    assert ((between > 1) & (between < 4)).all()


def test_yarn_temperature_scales_logits():
    table = RotaryTable(64, scaling=yarn(factor=8.0))
    scale = 0.1 * math.log(8.0) + 1.0
    x = torch.randn(1, 6, 1, 64)
    torch.testing.assert_close(rotate(table, x).norm(dim=-1), scale * x.norm(dim=-1))


def test_kind_none_ignores_the_other_settings():
    table = RotaryTable(16, scaling=yarn(kind="none"))
    assert torch.equal(table.inverse_frequencies(), RotaryTable(16).inverse_frequencies())
    assert table.mscale == 1.0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (yarn(kind="linear"), "none, yarn"),
        (yarn(factor=0.5), "factor"),
        (yarn(original_context=0), "original_context"),
    ],
)
def test_unusable_scaling_is_a_user_error(scaling, message):
    with pytest.raises(UserError, match=message):
        RotaryTable(16, scaling=scaling)


def test_odd_head_dim_is_a_user_error():
    with pytest.raises(UserError, match="even"):
        RotaryTable(7)

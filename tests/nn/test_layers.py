"""Layers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seriatim.nn.adaln import AdaLNBlock, AdaLNOutput
from seriatim.nn.attention import Attention, attend
from seriatim.nn.patch import patchify, unpatchify
from seriatim.nn.position import resized_positions, sincos_positions, sinusoid


@settings(deadline=None, max_examples=30)
@given(h=st.integers(1, 4), w=st.integers(1, 4), p=st.integers(1, 4), c=st.sampled_from([1, 3]))
def test_patchify_is_inverted_exactly(h: int, w: int, p: int, c: int) -> None:
    images = torch.arange(2 * c * h * p * w * p, dtype=torch.float32).view(2, c, h * p, w * p)
    tokens = patchify(images, p)
    assert tokens.shape == (2, h * w, c * p * p)
    assert torch.equal(unpatchify(tokens, p, h, w), images)


def test_patchify_order() -> None:
    """Tokens in raster order; inside a token channel, row, column (mar.md section 1)."""
    images = torch.zeros(1, 2, 4, 6)
    images[0, 1, 3, 2] = 1.0  # channel 1, patch row 1, patch column 1, inner row 1, inner column 0
    token, feature = patchify(images, 2)[0].nonzero()[0].tolist()
    assert (token, feature) == (1 * 3 + 1, 1 * 4 + 1 * 2 + 0)


@pytest.mark.parametrize("length", [5, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_fused_kernel(length: int, masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, length, 8)
    mask = (torch.rand(2, 1, 1, length) > 0.3) if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(attend(q, k, v, mask), expected, atol=1e-5)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.allclose(half.float(), expected, atol=5e-2)


def test_attention_ignores_masked_positions() -> None:
    attention = Attention(16, 4)
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    out = attention(x, mask)
    assert torch.allclose(out[1, :3], attention(x[1:, :3])[0], atol=1e-6)
    changed = x.clone()
    changed[1, 3:] = 100.0
    assert torch.equal(attention(changed, mask)[1, :3], out[1, :3])


def test_dropout_is_for_training_only() -> None:
    attention = Attention(16, 4, dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_adaln_formulas() -> None:
    x, condition = torch.randn(5, 8), torch.randn(5, 8)
    block, output = AdaLNBlock(8), AdaLNOutput(8, 3)
    shift, scale, gate = block.modulation(condition).chunk(3, dim=-1)
    normed = F.layer_norm(x, (8,), eps=1e-6) * block.norm.weight + block.norm.bias
    h = block.fc2(F.silu(block.fc1(normed * (1 + scale) + shift)))
    assert torch.allclose(block(x, condition), x + gate * h, atol=1e-6)
    shift, scale = output.modulation(condition).chunk(2, dim=-1)
    expected = output.linear(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift)
    assert torch.allclose(output(x, condition), expected, atol=1e-6)
    assert torch.equal(block.modulated(x, *block.modulate(condition)), block(x, condition))
    assert torch.equal(output.modulated(x, *output.modulate(condition)), output(x, condition))
    assert not list(output.norm.parameters())


def test_sinusoid() -> None:
    out = sinusoid(torch.tensor([0, 7]), 8)
    assert torch.equal(out[0], torch.tensor([1.0] * 4 + [0.0] * 4)), "cosines first"
    angle = 7 * math.exp(-math.log(10000) * 2 / 4)
    assert out[1, 2] == pytest.approx(math.cos(angle)) and out[1, 6] == pytest.approx(math.sin(angle))


def test_positions_for_another_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([rows, columns, torch.full_like(rows, 3.0)], dim=-1).view(24, 3)
    learned = torch.cat([torch.full((2, 3), 7.0), grid])  # a buffer of two in front
    assert torch.equal(resized_positions(learned, (6, 4), (6, 4)), learned)
    larger = resized_positions(learned, (6, 4), (12, 8))
    assert larger.shape == (2 + 96, 3) and torch.equal(larger[:2], learned[:2])
    image = larger[2:].view(12, 8, 3)
    centres = (torch.arange(12.0) + 0.5) / 2 - 0.5  # where the larger grid's cells lie in the smaller's
    assert torch.allclose(image[4:8, 0, 0], centres[4:8], atol=1e-5), "a ramp stays a ramp, and rows stay rows"
    assert torch.allclose(image[0, 3:5, 1], centres[3:5], atol=0.05) and torch.allclose(
        image[..., 2], torch.tensor(3.0)
    )
    other = resized_positions(learned, (6, 4), (3, 8))
    assert other.shape == (2 + 24, 3) and other[2:].view(3, 8, 3)[1, 4, 0] == pytest.approx(2.5)


def test_sincos_positions() -> None:
    table = sincos_positions((3, 5), 16)
    assert table.shape == (15, 16) and table.abs().max() <= 1
    assert len({tuple(row.tolist()) for row in table}) == 15, "every place is told from every other"
    near, far = (table[0] - table[1]).norm(), (table[0] - table[4]).norm()
    assert near < far and torch.equal(table[0, :8], table[4, :8]), "a row's first half is the row's alone"
    assert sincos_positions((2, 2), 6).shape == (4, 6)

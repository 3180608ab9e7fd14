"""Attention over tiles equals its definition equals reading everything and attending, for every codec and mask."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from kvsink.kernels import attend, read
from kvsink.kernels.attend import attend_ref
from tests.close import FUSED_FLOAT32
from tests.states import CODECS, filled

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in CODECS]
MASKS = ("none", "bool", "additive", "per-head")
SCALE = 0.25


def make_mask(kind: str, batch: int, heads: int, first: int, s: int, slots: int) -> Tensor | None:
    """Causal, with the first three slots of row 1 hidden as left padding."""
    if kind == "none":
        return None
    seen = torch.arange(slots)[None] <= first + torch.arange(s)[:, None]
    seen = seen.expand(batch, 1, s, slots).clone()
    if batch > 1:
        seen[1, :, :, :3] = False
    if kind == "bool":
        return seen
    bias = torch.zeros(batch, 1, s, slots).masked_fill(~seen, torch.finfo(torch.float32).min)
    if kind == "per-head":
        slopes = torch.linspace(0, 1, heads)[None, :, None, None]
        bias = bias + slopes * torch.arange(slots)
    return bias


def attended(full_k: Tensor, full_v: Tensor, q: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """Softmax attention of torch over everything that was read."""
    s, slots = q.shape[2], full_k.shape[2]
    seen = torch.arange(slots)[None] <= first + torch.arange(s)[:, None]
    bias = torch.zeros(s, slots).masked_fill(~seen, float("-inf"))
    if mask is not None:
        bias = bias + (torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask)
    return torch.nn.functional.scaled_dot_product_attention(
        q, full_k, full_v, attn_mask=bias.expand(q.shape[0], -1, -1, -1) if bias.dim() == 4 else bias, scale=SCALE, enable_gqa=True
    )


@pytest.mark.parametrize("tile", [5, 512])
@pytest.mark.parametrize("last", [1, 7])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("method", "options"), CODECS, ids=IDS)
def test_tiles_equal_the_definition_equal_read(
    monkeypatch: pytest.MonkeyPatch, method: str, options: tuple, kind: str, last: int, tile: int
) -> None:
    monkeypatch.setattr(sys.modules["kvsink.kernels.attend"], "TILE", tile)  # the attribute of that name is the op
    for strict in (False, True):
        layer, k, v = filled(method, options, batch=2, lengths=(11, last), strict=strict)
        new_k, new_v = k[:, :, -last:], v[:, :, -last:]
        q = torch.randn(2, 4, last, k.shape[3], generator=torch.Generator().manual_seed(9))
        mask = make_mask(kind, 2, 4, 11, last, layer.max_length)
        held = layer.state(), layer.params
        tiles = attend(q, new_k, new_v, *held, mask, SCALE, kind == "none", layer.codec_text)
        ref = attend_ref(q, new_k, new_v, *held, mask, SCALE, kind == "none", layer.codec_text)
        plain = attended(*read(new_k, new_v, *held, layer.codec_text), q, mask, 11)
        bound = FUSED_FLOAT32 * float(v.abs().max())
        assert tiles.shape == q.shape and tiles.dtype == q.dtype
        assert (tiles - ref).abs().max() <= bound
        assert (tiles - plain).abs().max() <= bound


def test_the_mask_is_obeyed() -> None:
    """What is hidden has no weight: rows of padding may hold anything."""
    for kind in ("bool", "additive"):
        outs = []
        for planted in (0.0, 1e4):
            layer, k, v = filled("rtn", (), batch=2, lengths=(11, 3))
            layer.v_scale[1, :, :3] += planted
            q = torch.randn(2, 4, 3, k.shape[3], generator=torch.Generator().manual_seed(9))
            mask = make_mask(kind, 2, 4, 11, 3, layer.max_length)
            arguments = (k[:, :, -3:], v[:, :, -3:], layer.state(), layer.params)
            outs.append(attend(q, *arguments, mask, SCALE, False, layer.codec_text))
        assert torch.equal(outs[0], outs[1])


def test_a_mask_that_is_not_causal_sees_later_new_rows() -> None:
    layer, k, v = filled("rtn", (), batch=1, lengths=(11, 3))
    q = torch.randn(1, 4, 3, k.shape[3], generator=torch.Generator().manual_seed(9))
    arguments = (q, k[:, :, -3:], v[:, :, -3:], layer.state(), layer.params)
    everything = torch.ones(1, 1, 3, layer.max_length, dtype=torch.bool)
    both = [attend(*arguments, everything, SCALE, causal, layer.codec_text) for causal in (False, True)]
    refs = [attend_ref(*arguments, everything, SCALE, causal, layer.codec_text) for causal in (False, True)]
    for out, ref in zip(both, refs, strict=True):
        assert (out - ref).abs().max() <= FUSED_FLOAT32 * float(v.abs().max())
    assert (both[0][:, :, -1] - both[1][:, :, -1]).abs().max() <= FUSED_FLOAT32  # the last row sees the same either way
    assert (both[0][:, :, 0] - both[1][:, :, 0]).abs().max() > 0.01
    k_full, v_full = read(k[:, :, -3:], v[:, :, -3:], *arguments[3:], layer.codec_text)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k_full[:, :, :14], v_full[:, :, :14], scale=SCALE, enable_gqa=True)
    assert (both[0] - plain).abs().max() <= FUSED_FLOAT32 * float(v.abs().max())


def test_a_query_that_may_see_nothing_gets_zeros() -> None:
    layer, k, v = filled("rtn", (), batch=1, lengths=(4, 2))
    q = torch.randn(1, 4, 2, k.shape[3])
    nothing = torch.zeros(1, 1, 2, layer.max_length, dtype=torch.bool)
    arguments = (q, k[:, :, -2:], v[:, :, -2:], layer.state(), layer.params, nothing, SCALE, False, layer.codec_text)
    assert (attend(*arguments) == 0).all() and (attend_ref(*arguments) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_queries_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    layer, k, v = filled("klt:best", (), batch=1, lengths=(11, 3))
    q = torch.randn(1, 4, 3, k.shape[3], generator=torch.Generator().manual_seed(9)).to(dtype)
    arguments = (k[:, :, -3:].to(dtype), v[:, :, -3:].to(dtype), layer.state(), layer.params, None, SCALE, True)
    out = attend(q, *arguments, layer.codec_text)
    assert out.dtype == dtype
    wide = attend(q.float(), *arguments, layer.codec_text)
    assert (out.float() - wide).abs().max() <= float(wide.abs().max()) * torch.finfo(dtype).eps

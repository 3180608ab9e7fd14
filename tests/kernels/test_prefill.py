"""Attention of several new rows over a packed past, piece by piece, against attention over all of it at once in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvsink.kernels.prefill import attend_chunk, pieces

B, HEADS, KV_HEADS, DIM, FIRST, ROWS = 2, 4, 2, 16, 2100, 3  # more slots than one piece has at least


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_merge_into_the_whole(strict: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsink.kernels.prefill._DECODED_BYTES", 1)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, n, DIM, generator=g) for h, n in ((HEADS, ROWS), (KV_HEADS, FIRST), (KV_HEADS, FIRST)))
    new = [torch.randn(B, KV_HEADS, ROWS, DIM, generator=g) for _ in range(2)]
    full = [torch.cat(pair, 2) for pair in zip((k, v), new, strict=True)]
    seen = torch.ones(B, 1, ROWS, FIRST + ROWS, dtype=torch.bool).tril(FIRST)
    if masked:
        seen[1, :, :, 40:1500] = False
    asked: list[tuple[int, int]] = []

    def past(start: int, end: int) -> tuple[Tensor, Tensor]:
        asked.append((start, end))
        return full[0][:, :, start:end], full[1][:, :, start:end]

    got = attend_chunk(past, q, *new, FIRST, seen if masked else None, 0.2, not masked, strict)
    wanted = F.scaled_dot_product_attention(q.double(), *(x.double() for x in full), attn_mask=seen, scale=0.2, enable_gqa=True)
    assert (got - wanted).abs().max() <= 1e-5
    assert len(asked) == 3 and asked[-1][1] == FIRST + ROWS * strict


def test_the_attention_of_a_piece_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSINK_PIECES", raising=False)
    assert pieces() == "flash"
    monkeypatch.setenv("KVSINK_PIECES", "cudnn")
    assert pieces() == "cudnn"
    monkeypatch.setenv("KVSINK_PIECES", "cudn")
    with pytest.raises(ValueError, match="KVSINK_PIECES is 'cudn'; set flash or cudnn"):
        pieces()

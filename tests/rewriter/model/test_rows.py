"""What a call says of its new rows: padding by every kind of mask, and the rows of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from kvsink.model.rows import real_rows, visual_rows, visual_tokens
from tests.models import build
from tests.rewriter.cache.test_padding import in_four
from tests.rewriter.methods.test_akvq_vl import IMAGE, llava


class Held:
    """A cache of which nothing is known but the rows it holds."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def first_slot(self, moved: bool = False) -> int:
        return self.rows


def test_real_rows_by_every_kind_of_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    wanted = mask.bool()
    assert torch.equal(real_rows(mask, 2, 5, Held(0)), wanted)
    assert torch.equal(real_rows(F.pad(mask, (3, 0), value=1), 2, 5, Held(3)), wanted)
    assert torch.equal(real_rows(F.pad(mask, (3, 4), value=1), 2, 5, Held(3)), wanted)  # more columns than tokens
    for kind in ("bool", "additive", "unmasked"):
        assert torch.equal(real_rows(in_four(mask, 5, kind), 2, 5, Held(0)), wanted), kind
        assert torch.equal(real_rows({"sliding_attention": None, "full_attention": in_four(mask, 5, kind)}, 2, 5, Held(0)), wanted)
        later = F.pad(mask, (3, 0), value=1)
        assert torch.equal(real_rows(in_four(later, 5, kind), 2, 5, Held(3)), wanted), kind
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert real_rows(causal.tril(), 2, 5, Held(0)).all() and real_rows(causal, 2, 5, Held(0)).all()
    seen = in_four(mask, 5, "bool")
    block = create_block_mask(lambda b, h, q, kv: seen[b, 0, q, kv], 2, None, 5, 5, device="cpu")
    assert torch.equal(real_rows(block, 2, 5, Held(0)), wanted)
    assert real_rows(None, 2, 5, Held(0)) is None and real_rows({"full_attention": None}, 2, 5, Held(0)) is None


def test_masks_and_tokens_are_read_from_the_config() -> None:
    assert visual_tokens(llava().config) == (IMAGE,) and visual_tokens(build("llama").config) == ()
    assert visual_rows(torch.tensor([[1, 9, 8]]), (9, 8)).tolist() == [[False, True, True]]
    assert not visual_rows(torch.tensor([[1, 9]]), ()).any()

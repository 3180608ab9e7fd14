"""A layer's pages, driven as an engine drives them, against transformers' model with its own packed cache under the same rule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import UnsupportedError
from kvsink.export.vllm.page import LayerPages, Step, first_head
from kvsink.export.vllm.sinks import Sinks
from kvsink.kernels.pages import PAGE, Batch
from kvsink.model.runtime import runtime_of
from tests.close import FUSED_FLOAT32
from tests.export.vllm.plans import planted, prompt

HEADS, TOKENS = 2, 512


class Engine:
    """A model's own blocks over pages: sequences in chunks, side by side in one step, in whatever pages are free."""

    def __init__(self, model: Any, pages: int = 6, places: int = 2, heads: tuple[int, int] = (0, HEADS)) -> None:
        self.model, self.runtime = model, runtime_of(model)
        self.sinks = Sinks(self.runtime.stages, TOKENS)
        for name, module in model.named_modules():
            if name.endswith("down_proj"):
                self.sinks.watch(name, module)
        self.layers = [
            LayerPages(self.runtime, i, *heads, TOKENS, places, torch.float32, self.sinks) for i in range(len(self.runtime.plans))
        ]
        shapes = [(pages, heads[1], PAGE, layer.format.slot_bytes) for layer in self.layers]
        self.caches = [torch.randint(0, 255, shape, dtype=torch.uint8) for shape in shapes]
        AttentionInterface.register("kvsink_pages", self.attend)
        AttentionMaskInterface.register("kvsink_pages", lambda *args, **kwargs: None)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> tuple[Tensor, None]:
        out = torch.empty_like(q[0].transpose(0, 1))
        rows = (t[0].transpose(0, 1) for t in (q, k, v))
        self.layers[module.layer_idx].step(*rows, self.caches[module.layer_idx], self.step, scaling, out)
        return out[None], None

    def run(self, chunks: list[tuple[Tensor, int, list[int]]]) -> list[Tensor]:
        """Logits of chunks of sequences: ids [1, n], tokens before them, pages of the sequence."""
        starts = [0, *torch.tensor([ids.shape[1] for ids, _, _ in chunks]).cumsum(0).tolist()]
        lengths = [before + ids.shape[1] for ids, before, _ in chunks]
        table = torch.tensor([pages + [0] * (4 - len(pages)) for *_, pages in chunks], dtype=torch.int32)
        batch = Batch(starts, lengths, table)
        at = batch.positions
        of = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(starts))])
        self.step = Step(table[of, at // PAGE].long() * PAGE + at % PAGE, batch)
        before, self.model.config._attn_implementation = self.model.config._attn_implementation, "kvsink_pages"
        try:
            with torch.no_grad():
                ids = torch.cat([ids for ids, _, _ in chunks], 1)
                logits = self.model(input_ids=ids, position_ids=at[None], use_cache=False).logits[0]
        finally:
            self.model.config._attn_implementation = before
        return [logits[a:b] for a, b in pairwise(starts)]


def alone(model: Any, ids: Tensor, *ends: int) -> Tensor:
    """Logits of one sequence through transformers' model with its packed cache, new rows read from their codes."""
    cache = KVSinkCache.for_model(model, 1, max_length=ids.shape[1], strict=True)
    with torch.no_grad():
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits[0] for a, b in pairwise((0, *ends))])


@pytest.mark.parametrize("method", ["klt", "klt:best", "rtn", "static"])
def test_two_sequences_side_by_side_equal_each_alone_under_transformers(method: str) -> None:
    """Chunks that begin inside pages, a decode step beside a prompt, pages in any order, rows of sinks in their places."""
    model = planted(method)
    engine, one, two = Engine(model), prompt(9, 130, length=200), prompt(31, length=70, seed=6)
    steps = [
        [(one[:, :50], 0, [4, 1]), (two[:, :69], 0, [2])],
        [(one[:, 50:180], 50, [4, 1]), (two[:, 69:], 69, [2])],
        [(one[:, 180:181], 180, [4, 1])],
        [(one[:, 181:], 181, [4, 1])],
    ]
    got: list[list[Tensor]] = [[], []]
    for step in steps:
        for i, logits in enumerate(engine.run(step)):
            got[i].append(logits)
    named = [layer.pages(cache).named for layer, cache in zip(engine.layers, engine.caches, strict=True)]
    assert named[2][4].tolist() == [[1, 10]] * HEADS and named[2][1].tolist() == [[3, 0]] * HEADS
    assert named[1][4].tolist() == [[1, 0]] * HEADS  # before the block that writes
    for logits, wanted in (
        (torch.cat(got[0]), alone(model, one, 50, 180, 181, 200)),
        (torch.cat(got[1]), alone(model, two, 69, 70)),
    ):
        assert (logits - wanted).abs().max() <= 20 * FUSED_FLOAT32 * wanted.abs().max()  # four blocks, one code that differs shows


def test_a_prompt_whose_beginning_is_held_gives_what_it_gives_without() -> None:
    """Pages of another sequence with the same first 128 tokens, bit by bit."""
    model, ids = planted(), prompt(9, 100, 140, length=170)
    other = ids.clone()
    other[0, PAGE:] = 50
    engine = Engine(model)
    (cold,) = engine.run([(ids, 0, [0, 1])])
    engine.run([(other, 0, [3, 2])])
    (warm,) = engine.run([(ids[:, PAGE:], PAGE, [3, 5])])
    assert (warm - cold[PAGE:]).abs().max() <= FUSED_FLOAT32 * cold.abs().max()
    held = [
        [layer.pages(cache).k_codes[page] for page in (0, 3)] for layer, cache in zip(engine.layers, engine.caches, strict=True)
    ]
    assert all(torch.equal(*pair) for pair in held)


def test_a_rank_holds_the_tables_of_its_heads() -> None:
    model = planted()
    whole, second = (
        LayerPages(runtime_of(model), 2, first, n, TOKENS, 2, torch.float32, Sinks((), 1)) for first, n in ((0, 2), (1, 1))
    )
    for name, mine, all_ in zip(whole.codec.param_names(), second.params, whole.params, strict=True):
        cut = name.startswith(("k_", "v_")) and name not in ("k_levels", "v_levels")
        assert torch.equal(mine.nan_to_num(7), (all_[1:] if cut else all_).nan_to_num(7)), name
    assert [first_head(8, 2, r, 4) for r in range(4)] == [0, 2, 4, 6] and [first_head(2, 1, r, 4) for r in range(4)] == [0, 0, 1, 1]
    with pytest.raises(UnsupportedError, match="2 ranks of 1 key-value heads do not hold 3"):
        first_head(3, 1, 0, 2)

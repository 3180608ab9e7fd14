"""transformers' attention asks a layer in tiles itself: eager prefill, chunks and decode, with the CUDA kernels emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.kernels.cuda import launch
from kvsink.model.attention import causal_mask, install_attention, is_plain_causal
from tests.kernels.cuda.emulated import Emulated, act_as_on_a_gpu
from tests.kernels.cuda.test_tiles import model_of
from tests.walks import files_from, rows_given_to_the_table


def run(model: Any, cache: KVSinkCache, ids: torch.Tensor, mask: torch.Tensor | None, pieces: tuple[int, ...]) -> torch.Tensor:
    out, at = [], 0
    with torch.no_grad():
        for n in pieces:
            seen = None if mask is None else mask[:, : at + n]
            out.append(model(ids[:, at : at + n], attention_mask=seen, past_key_values=cache).logits)
            at += n
    return torch.cat(out, 1)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPU layers in tiles act as on a GPU; the list counts the rows of every question they are asked."""
    asked: list[int] = []

    def library(codec: Any, repeats: int, rotary: int, place: torch.device) -> Any:
        return Emulated(launch.variant_of(codec, repeats or 1, rotary), 2)

    act_as_on_a_gpu(monkeypatch, library, lambda call: asked.append(call.k.shape[2]))
    monkeypatch.setattr(KVSinkLayer, "_defers", lambda self, frame: self.codec.tiles and frame.cos is not None)
    monkeypatch.setattr(KVSinkCache, "attends_itself", lambda self: self.packed_layers()[0].codec.tiles)
    return asked


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_over_layers_that_attend_themselves_gives_the_logits_of_reading_back(padded: bool, emulated: list[int]) -> None:
    model = model_of(3).half()  # 4 bits: what is left between the two ways is 16-bit rounding
    try:
        ids = torch.randint(3, 97, (2, 52), generator=torch.Generator().manual_seed(8))
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        pieces = (30, 20, 1, 1)
        tiled = KVSinkCache.for_model(model, 2, max_length=128, tiles=True)
        got = run(model, tiled, ids, mask if padded else None, pieces)
        assert emulated == [20, 20, 1, 1, 1, 1]  # the first rows are attended to as they came
        assert int(tiled.get_seq_length()) == 52
        plain = KVSinkCache.for_model(model, 2, max_length=128, tiles=False)
        wanted = run(model, plain, ids, mask if padded else None, pieces)
        visible = mask.bool() if padded else torch.ones_like(mask).bool()
        error = (got - wanted)[visible].float().norm() / wanted[visible].float().norm()
        assert error <= 3e-2  # codes that turn at a tie, fp16 angles of the model on the other side
    finally:
        model.float()


def test_a_new_key_comes_to_its_bytes_on_a_gpu_through_four_files(emulated: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """layer.py, which keeps it until attention asks; launch.py; module.py, for which the emulation stands; rows.cuh."""
    model, ways, plain = model_of(3).half(), list[list[str]](), Emulated.append
    try:
        held = KVSinkCache.for_model(model, 1, max_length=128, tiles=True)
        run(model, held, torch.arange(3, 12)[None], None, (9,))
        monkeypatch.setattr(Emulated, "append", lambda lib, a: ways.append(files_from("rewriter/cache/layer.py")) or plain(lib, a))
        assert rows_given_to_the_table(lambda: run(model, held, torch.tensor([[5]]), None, (1,))) == []
        assert ways == [["rewriter/cache/layer.py", "kernels/cuda/launch.py"]] * len(held.packed_layers())
    finally:
        model.float()


def test_keys_of_other_caches_pass_through() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    install_attention()
    held = ALL_ATTENTION_FUNCTIONS["sdpa"]
    install_attention()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is held  # put in once
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    out, _ = held(torch.nn.Module(), q, k, k, None, scaling=0.3, is_causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.3)
    assert torch.equal(out.transpose(1, 2), wanted)


def test_a_causal_mask_takes_no_memory_and_is_known_again() -> None:
    mask = causal_mask(1 << 14, 1 << 20, torch.device("cpu"))
    assert mask.shape == (1, 1, 1 << 14, 1 << 20) and mask.untyped_storage().nbytes() == 1
    assert is_plain_causal(mask) and is_plain_causal(None) and not is_plain_causal(torch.ones(1, 1, 2, 2))

"""The CUDA kernels on a GPU, on every kind of layer they serve: as test_tile_shapes.py, against the definition run on the CPU.

`KVSINK_CUDA_TARGET=compute_80 KVSINK_CUDA_SHARED=101376` runs the code of smaller cards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.codecs import SHARED_NAMES
from kvsink.kernels import layout
from kvsink.kernels.append import append_ref
from kvsink.kernels.cuda import launch, module, variants
from tests.states import coding

from .test_tile_shapes import HELD, HOPPER, KINDS, KV_HEADS, NAMES, SIXTEEN, SLOTS, TWELVE, defined, fill, layer_of, rows, scores_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8,
        reason="needs an NVIDIA GPU of capability 8.0 or newer",
    ),
]
TRIED = [i for i, kind in enumerate(KINDS) if kind.card in (HOPPER, TWELVE, SIXTEEN) and i not in (1, 4, 9, 15)]
EVERY = [pytest.param(i, id=NAMES[i]) for i in TRIED]


def kernels(index: int, layer: Any, card: variants.Card | None = None) -> module.Cubin:
    device = torch.device("cuda", 0)
    variant = launch.variant_of(layer.codec, KINDS[index].repeats, layer.codec.rotary(layer.params))
    card = card or (KINDS[index].card if KINDS[index].card.shape else None)
    try:
        return module.library(variant, device) if card is None else module.Cubin(variant, device, card)
    except module.NativeError as error:
        pytest.skip(str(error))  # short of shared memory, where a smaller card is asked for


@pytest.mark.parametrize("index", EVERY)
def test_attention_equals_the_definition(index: int) -> None:
    kind = KINDS[index]
    for batch, length, padded, dtype in ((2, 383, True, torch.float16), (1, 300, False, torch.bfloat16)):
        layer = layer_of(index, batch)
        shift = torch.arange(1, batch + 1)[:, None] * 11 if padded else torch.zeros(batch, 1, dtype=torch.int64)
        fill(layer, index, batch, length, shift)
        q = rows(batch, 1, 5, KV_HEADS * kind.repeats, kind.dim, dtype) * 0.5
        k, v = (rows(batch, 1, s, KV_HEADS, kind.dim, dtype) for s in (6, 7))
        for name in HELD:
            setattr(layer, name, getattr(layer, name).to(dtype))
        slots = torch.arange(SLOTS)
        mask = ((slots >= shift) & (slots <= length))[:, None, None] if padded else None
        lib, gpu = kernels(index, layer), [t.cuda() for t in layer.state()]
        p = dict(zip(layer.codec.param_names(), (t.cuda() for t in layer.params), strict=True))
        for _ in range(2):  # a later launch finds the scratch words as the first did
            got = launch.attend_one(
                lib,
                layer.codec,
                *(x.cuda() for x in (q, k, v)),
                layer.codec.named(gpu),
                p,
                None if mask is None else mask.cuda(),
                0.09,
            )
        assert got is not None and lib.scratch.clean()
        wanted = defined(layer, length, (q, k, v), mask)
        assert (got.float().cpu() - wanted).norm() <= (2e-3 if dtype == torch.float16 else 6e-3) * wanted.norm()


@pytest.mark.parametrize("index", EVERY)
def test_new_rows_are_stored_as_the_definition_stores_them(index: int) -> None:
    kind = KINDS[index]
    for batch, length, new in ((2, 130, 1), (1, 127, 1), (2, 40, 9)):
        layer, other = layer_of(index, batch), layer_of(index, batch)
        for x in (layer, other):
            fill(x, index, batch, length, torch.arange(batch)[:, None] * 5)
        k, v = (rows(batch, new, s, KV_HEADS, kind.dim, torch.float32) for s in (6, 7))
        positions, none = torch.arange(length, length + new)[None] - torch.arange(batch)[:, None] * 5, torch.empty(1, new, 0)
        scores = scores_of(layer, batch, new, 3, better=0.5)
        append_ref(k, v, positions, none, none, scores, layer.state(), layer.params, layer.codec_text, True)
        state = [t.cuda() for t in other.state()]
        named = other.codec.named(state)
        half = [named[n].half() if n in HELD else named[n] for n in named]
        gpu = [t.cuda() for t in (k.half(), v.half(), positions, none, none)]
        lib = kernels(index, other)
        given = [t.cuda() for t in scores], half, [t.cuda() for t in other.params], other.codec, True
        launch.append(coding(*gpu, *given), lib)
        for name, mine in other.codec.named(half).items():
            wanted = getattr(layer.shared if name in SHARED_NAMES else layer, name)
            if name in ("k_codes", "k_scale", "v_codes", "v_scale"):
                assert mine.numel() == 0 or (mine.cpu() == wanted).float().mean() >= 0.998, name
                if name.endswith("codes"):  # of the new rows alone, of which a tie may turn a walk
                    side = other.codec.key if name[0] == "k" else other.codec.value
                    a, b = (layout.fetch(x, side.widths, name[0], side.kind, length, new) for x in (mine.cpu(), wanted))
                    assert (a == b).float().mean() >= 0.9, name
            elif name in ("exact_slot", "exact_score"):
                assert torch.equal(mine.cpu().sort(1)[0], wanted.sort(1)[0]), name
            elif name not in ("exact_k", "exact_v"):
                assert torch.equal(mine.float().cpu(), wanted.float()), name


def test_the_code_of_a_smaller_card_reads_and_writes_the_same_bytes() -> None:
    index, layer = 0, layer_of(0, 2)
    fill(layer, index, 2, 130, torch.zeros(2, 1, dtype=torch.int64))
    k, v = (rows(2, 1, s, KV_HEADS, KINDS[index].dim).cuda() for s in (6, 7))
    q, found = rows(2, 1, 5, KV_HEADS * KINDS[index].repeats, KINDS[index].dim).cuda(), []
    params = [t.cuda() for t in layer.params]
    p = dict(zip(layer.codec.param_names(), params, strict=True))
    for card in (None, variants.Card(80, 101376, portable=True)):
        lib, state = kernels(index, layer, card), [t.cuda() for t in layer.state()]
        state = [t.half() if n in HELD else t for n, t in layer.codec.named(state).items()]
        out = launch.attend_one(lib, layer.codec, q, k, v, layer.codec.named(state), p, None, 0.09)
        scores = [t.cuda() for t in scores_of(layer, 2, 1, 3, better=9.0)]
        none = torch.empty(1, 1, 0, device="cuda")
        positions = torch.full((2, 1), 130).cuda()
        launch.append(coding(k, v, positions, none, none, scores, state, params, layer.codec, True), lib)
        found.append((out, state))
    assert (found[0][0].float() - found[1][0].float()).norm() <= 1e-3 * found[0][0].float().norm()
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)

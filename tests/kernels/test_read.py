"""Reading back: exact, recent and new rows as they came, the rest as its codes say."""

from __future__ import annotations

import pytest
import torch

from kvsink.kernels import read
from kvsink.kernels.read import put_rows, read_ref
from tests.states import CODECS, filled

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in CODECS]


def test_rows_are_laid_over_their_slots() -> None:
    full, rows = torch.zeros(2, 1, 6, 3), torch.arange(1.0, 5).reshape(1, 1, 4, 1).expand(2, 1, 4, 3)
    slot = torch.tensor([[5, 0, 2, -1], [-1, -1, -1, 3]])
    out = put_rows(full, rows, slot)
    assert out is full
    assert out[0, 0, :, 0].tolist() == [2, 0, 3, 0, 0, 1]
    assert out[1, 0, :, 0].tolist() == [0, 0, 0, 4, 0, 0]


def test_empty_places_do_not_disturb_slot_0() -> None:
    full = torch.full((1, 1, 4, 2), 7.0)
    put_rows(full, torch.ones(1, 1, 3, 2), torch.tensor([[-1, -4, 2]]))
    assert full[0, 0, :, 0].tolist() == [7, 7, 1, 7]
    put_rows(full, torch.arange(6.0).reshape(1, 1, 3, 2), torch.tensor([[-1, 0, -1]]))
    assert full[0, 0, :, 0].tolist() == [2, 7, 1, 7]
    assert put_rows(full, torch.empty(1, 1, 0, 2), torch.empty(1, 0)) is full


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("method", "options"), CODECS, ids=IDS)
def test_every_slot_is_exact_or_decoded(method: str, options: tuple, strict: bool) -> None:
    layer, k, v = filled(method, options, batch=2, lengths=(11, 1, 7), strict=strict)
    total, new = k.shape[2], 7
    c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
    full_k, full_v = read(k[:, :, -new:], v[:, :, -new:], layer.state(), layer.params, layer.codec_text)
    assert full_k.dtype == k.dtype and full_k.shape == (*k.shape[:2], layer.max_length, k.shape[3])
    assert torch.isfinite(full_k).all() and torch.isfinite(full_v).all()
    st = c.named(layer.state())
    decoded_k, decoded_v = c.read_keys(st, p, 0, layer.max_length), c.read_values(st, p, 0, layer.max_length)
    for side, full, rows, decoded in ((c.key, full_k, k, decoded_k), (c.value, full_v, v, decoded_v)):
        newest = max(c.window, side.newest, total % side.flush if side.flush else 0)
        for row in range(2):
            for slot in range(total):
                exact = slot in layer.exact_slot[row].tolist() or slot >= total - newest
                exact = exact or (not strict and slot >= total - new)
                assert torch.equal(full[row, :, slot], (rows if exact else decoded)[row, :, slot])
    if c.key.packed:
        assert not torch.equal(decoded_k[:, :, :total], k)


def test_reading_leaves_the_state_alone() -> None:
    for method, options in CODECS:
        layer, k, v = filled(method, options)
        before = [t.clone() for t in layer.state()]
        for out in read_ref(k[:, :, -7:], v[:, :, -7:], layer.state(), layer.params, layer.codec_text):
            out.fill_(99.0)  # neither result is a view of the state, also where rows stay in 16 bit
        assert all(torch.equal(t, b) for t, b in zip(layer.state(), before, strict=True))

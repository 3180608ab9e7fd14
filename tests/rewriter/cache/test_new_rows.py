"""What new rows are to a layer: whether they fit, where they stand, and which of them stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import KvsinkError
from kvsink.model.frame import Frame
from tests.close import largest_difference
from tests.graphs import rewritten
from tests.models import HEAD_DIM, KV_HEADS, tokens
from tests.rewriter.cache.feeding import feed


def test_a_full_cache_says_so(model: Any) -> None:
    cache = KVSinkCache.for_model(model, 1, max_length=8)
    feed(model, cache, tokens(1, 7))
    before = [t.clone() for t in cache.tensors().values()]
    with pytest.raises(KvsinkError, match="layer 0: 2 rows do not fit behind 7 of max_length=8"):
        feed(model, cache, tokens(1, 2))
    assert largest_difference(before, list(cache.tensors().values())) == 0
    feed(model, cache, tokens(1, 1))
    with pytest.raises(KvsinkError, match="max_length=0 is not positive"):
        KVSinkCache.for_model(model, 1, max_length=0)
    with pytest.raises(KvsinkError, match="batch_size=0 is not positive"):
        KVSinkCache.for_model(model, 0, max_length=8)


def test_positions_far_beyond_the_cache_are_undone() -> None:
    """A prompt may start anywhere; the table of block starts grows to reach it."""
    model = rewritten("llama", "sdpa", "klt", key_bits=8, value_bits=8, protect="none")
    plain = rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)
    ids, positions = tokens(1, 12), torch.arange(70_000, 70_012)[None]
    caches = [KVSinkCache.for_model(m, 1, max_length=32, strict=True) for m in (model, plain)]
    far = [feed(m, c, ids, position_ids=positions) for m, c in zip((model, plain), caches, strict=True)]
    assert largest_difference(*far) <= 0.05 * float(far[1].abs().max())  # 8 bits
    assert caches[0].shared.positions[0, :12].tolist() == positions[0].tolist()


def test_a_cache_fed_by_hand_is_refused_when_it_needs_hidden_states(massive: Any) -> None:
    cache = KVSinkCache.for_model(massive)
    rows = torch.zeros(1, KV_HEADS, 3, HEAD_DIM)
    with pytest.raises(KvsinkError, match="saw no hidden states"):
        cache.update(rows, rows, 0)


def test_massive_rows_are_those_of_the_largest_entries(massive: Any) -> None:
    inputs: dict[int, Tensor] = {}

    def note(i: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[i] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks = [b.register_forward_pre_hook(note(i), with_kwargs=True) for i, b in enumerate(massive.model.layers)]
    cache = KVSinkCache.for_model(massive)
    feed(massive, cache, tokens(1, 20, seed=6))
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(cache.packed_layers()):
        rows = inputs[i][0].abs().flatten().topk(3).indices // inputs[i].shape[-1]
        assert {s for s in layer.exact_slot[0].tolist() if s >= 0} == set(rows.tolist())


def test_angles_are_those_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache fed by hand with padding works out the angles of each row, not of the first for all."""
    model = rewritten("llama", "sdpa", "klt", key_bits=8, protect="none")
    cache = KVSinkCache.for_model(model, 2, strict=True)
    rows = torch.randn(2, KV_HEADS, 6, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(6), (torch.arange(6) - 3).clamp_min(0)])
    cache.frame = Frame(positions=positions, valid=torch.arange(6) >= torch.tensor([[0], [3]]))
    keys, _ = cache.update(rows, rows, 0)
    alone = KVSinkCache.for_model(model, 1, strict=True)
    alone.frame = Frame(positions=positions[1:])
    wanted, _ = alone.update(rows[1:], rows[1:], 0)
    assert torch.equal(keys[1:], wanted)

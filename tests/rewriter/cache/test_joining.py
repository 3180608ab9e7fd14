"""Sequences that join a running batch: what they then generate, and what cannot join."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvsink
from kvsink.errors import KvsinkError
from kvsink.tools.families import ids, rewritten
from tests.generation.test_generation import GREEDY, NEW, alone


@torch.no_grad()
def test_what_cannot_join_says_why_and_changes_nothing(klt: Any) -> None:
    def held(model: Any, length: int, **options: Any) -> Any:
        cache = kvsink.KVSinkCache.for_model(model, **options)
        model(input_ids=ids(1, length, length), past_key_values=cache, use_cache=True)
        return cache

    kivi = rewritten("llama", "kivi", key_bits=2, value_bits=2, protect="none")[0]
    anchored = rewritten("llama", "rtn", protect="anchors:10%")[0]
    sliding, windowed = rewritten("gemma3", "klt")[0], rewritten("llama", "rtn", window=6)[0]
    cropped = held(windowed, 30)
    cropped.crop(20)
    pairs = [
        (held(klt, 9), kvsink.KVSinkCache.for_model(klt), "an empty cache"),
        (held(klt, 9), held(klt, 9, max_length=32), "differ in codec, max_length"),
        (held(kivi, 40), held(kivi, 13), "128 tokens are coded or stored together"),
        (held(anchored, 40), held(anchored, 30), "anchors are a share of the length"),
        (held(sliding, 9), held(sliding, 9), "sliding-window layers"),
        (held(windowed, 20), cropped, "a crop has left one cache fewer recent rows"),
    ]
    for a, b, reason in pairs:
        before = {n: t.clone() for c in (a, b) for n, t in {f"{id(c)}.{n}": t for n, t in c.tensors().items()}.items()}
        with pytest.raises(KvsinkError, match=reason) as raised:
            a.batch_join(b)
        assert "\n" not in str(raised.value)
        after = {f"{id(c)}.{n}": t for c in (a, b) for n, t in c.tensors().items()}
        assert after.keys() == before.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize(("method", "options"), [("kivi", {"key_bits": 2, "value_bits": 2}), ("rtn", {"protect": "anchors:10%"})])
@torch.no_grad()
def test_rows_of_one_length_join_whatever_their_codec(method: str, options: dict[str, Any]) -> None:
    model = rewritten("llama", method, **{"protect": "none", **options})[0]
    rows, caches = ids(2, 140, 3), []
    for row in rows:
        caches.append(kvsink.KVSinkCache.for_model(model))
        model(input_ids=row[None, :-1], past_key_values=caches[-1], use_cache=True)
    wanted = [alone(model, row[-1:], cache=copy.deepcopy(cache)) for row, cache in zip(rows, caches, strict=True)]
    assert caches[0].batch_join(caches[1]) == (0, 0)
    out = model.generate(rows, past_key_values=caches[0], **GREEDY)
    assert torch.equal(out[:, -NEW:], torch.stack(wanted))

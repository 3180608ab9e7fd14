"""Storing and attending as one op, as a step on a GPU does it, leaves the graph of two ops nothing else to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.graph.targets import kind
from kvsink.passes import fuse
from tests.models import VOCAB, build

HELD, STEPS = 9, 3


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("method", ["klt", "cq", "rtn", "kivi"])
def test_one_op_gives_what_two_give(method: str, family: str, seen: list[fx.Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build(family)
    ids = torch.randint(3, VOCAB, (2, HELD + STEPS), generator=torch.Generator().manual_seed(1))
    kvsink.rewrite(model, method, calibration=torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(2)))
    found = []
    for one in (False, True):
        if one:
            monkeypatch.setattr(fuse, "as_one", lambda site, codec: True)
        torch._dynamo.reset()
        call = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}, fullgraph=True)
        cache, logits = KVSinkCache.for_model(model, 2, max_length=64), []
        with torch.no_grad():
            model(ids[:, :HELD], past_key_values=cache)
            for i in range(HELD, HELD + STEPS):
                logits.append(call(ids[:, i : i + 1], position_ids=torch.tensor([[i]]), past_key_values=cache).logits)
        ops = {kind(n) for n in seen[-1].nodes} & {"kvsink.append_", "kvsink.attend", "kvsink.append_attend_"}
        assert ops == ({"kvsink.append_attend_"} if one else {"kvsink.append_", "kvsink.attend"})
        found.append((logits, [t.clone() for layer in cache.packed_layers() for t in layer.state()]))
    for a, b in zip(*(logits for logits, _ in found), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # a mask that hides the future alone is left out
    assert all(torch.equal(a, b) for a, b in zip(*(state for _, state in found), strict=True))
    torch._dynamo.reset()

"""A compiled decode step under CUDA graphs for codes that are not in tiles: the numbers of the same step without graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import kvsink
from kvsink.cache.cache import KVSinkCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS, SLOTS = 6, 128


def rewritten(method: str, dim: int, options: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=dim,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.mul_(3.0).requires_grad_(False)
    model = model.to(torch.bfloat16).cuda()
    ids = torch.randint(3, 97, (8, 256), generator=torch.Generator().manual_seed(1)).cuda()
    kvsink.rewrite(model, method, calibration=ids, **options)
    return model


@pytest.mark.parametrize("dim", [128, 64])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("klt:codebooks", {}),
        ("klt:best", {"key_bits": 2, "value_bits": 4}),
        ("cq", {}),
        ("rtn", {"key_bits": 6, "value_bits": 6, "protect": "first:2"}),
        ("kivi", {}),
        ("rotatekv", {}),
        ("antkv", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())) or "default",
)
def test_a_graph_gives_the_numbers_of_the_step(method: str, options: dict[str, Any], dim: int) -> None:
    model = rewritten(method, dim, options)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(8)).cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused = torch.compile(model, backend="kvsink", fullgraph=True)
    graphs = torch.compile(model, backend="kvsink", mode="reduce-overhead", fullgraph=True)
    logits = []
    for call in (fused, graphs):
        cache, held = KVSinkCache.for_model(model, 2, SLOTS), []
        assert not any(layer.codec.tiles for layer in cache.packed_layers())
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for i in range(STEPS):
                visible = (torch.arange(SLOTS) <= 40 + i).cuda()[None, None, None].expand(2, -1, -1, -1)
                positions = torch.tensor([[40 + i]]).cuda()
                torch.compiler.cudagraph_mark_step_begin()
                step = call(ids[:, i : i + 1], attention_mask=visible, position_ids=positions, past_key_values=cache)
                held.append(step.logits.clone())
        logits.append(torch.cat(held, 1).float())
    assert logits[0].isfinite().all() and torch.equal(*logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one each: no recompilation per token
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    torch._dynamo.reset()

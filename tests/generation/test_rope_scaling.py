"""RoPE whose angles change with the length: generating across the length where they do is right, or declined in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import CompileConfig

import kvsink
from kvsink.errors import UnsupportedError
from kvsink.tools.families import ids

EDGE, PROMPT, NEW = 16, 13, 14  # the angles change between two generated tokens
SETTINGS: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
_SHAPE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": EDGE,
}


def build(kind: str) -> Any:
    """A float64 model whose RoPE changes behind EDGE tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "dynamic":
            rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
            model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**_SHAPE, max_position_embeddings=EDGE, rope_parameters=rope))
        else:
            config = hf.Phi3Config(
                **_SHAPE, max_position_embeddings=64, rope_parameters=_LONG, original_max_position_embeddings=EDGE
            )
            model = hf.Phi3ForCausalLM(config)
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.data.normal_(std=0.15)
    return model.eval().requires_grad_(False).double()


def rewritten(kind: str, bits: int) -> Any:
    model = build(kind)
    kvsink.rewrite(model, "rtn", key_bits=bits, value_bits=bits, protect="first:1", calibration=ids(8, 16, 1))
    return model


def by_hand(model: Any, kind: str, row: Tensor) -> Tensor:
    """One sequence, token by token, uncompiled; where longrope changes its angles all rows are stored anew, as in transformers."""
    cache, given, out = kvsink.KVSinkCache.for_model(model), row, row
    for _ in range(NEW):
        if kind == "longrope" and out.shape[1] == EDGE + 1:
            cache, given = kvsink.KVSinkCache.for_model(model), out
        given = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        out = torch.cat([out, given], 1)
    return out


def cache_of(out: Any) -> Any:
    return out["cache"] if "cache" in out else out["past_key_values"]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_at_16_bit_the_tokens_are_the_models_own(kind: str) -> None:
    row = ids(1, PROMPT, 3)
    out = rewritten(kind, 16).generate(row, **SETTINGS)
    assert isinstance(cache_of(out), kvsink.KVSinkCache) and int(cache_of(out).get_seq_length()) == PROMPT + NEW - 1
    assert torch.equal(out.sequences, build(kind).generate(row, **SETTINGS).sequences)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_at_4_bit_the_tokens_are_those_by_hand(kind: str) -> None:
    """Also that the packed cache is the one that goes on: transformers' longrope throws its cache away at the edge."""
    row, model = ids(1, PROMPT, 3), rewritten(kind, 4)
    wanted = by_hand(model, kind, row)
    assert not torch.equal(wanted, build(kind).generate(row, **SETTINGS).sequences)  # 4 bits are seen in the tokens
    for asked in (None, "static"):
        out = model.generate(row, cache_implementation=asked, **SETTINGS)
        assert isinstance(cache_of(out), kvsink.KVSinkCache) and int(cache_of(out).get_seq_length()) == PROMPT + NEW - 1
        assert torch.equal(out.sequences, wanted)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_compiled_it_is_right_or_refused(kind: str) -> None:
    row, model = ids(1, PROMPT, 3), rewritten(kind, 4)
    config = CompileConfig(backend="kvsink", fullgraph=True, mode=None, options={"kvsink.inner": "eager"})
    config._compile_all_devices = True
    if kind == "dynamic":
        with pytest.raises(UnsupportedError, match="rope type dynamic computes its angles anew, outside the graph") as raised:
            model.generate(row, compile_config=config, **SETTINGS)
        assert "\n" not in str(raised.value)
        return
    torch._dynamo.reset()
    assert torch.equal(model.generate(row, compile_config=config, **SETTINGS).sequences, by_hand(model, kind, row))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("method", ["klt", "rotatekv", "centred"])
def test_codecs_that_undo_rope_are_declined(kind: str, method: str) -> None:
    with pytest.raises(UnsupportedError, match=f"rope type {kind} changes its angles with the length") as raised:
        kvsink.rewrite(build(kind), method, calibration=ids(8, 16, 1))
    assert "\n" not in str(raised.value) and "--method rtn" in str(raised.value)

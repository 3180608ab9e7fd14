"""A 16-bit model with grouped queries and large key biases is as near to the stock model as codes alone allow, on a GPU too.

What codes cost is said by the same weights in float32 on the CPU: on a GPU other kernels run than there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.tools.against_stock import cached_logits

STEPS, VOCABULARY = 12, 257
ASKED = 4  # rows that are compared, of those that are fed


def model_of(heads: int, dim: int) -> Any:
    """Qwen2 with weights that attend, and biases on the channels that turn slowest, as its trained models have."""
    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=dim, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.mul_(2.0).requires_grad_(False)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.view(2, dim)
        bias.normal_()
        bias[:, dim // 2 - 3 : dim // 2] += 150.0
    return model


def tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def divergence(model: Any, method: str, bits: float, ids: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Mean KL [2] of a prompt in chunks and of the steps behind it, of the first `ASKED` rows, over what the model's own cache
    gives; layers in tiles."""
    length = ids.shape[1] - STEPS
    chunks = (*[chunk] * (length // chunk), length % chunk)
    with torch.no_grad():
        stock = cached_logits(model, ids, chunks).float().log_softmax(-1)
        kvsink.rewrite(model, method, key_bits=bits, value_bits=bits, calibration=tokens(16, 256, 1).to(ids.device))
        cache = KVSinkCache.for_model(model, len(ids), ids.shape[1] + 4)
        packed = cached_logits(model, ids, chunks, cache).float().log_softmax(-1)
    apart = (stock.exp() * (stock - packed)).sum(-1)[:ASKED]
    parts = torch.stack([apart[:, chunk:length].mean(), apart[:, length:].mean()]).cpu()
    return parts, sum(layer.codec.tiles for layer in cache.packed_layers())


def near(half: Tensor, cpu: Tensor) -> bool:
    return bool((half <= 1.25 * cpu + 1e-3).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [36, 1])
@pytest.mark.parametrize(("heads", "dim"), [(14, 64), (6, 64), (8, 128)])
@pytest.mark.parametrize(("method", "bits"), [("klt", 2), ("klt", 4), ("klt:even", 2)])
def test_on_a_gpu(method: str, bits: float, heads: int, dim: int, rows: int, dtype: torch.dtype) -> None:
    ids = tokens(rows, 1100 + STEPS, 2)
    gpu, tiles = divergence(model_of(heads, dim).to(dtype).cuda(), method, bits, ids.cuda(), 512)
    cpu, _ = divergence(model_of(heads, dim), method, bits, ids[:ASKED], 512)
    assert tiles == 3
    assert near(gpu, cpu), (gpu, cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_cpu(dtype: torch.dtype) -> None:
    ids = tokens(2, 600 + STEPS, 2)
    half, _ = divergence(model_of(14, 64).to(dtype), "klt", 2, ids, 256)
    cpu, _ = divergence(model_of(14, 64), "klt", 2, ids, 256)
    assert near(half, cpu), (half, cpu)

"""Whole models with random weights for `kvsink-bench`: build, rewrite, fill caches, time decode and prefill.

Shapes     LLaMA-3-8B: 32 layers, hidden 4096, 32 query and 8 key-value heads of 128 channels, vocabulary 128256
           LLaVA-1.5-7B, its language model: 32 layers, hidden 4096, 32 heads of 128 channels on both sides, vocabulary 32064
Differs    codes are random bits under plausible scales where only the time counts; kernels are checked in `kernels`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvsink
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.kernels.trellis import gain_bytes

__all__ = ["LLAMA_3_8B", "LLAVA_15_7B", "Shape", "fill", "llama", "rewritten"]

SIXTEEN = ("stock", "stock-combo", "static")
"""Sides in 16 bit: the strongest attention, the same with Inductor's combined kernels, and as transformers compiles it."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA-type decoder."""

    vocabulary: int
    inner: int
    kv_heads: int
    theta: float
    hidden: int = 4096
    heads: int = 32
    head_dim: int = 128
    rotary: float = 1.0  # share of a head's channels that RoPE turns


LLAMA_3_8B = Shape(vocabulary=128256, inner=14336, kv_heads=8, theta=500000.0)
LLAVA_15_7B = Shape(vocabulary=32064, inner=11008, kv_heads=32, theta=10000.0)


def llama(
    layers: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    vocabulary: int | None = None,
    positions: int = 1 << 21,
    shape: Shape = LLAMA_3_8B,
    device: str = "cuda",
) -> Any:
    """A decoder of a known shape with random weights on the GPU, or its first layers."""
    import transformers

    whole = shape.rotary == 1.0  # Nemotron is a Llama that can leave channels unturned
    rope = {"rope_type": "default", "rope_theta": shape.theta, **({} if whole else {"partial_rotary_factor": shape.rotary})}
    config = (transformers.LlamaConfig if whole else transformers.NemotronConfig)(
        vocab_size=vocabulary or shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        rope_parameters=rope,
        pad_token_id=0,
    )
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.no_grad():
            model = (transformers.LlamaForCausalLM if whole else transformers.NemotronForCausalLM)(config)
    finally:
        torch.set_default_dtype(held)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model.eval()


_records: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()  # not by id, which a later model may have again


def declared(side: str) -> tuple[Any, float, float]:
    """Method, bits of keys and bits of values of "METHOD", "METHOD-BITS" or "METHOD-BITS/BITS"; without bits 2.

    "default" is what `kvsink.rewrite(model)` does. "klt-dense" is `klt` with keys coded before RoPE (block=1), whose basis
    must be undone key by key.
    """
    from kvsink.methods import DEFAULT, get_method

    if side == "default":
        method = get_method(DEFAULT)
        return method, method.key_bits, method.value_bits
    name, dash, bits = side.rpartition("-")
    if not dash or not re.fullmatch(r"[\d.]*\d(/[\d.]*\d)?", bits):
        name, bits = side, "2"
    key, _, value = bits.partition("/")
    method = get_method(name.removesuffix("-dense"))
    if name.endswith("-dense"):
        method = replace(method, name=name, key=replace(method.key, block=1))
    return method, float(key), float(value or key)


def rewritten(model: Any, side: str, protect: str = "kvsink:5+first:1", window: int = 0) -> Callable[[], Any]:
    """Rewrite the model as `declared` says, without its check, and return a function that attaches this rewrite again and returns
    the model.

    A method with bits by modality keeps its own exact rows, and its first two layers look at text, as those of LLaVA-1.5 do.
    """
    from kvsink.calibrate.calibration import calibrate
    from kvsink.calibrate.design import gather_needs
    from kvsink.codecs.protect import SinkStage
    from kvsink.model.runtime import attach, runtime_of

    layers = model.config.num_hidden_layers
    method, key_bits, value_bits = declared(side)
    pair = method.side("key", key_bits), method.side("value", value_bits)
    blocks, need = gather_needs([pair], model.config.num_key_value_heads, model.config.head_dim)
    blocks = tuple(sorted({64, *blocks}))
    known, records = (blocks, need), _records.setdefault(model, {})
    if known not in records:
        count = max(512, 16 * model.config.head_dim, need.rows if need is not None else 0)  # moments of queries want so many
        ids = torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
        every = range(layers)
        samples = {} if need is None else dict.fromkeys(every, need)
        record = calibrate(model, ids, [()] * layers, dict.fromkeys(every, blocks), 1, None, samples)
        # Random weights have no sinks: a stage is named so that every step ranks its row as a trained model's does.
        stage = SinkStage(0, (7,), 1e4, 1.0)
        records[known] = replace(record, stages=(stage,))
    modal = method.modality is not None
    kvsink.rewrite(
        model,
        method,
        key_bits=key_bits,
        value_bits=value_bits,
        protect=None if modal else protect,
        window=window or None,
        calibration=records[known],
        fold=False,
        check=False,
        layers=f"0-{min(1, layers - 2)}:pattern=tsa" if modal and layers > 1 else "",
    )
    runtime = runtime_of(model)

    def again() -> Any:
        attach(model, runtime)
        return model

    return again


def gains_of(codes: Tensor, tiles: bool) -> Tensor:
    """The bytes of the gains in trellis codes [B, H, L, bytes of a slot], to write to: [B, H, L], in tiles [B, H, L / 128, 128]."""
    return codes.flatten(2).unflatten(2, (-1, TILE_SLOTS * codes.shape[3]))[..., -TILE_SLOTS:] if tiles else codes[..., -1]


def fill(cache: Any, length: int) -> None:
    """Random codes under plausible scales, as if `length` tokens were held, the first ones exact."""
    for i, layer in enumerate(cache.packed_layers()):
        g = torch.Generator(layer.device).manual_seed(i)
        for name in ("k_codes", "v_codes"):
            held = getattr(layer, name)
            held.view(torch.int64 if held.shape[-1] % 8 == 0 else torch.uint8).random_(generator=g)
            if (layer.codec.key if name == "k_codes" else layer.codec.value).kind == "trellis":
                gains = gains_of(held, layer.codec.tiles)
                gains.copy_(gain_bytes(torch.rand(gains.shape, device=layer.device, generator=g) * 0.4 + 0.1))
        for name in ("k_scale", "v_scale"):
            held = getattr(layer, name)
            held.copy_(torch.rand(held.shape[2:], device=layer.device, generator=g) * 0.4 + 0.1)
        for name in ("exact_k", "exact_v"):
            getattr(layer, name).normal_(generator=g)
        if ring := layer.recent_slot.shape[0]:
            layer.recent_k.normal_(generator=g)
            layer.recent_v.normal_(generator=g)
            slots = torch.arange(max(0, length - ring), length, device=layer.device)
            layer.recent_slot[slots % ring] = slots.to(layer.recent_slot.dtype)
        rows = layer.exact_slot.shape[1]
        layer.exact_slot.copy_(torch.arange(rows, device=layer.device, dtype=torch.int32)[None])
        layer.exact_score.fill_(1e30)
        layer.length.fill_(length)
    cache.shared.positions.copy_(torch.arange(cache.shared.positions.shape[1], device=cache.shared.positions.device)[None])


# -- the 16-bit model -----------------------------------------------------------------------------------------------------


def stock_cache(model: Any, batch: int, length: int) -> Any:
    """A StaticCache that is allocated now and never moves, filled with random rows."""
    from transformers.cache_utils import StaticCache

    config = model.config
    cache = StaticCache(config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
    return cache


def set_stock_length(cache: Any, length: int) -> None:
    """As if `length` tokens were held."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def use_attention(model: Any, backend: str) -> None:
    """Let a 16-bit model decode by one SDPA backend over the whole cache, grouped heads not repeated and no mask built.

    The strongest 16-bit side there is: it suits a cache that is full, which is when it is measured.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = SDPBackend.CUDNN_ATTENTION if backend.startswith("cudnn") else SDPBackend.FLASH_ATTENTION
    rows = backend.endswith("-rows")

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        b, heads, s, d = query.shape
        with sdpa_kernel(kind):
            if rows:
                packed = query.reshape(b, key.shape[1], heads // key.shape[1], d)
                out = F.scaled_dot_product_attention(packed, key, value, scale=scaling).reshape(b, heads, s, d)
            else:
                out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    name = f"bench-{backend}"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *args, **kwargs: None)
    model.config._attn_implementation = name

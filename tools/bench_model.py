"""Whole models with random weights for `kvsink-bench`: build, rewrite, fill caches, time decode and prefill.

Shapes     LLaMA-3-8B: 32 layers, hidden 4096, 32 query and 8 key-value heads of 128 channels, vocabulary 128256
           LLaVA-1.5-7B, its language model: 32 layers, hidden 4096, 32 heads of 128 channels on both sides, vocabulary 32064
Differs    codes are random bits under plausible scales where only the time counts; kernels are checked in `kernels`
"""

from __future__ import annotations

import gc
import inspect
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvsink
from kvsink.model.passing import given_cache
from kvsink.tools.timing import event_times

__all__ = [
    "DECODE_SHAPES", "LLAMA_3_8B", "LLAVA_15_7B", "Shape",
    "decode_rows", "fill", "llama", "prefill_rows", "rewritten", "vision_rows",
]  # fmt: skip

DECODE_SHAPES = ((1, 1024), (1, 131072), (0, 4096))
"""Batch and length; batch 0 is the largest that fits."""

SIXTEEN = ("stock", "stock-combo", "static")
"""Sides in 16 bit: the strongest attention, the same with Inductor's combined kernels, and as transformers compiles it."""

_STEPS = 24


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
    layers: int = 32, dtype: torch.dtype = torch.bfloat16, vocabulary: int | None = None, positions: int = 1 << 21,
    shape: Shape = LLAMA_3_8B, device: str = "cuda",
) -> Any:  # fmt: skip
    """A decoder of a known shape with random weights on the GPU, or its first layers."""
    import transformers

    whole = shape.rotary == 1.0  # Nemotron is a Llama that can leave channels unturned
    rope = {"rope_type": "default", "rope_theta": shape.theta, **({} if whole else {"partial_rotary_factor": shape.rotary})}
    config = (transformers.LlamaConfig if whole else transformers.NemotronConfig)(
        vocab_size=vocabulary or shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=positions, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
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


_records: dict[Any, Any] = {}


def declared(side: str) -> tuple[Any, float, float]:
    """Method, bits of keys and bits of values of "METHOD", "METHOD-BITS" or "METHOD-BITS/BITS"; without bits 2.

    "default" is what `kvsink.rewrite(model)` does. "klt-dense" is `klt` with keys coded before RoPE (block=1), whose basis
    must be undone key by key.
    """
    from kvsink.methods import get_method

    if side == "default":
        method = get_method(inspect.signature(kvsink.rewrite).parameters["method"].default)
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
    known = id(model), blocks, need
    if known not in _records:
        count = max(512, 4 * model.config.head_dim, need.rows if need is not None else 0)
        ids = torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
        every = range(layers)
        samples = {} if need is None else dict.fromkeys(every, need)
        record = calibrate(model, ids, [()] * layers, dict.fromkeys(every, blocks), 1, None, samples)
        # Random weights have no sinks: a stage is named so that every step ranks its row as a trained model's does.
        stage = SinkStage(0, (7,), 1e4, 1.0)
        _records[known] = replace(record, stages=(stage,))
    modal = method.modality is not None
    kvsink.rewrite(
        model, method, key_bits=key_bits, value_bits=value_bits, protect=None if modal else protect, window=window or None,
        calibration=_records[known], fold=False, check=False,
        layers=f"0-{min(1, layers - 2)}:pattern=tsa" if modal and layers > 1 else "",
    )  # fmt: skip
    runtime = runtime_of(model)

    def again() -> Any:
        attach(model, runtime)
        return model

    return again


def fill(cache: Any, length: int) -> None:
    """Random codes under plausible scales, as if `length` tokens were held, the first ones exact."""
    for i, layer in enumerate(cache.packed_layers()):
        g = torch.Generator(layer.device).manual_seed(i)
        for name in ("k_codes", "v_codes"):
            held = getattr(layer, name)
            held.view(torch.int64 if held.shape[-1] % 8 == 0 else torch.uint8).random_(generator=g)
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
    cache.shared.positions.copy_(
        torch.arange(cache.shared.positions.shape[1], device=cache.shared.positions.device)[None]
    )


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
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0, scaling: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
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


# -- decode ---------------------------------------------------------------------------------------------------------------


def _decode(
    step: Callable[..., Any], cache: Any, reset: Callable[[], None], batch: int, length: int
) -> tuple[float, float]:
    """Median seconds of a step and the seconds of the first call; greedy, the token stays on the device."""
    token = torch.randint(0, 1000, (batch, 1), device="cuda")
    begun = time.monotonic()
    first, times = 0.0, []
    with torch.no_grad():
        for turn in range(4):
            reset()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS + 1)]
            events[0].record()
            for i in range(_STEPS if turn else 4):
                torch.compiler.cudagraph_mark_step_begin()
                position = torch.full((1, 1), length - _STEPS + i, device="cuda")
                logits = step(token, position_ids=position, use_cache=True, **given_cache(step, cache)).logits
                token = logits[:, -1:].argmax(-1)
                events[i + 1].record()
            torch.cuda.synchronize()
            if not turn:
                first = time.monotonic() - begun
            else:
                times += [a.elapsed_time(b) for a, b in pairwise(events[2:])]
    times.sort()
    return times[len(times) // 2] / 1e3, first


def _largest(per_sequence: int, per_row: int, reserve: int) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return max(1, (free - reserve) // (per_sequence + per_row) // 8 * 8)


def _attempts(batch: int, fixed: bool) -> list[int]:
    return [batch] if fixed else [batch, int(batch * 0.94) // 8 * 8, int(batch * 0.88) // 8 * 8]


def _run(
    make: Callable[[int], tuple[Callable[..., Any], Any, Callable[[], None]]], batch: int, fixed: bool, length: int
) -> dict[str, Any]:
    """Decode at a batch, or at the largest of a few that does not run out of memory."""
    for b in _attempts(batch, fixed):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        cache: Any = None
        try:
            step, cache, reset = make(b)
            seconds, first = _decode(step, cache, reset, b, length)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            return {
                "B": b, "step_ms": round(seconds * 1e3, 4), "tokens_per_s": round(b / seconds, 1), "first_call_s": round(first, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "graphs": graphs,
                "cuda_graphs": not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
            }  # fmt: skip
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "out of memory" not in str(error) and "GiB are free" not in str(error):
                raise
            del cache
        finally:
            torch._dynamo.utils.counters.clear()
    return {"B": 0, "step_ms": None, "tokens_per_s": 0.0, "note": "out of memory"}


def _held_bytes(model: Any, length: int) -> int:
    """Bytes that the cache of one sequence takes, of a model as it is rewritten now."""
    from kvsink.cache.cache import KVSinkCache
    from kvsink.cache.served import tiles_serve
    from kvsink.model.runtime import runtime_of

    runtime, weight = runtime_of(model), next(model.parameters())
    a = runtime.anatomy
    empty = KVSinkCache(runtime, length, tiles_serve(runtime, weight.dtype, weight.device))
    shape = a.kv_heads, a.head_dim, a.head_dim
    layouts = (i.codec.layout(1, *shape, i.get_max_length(), weight.dtype) for i in empty.packed_layers())
    return sum(math.prod(size) * dtype.itemsize for held in layouts for size, dtype, _ in held.values())


def decode_rows(
    model: Any, sides: Sequence[str], shapes: Sequence[tuple[int, int]], backends: dict[tuple[int, int], str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Tokens per second of each side ("stock", "static", or a method with its bits, "centred-even-2") at each shape."""
    rows = []
    for batch, length in shapes:
        for side in sides:
            row = {"kind": "decode", "side": side, "T": length, **_side(model, side, batch, length, backends)}
            rows.append(row)
            say(
                f"decode T{length} {side}: " + "  ".join(f"{k}={row[k]}" for k in row if k not in ("kind", "side", "T"))
            )
    return rows


def _side(model: Any, side: str, batch: int, length: int, backends: dict[tuple[int, int], str]) -> dict[str, Any]:
    from kvsink.cache.cache import KVSinkCache
    from kvsink.model.runtime import detach

    a = model.config
    model.config._attn_implementation = "sdpa"
    per_row = 2 * a.vocab_size * 4
    if side in SIXTEEN:
        detach(model)
        if side != "static":
            use_attention(model, backends[(batch, length)])
        per = a.num_hidden_layers * a.num_key_value_heads * 2 * a.head_dim * 2 * length

        def make(b: int) -> tuple[Callable[..., Any], Any, Callable[[], None]]:
            cache = stock_cache(model, b, length)
            options: dict[str, Any] = {"triton.cudagraphs": True, "combo_kernels": side == "stock-combo"}
            step = torch.compile(model, options=options, fullgraph=True)
            return step, cache, lambda: set_stock_length(cache, length - _STEPS)

    else:
        attach = rewritten(model, side)
        attach()
        per = _held_bytes(model, length)

        def make(b: int) -> tuple[Callable[..., Any], Any, Callable[[], None]]:
            cache = KVSinkCache.for_model(model, b, length)
            fill(cache, length - _STEPS)
            step = torch.compile(model, backend="kvsink", mode="reduce-overhead", fullgraph=True)

            def reset() -> None:
                for layer in cache.packed_layers():
                    layer.length.fill_(length - _STEPS)

            return step, cache, reset

    fixed = batch > 0
    return _run(make, batch if fixed else _largest(per, per_row, 3 << 30), fixed, length)


# -- prefill --------------------------------------------------------------------------------------------------------------


def prefill_rows(
    model: Any, sides: Sequence[str], length: int, say: Callable[[str], None], repeats: int = 3
) -> list[dict[str, Any]]:
    """Seconds of one prompt of `length` tokens in one piece; the logits of its last token only."""
    from kvsink.cache.cache import KVSinkCache
    from kvsink.model.runtime import detach

    ids = torch.randint(0, 1000, (1, length), device="cuda")
    rows = []
    for side in sides:
        model.config._attn_implementation = "sdpa"
        if side == "stock":
            detach(model)
            cache: Any = stock_cache(model, 1, length + 128)

            def reset(cache: Any = cache) -> None:
                set_stock_length(cache, 0)
        else:
            cache = KVSinkCache.for_model(rewritten(model, side)(), 1, length + 128)

            def reset(cache: Any = cache) -> None:
                cache.reset()

        times = []
        with torch.no_grad():
            for _ in range(repeats + 1):
                reset()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                begun = time.monotonic()
                model(ids, **given_cache(model, cache), use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                times.append(time.monotonic() - begun)
        times = sorted(times[1:])
        row = {
            "kind": "prefill", "side": side, "B": 1, "T": length, "seconds": round(times[len(times) // 2], 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }  # fmt: skip
        if side != "stock":
            row["sink_prediction_ms"] = round(sink_prediction_ms(cache, length, model.config.hidden_size), 4)
        rows.append(row)
        say("  ".join(f"{k}={v}" for k, v in row.items()))
        del cache
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def sink_prediction_ms(cache: Any, length: int, hidden_size: int, repeats: int = 20) -> float:
    """Median time of ranking the rows of a prompt by the outlier channel of their emergence block, all stages of a plan."""
    from kvsink.kernels import select_sinks

    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1, length, hidden_size, device="cuda", dtype=torch.bfloat16, generator=g)
    valid = torch.ones(1, length, dtype=torch.bool, device="cuda")
    channel, weight = torch.tensor([7], device="cuda"), torch.ones(1, device="cuda")
    segments = {s.key: s.count for layer in cache.packed_layers() for s in layer.segments if s.source.startswith("stage:")}

    def rank() -> None:
        for count in segments.values():
            select_sinks(hidden, valid, channel, weight, count, False)

    for _ in range(3):
        rank()
    times = sorted(event_times(rank, repeats))
    return times[len(times) // 2]


# -- vision-language models -----------------------------------------------------------------------------------------------


def vision_rows(
    model: Any, baseline: str, sides: Sequence[str], length: int, backends: dict[tuple[int, int], str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Each side at the largest batch of the 16-bit side and at its own, and what it gains over it.

    Peak memory counts weights, cache and everything else; it is compared at the same batch, throughput at the largest of each.
    """
    stock = decode_rows(model, [baseline], [(0, length)], backends, say)[0]
    rows = [stock]
    for side in sides:
        same = decode_rows(model, [side], [(stock["B"], length)], backends, say)[0]
        most = decode_rows(model, [side], [(0, length)], backends, say)[0]
        gain = {"kind": "vlm", "side": side, "against": baseline, "T": length}
        if stock["B"] and same["B"] and most["B"]:
            gain |= {
                "same_batch": stock["B"], "memory_smaller": round(stock["peak_gib"] / same["peak_gib"], 3),
                "batch_larger": round(most["B"] / stock["B"], 3),
                "throughput_higher": round(most["tokens_per_s"] / stock["tokens_per_s"], 3),
            }  # fmt: skip
        say("  ".join(f"{k}={v}" for k, v in gain.items()))
        rows += [same, most, gain]
    return rows

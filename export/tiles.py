"""Flavour custom for CUDA: codes in tiles, coded and read by the kernels of `kvsink.kernels.cuda` in one node a layer.

A step is one node, `AttendTiles`: the new row is coded into its place, attention reads the codes, and the row is offered to the
exact ones. The rows of a prompt attend in the same node by onnxruntime's own GroupQueryAttention over the rows before them,
decoded, and themselves; then they are coded.

Formula    see `kvsink.kernels.append_attend`; a prompt: `kvsink.kernels.prefill`, the rows before it decoded whole
Source     ours
Differs    from the torch cache: no padding, so that a row's slot is its position; in a prompt in pieces a row that leaves the exact
           ones is exact for the queries of that piece still
Shapes     q [B, Hq, S, D], k, v [B, H, S, D] after RoPE, float16; codes uint8 [B, H, C, bytes] in the order of
           `kvsink.kernels.layout`, C a multiple of 128; exact rows float16 [B, H, E, D]; the attention mask gives the number of
           rows held and nothing else
Exact      codes as `append_`, output as `attend`
Declines   see `refuses`: what the kernels do not serve, layers that are not packed, windows, padding
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvsink.cache.served import in_tiles
from kvsink.codecs import STATE_NAMES, Codec
from kvsink.export.asked import ASKED, register
from kvsink.export.past import PlainLayer, Shared, candidates_of, orders_of
from kvsink.export.state import STATE_OF, past_names
from kvsink.kernels.append import append_ref
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.base import resolve_codec
from kvsink.kernels.cuda.launch import variant_of
from kvsink.kernels.cuda.variants import Variant
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.model.frame import Frame
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Runtime, runtime_of

__all__ = ["TILES", "TileModel", "attend_tiles", "empty_tiles", "kernels_of", "refuses", "variant_name"]

TILES = "kvsink_tiles"
_CARRIED = tuple(STATE_OF.values())
"""Of the state of a layer, what the graph carries."""


def refuses(runtime: Runtime, layer: int) -> str:
    """Why a layer cannot leave in tiles, or an empty string."""
    codec = runtime.plans[layer].codec
    if codec is None:
        return "it is not packed"
    kinds = runtime.anatomy.layer_types
    if kinds and kinds[layer] != "full_attention":
        return f"its attention is of the kind {kinds[layer].replace('_', ' ')}"
    if codec.ring:
        return f"its window of {codec.ring} recent rows is not part of the graph; use --window 0"
    return in_tiles(runtime, layer, "step")


def variant_name(variant: Variant) -> str:
    """What machine code of a variant is called in a library of operators."""
    return hashlib.sha256(repr(variant).encode()).hexdigest()[:16]


def _variants(runtime: Runtime) -> Iterator[Variant]:
    for i, plan in enumerate(runtime.plans):
        heads, kv_heads, *_ = runtime.anatomy.layers[i]
        assert plan.codec is not None
        yield variant_of(plan.codec.in_tiles().format, heads // kv_heads, runtime.rotary_channels(i))


def kernels_of(runtime: Runtime) -> dict[str, Variant]:
    """What a library of operators must have machine code for, by name."""
    return {variant_name(v): v for v in _variants(runtime)}


def empty_tiles(runtime: Runtime, batch: int, slots: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A past of `slots` slots by graph name."""
    a, out = runtime.anatomy, {}
    for i, plan in enumerate(runtime.plans):
        assert plan.codec is not None
        codec = plan.codec.in_tiles()
        layout = codec.layout(batch, a.kv_heads, a.head_dim, a.head_dim, slots, dtype)
        for name in past_names(codec):
            shape, kind, fill = layout[STATE_OF[name]]
            out[f"{i}.{name}"] = torch.full(shape, fill, dtype=kind)
    return out


# -- nodes -----------------------------------------------------------------------------------------------------------------


def _whole(c: Codec, carried: Sequence[Tensor], length: int, k: Tensor) -> dict[str, Tensor]:
    """The state of a layer by name, with copies of what the graph carries."""
    b, h, _, d = k.shape
    made = {n: torch.full(*layout[:1], layout[2], dtype=layout[1]) for n, layout in
            c.layout(b, h, d, d, carried[0].shape[2], k.dtype).items()}  # fmt: skip
    made |= {n: x.clone() for n, x in zip(_CARRIED, carried, strict=True) if x.numel()}
    made |= {"length": torch.tensor(length), "positions": torch.zeros(b, carried[0].shape[2], dtype=torch.int32)}
    return {n: made.get(n, torch.ones(b, carried[0].shape[2], dtype=torch.bool)) for n in STATE_NAMES}


@torch.library.custom_op("kvsink_export::attend_tiles", mutates_args=())
def attend_tiles(
    mask: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    carried: Sequence[Tensor],
    candidates: Sequence[Tensor],
    params: Sequence[Tensor],
    scale: float,
    codec: str,
    kernels: str,
) -> list[Tensor]:
    """Attention output [B, S, Hq·D] of new rows at slots `positions` int64 [B, S], and the state with them.

    mask [B, P + S], of which the shape alone is read; carried: the tensors of `STATE_OF`, empty where there are none. One new row
    reads those before it by their codes, several the same rows decoded.
    """
    c = resolve_codec(codec)
    s, first = k.shape[2], int(positions[0, 0])
    st = _whole(c, carried, first, k)
    state, none = [st[n] for n in STATE_NAMES], k.new_empty(1, s, 0)
    before = [t.clone() for t in state]
    append_ref(k, v, positions, none, none, candidates, state, params, codec, True)
    out = attend_ref(q, k, v, state if s == 1 else before, params, None, scale, True, codec).transpose(1, 2).flatten(2)
    return [out.contiguous(), *(st[n] if x.numel() else x.clone() for n, x in zip(_CARRIED, carried, strict=True))]


@attend_tiles.register_fake
def _(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, carried: Sequence[Tensor], *_: Any) -> list[Tensor]:
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
    return [out, *(torch.empty_like(x) for x in carried)]


# -- the model that is traced ---------------------------------------------------------------------------------------------


class _TileLayer(PlainLayer):
    """A layer whose new rows wait for the queries that attend to them."""

    def __init__(self, past: dict[str, Tensor], cache: _TilePast, layer: int) -> None:
        super().__init__(past, cache.length)
        self.cache, self.layer = cache, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ASKED.leave(key_states, ref(self))
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sink: Tensor | None = None) -> Tensor:
        """Attention output [B, S, Hq, D]; causal, without padding and without a sink, which `refuses` and the export see to."""
        cache, order = self.cache, self.cache.owner.orders[self.layer]
        codec, params, kernels = cache.owner.layers[self.layer]
        q, k = (x if order is None else x.index_select(-1, order[0]) for x in (q, k))
        empty = k.new_empty((*k.shape[:2], 0))
        given = {STATE_OF[n]: x for n, x in self.past.items()}
        carried = [given.get(n, empty) for n in _CARRIED]
        frame = cache.shared.frame or Frame()
        positions = frame.positions if frame.positions is not None else torch.arange(k.shape[2])[None] + cache.length
        chosen = candidates_of(cache.runtime, self.layer, frame, positions)
        positions = positions.expand(k.shape[0], k.shape[2])
        out, *state = attend_tiles(cache.mask, q, k, v, positions, carried, chosen, params, scale, codec.text(), kernels)
        left = dict(zip(_CARRIED, state, strict=True))
        self.present = {n: left[STATE_OF[n]] for n in self.past}
        return out.unflatten(-1, (q.shape[1], -1))


class _TilePast(Cache):
    """The cache of one traced call."""

    is_kvsink = True

    def __init__(self, owner: TileModel, mask: Tensor, past: Mapping[str, Tensor], new: Any) -> None:
        self.owner, self.runtime, self.mask, self.length = owner, owner.runtime, mask, mask.shape[1] - new
        self.shared = Shared()
        self.visual: Tensor | None = None
        layers: list[Any] = []
        for i, (codec, _, _) in enumerate(owner.layers):
            layers.append(_TileLayer({name: past[f"{i}.{name}"] for name in past_names(codec)}, self, i))
        super().__init__(layers=layers)


class TileModel(nn.Module):
    """(ids, mask, positions, past by name) -> (logits, those of the last row in float32, present...), its cache in tiles.

    tokens: positions it serves, whole tiles of them.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.model, self.runtime = model, runtime_of(model)
        self.layers: list[tuple[Codec, list[Tensor], str]] = []
        shared: dict[int, Tensor] = {}  # equal tables are one tensor, so that the graph holds one initializer
        for i, variant in enumerate(_variants(self.runtime)):
            codec = self.runtime.plans[i].codec
            assert codec is not None
            tiled, channels = codec.in_tiles(), self.runtime.rotary_channels(i)
            origin = {"origin_cos": torch.ones(1, channels), "origin_sin": torch.zeros(1, channels)}
            tables = self.runtime.params(i, tiled, -(-tokens // TILE_SLOTS) * TILE_SLOTS, torch.device("cpu"), origin)
            for name, table in zip(tiled.param_names(), tables, strict=True):
                if id(table) not in shared:
                    shared[id(table)] = table
                    self.register_buffer(f"{name}_{i}", table, persistent=False)
            self.layers.append((tiled, [shared[id(t)] for t in tables], variant_name(variant)))
        self.orders = orders_of(self, self.runtime)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _TilePast(self, attention_mask, past, input_ids.shape[1])
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),  # of the new rows: nothing reads the columns of the others
            position_ids=position_ids,
            use_cache=True,
            **given_cache(self.model, cache),
        )
        present = {f"{i}.{name}": tensor for i, layer in enumerate(cache.layers) for name, tensor in layer.present.items()}
        return (out.logits, out.logits[:, -1:].float(), *(present[name] for name in past))


register(TILES)

"""The packed cache as plain tensors in and out: what an exported graph holds in place of `KVSinkCache`, by the names of
`kvsink.export.state`.

Exact      the codes are those of `KVSinkCache`; new rows are attended to as they came
Declines   see `kvsink.export.flavours`
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvsink.codecs import Codec
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.export.nodes import Steps, attend, attend_packed, first_rows, preserve_sinks, restore_sinks
from kvsink.export.state import past_names
from kvsink.kernels import decode, dequantize, encode, quantize
from kvsink.kernels.backends import TABLES_BACK
from kvsink.model.frame import Frame
from kvsink.model.handover import Handover
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Runtime, runtime_of
from kvsink.model.turning import turns_back

__all__ = ["ATTENTION", "ExportedModel", "Orders", "PlainLayer", "orders_of", "takes_packed"]

ATTENTION = "kvsink_export"
Orders = list[tuple[Tensor, Tensor] | None]
"""Of each layer: its channels in canonical order and back, int64 [D] each."""
_PACKED_KINDS = ("lloyd", "lloyd-even", "vector", "gauss", "uniform", "uniform-int", "static", "trellis")
_SMALLEST_BLOCK = 16  # below it a query per block costs more than decoding
_PACKED: Handover[Callable[..., Tensor]] = Handover()  # with new keys: attention over them and the past of their layer


def orders_of(holder: nn.Module, runtime: Runtime) -> Orders:
    """`Runtime.order` of every layer, as buffers of the module that is traced."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for i, plan in enumerate(runtime.plans):
        order = runtime.order(i, torch.device("cpu")) if plan.codec is not None else None
        for name, index in zip(("there", "back"), order or (), strict=False):
            holder.register_buffer(f"order_{name}_{i}", index, persistent=False)
        found.append(order)
    return found


def takes_packed(codec: Codec) -> bool:
    """Whether one node reads the past of a layer; else it is decoded by one node after another."""
    for side in (codec.key, codec.value):
        if not side.packed or side.kind not in _PACKED_KINDS or side.reorder or (side.heads_per_group > 1 and not side.folded):
            return False
        if side.exponent:
            return False
    if {*codec.format.key.beyond, *codec.format.value.beyond} - {*TABLES_BACK}:
        return False
    return codec.key.domain != "block" or codec.key.block >= _SMALLEST_BLOCK


class PlainLayer(CacheLayerMixin):
    """A layer that kvsink leaves alone: rows as they came; the mask, not the cache, applies a window."""

    is_sliding = False

    def __init__(self, past: dict[str, Tensor]) -> None:
        super().__init__()
        self.past, self.present = past, past
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.past["key"], key_states], dim=2)
        values = torch.cat([self.past["value"], value_states], dim=2)
        self.present = {"key": keys, "value": values}
        return keys, values

    def get_seq_length(self) -> Any:
        return self.past["key"].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class _PackedLayer(PlainLayer):
    """A packed layer: new rows are coded and joined to the past codes; the past is decoded, exact rows laid over it."""

    def __init__(self, past: dict[str, Tensor], cache: PackedPast, layer: int) -> None:
        super().__init__(past)
        self.cache, self.layer = cache, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        v, past, runtime, order = value_states, self.past, self.cache.runtime, self.cache.orders[self.layer]
        k = key_states if order is None else key_states.index_select(-1, order[0])
        plan = runtime.plans[self.layer]
        c = plan.codec
        assert c is not None
        p = self.cache.params[self.layer]
        frame = self.cache.shared.frame or Frame()
        positions = self.cache.new_positions(frame, k)
        cos, sin = frame.cos, frame.sin
        if cos is None or sin is None:
            cos, sin = runtime.angles(self.layer, positions[:1])
        elif turns_back(c):
            cos, sin = runtime.canonical(self.layer, cos, sin)
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32  # a model in float16 codes its rows in float32
        cos, sin = cos.to(wide), sin.to(wide)
        present = {}
        x = c.transform_keys(k.to(wide), cos, sin, positions, p, True, steps=Steps) if c.key.packed else k
        y = c.transform_values(v.to(wide), p, steps=Steps) if c.value.packed else v
        for side, name, rows in (("k", "key", x), ("v", "value", y)):
            codes, scale = _encode(c, side, rows, p)
            present[name] = torch.cat([past[name], codes], dim=2)
            if scale is not None:
                present[f"{name}_scale"] = torch.cat([past[f"{name}_scale"], scale], dim=2)
        held = [past[n] for n in ("exact_slot", "exact_score", "exact_key", "exact_value")] if c.segments else []
        exact: tuple[Tensor, ...] = ()
        if held:
            chosen = self._candidates(frame, positions)
            slot, score, *rows = preserve_sinks(*held, k, v, self.cache.past_positions, chosen, list(c.segments))
            present |= {"exact_key": rows[0], "exact_value": rows[1], "exact_slot": slot, "exact_score": score}
            exact = (*rows, slot)
        self.present = present
        if self.cache.fused and takes_packed(c):
            _PACKED.leave(k, partial(self._attend, c, exact))
            return k, v
        old_k, old_v = (_decode(c, side, past[n], past.get(f"{n}_scale"), p) for side, n in (("k", "key"), ("v", "value")))
        if c.key.packed:
            old_k = c.restore_keys(old_k.to(wide), self.cache.past_positions, p, steps=Steps).to(k.dtype)
        if c.value.packed:
            old_v = c.restore_values(old_v.to(wide), p, steps=Steps).to(v.dtype)
        if exact:
            keys, values = restore_sinks(old_k, k, exact[0], exact[2]), restore_sinks(old_v, v, exact[1], exact[2])
        else:
            keys, values = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        return keys if order is None else keys.index_select(-1, order[1]), values

    def _attend(
        self, c: Codec, exact: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention output [B, Hq, S, D] as one node; q [B, Hq, S, D]."""
        p, past, codes, order = self.cache.params[self.layer], self.past, [], self.cache.orders[self.layer]
        q = q if order is None else q.index_select(-1, order[0])
        for name in ("key", "value"):
            stored = past[name]
            empty = stored.new_empty((*stored.shape[:-1], 0), dtype=torch.float16)
            codes += [stored, past.get(f"{name}_scale", empty)]
        params = [p[name] for name in c.param_names()]
        return attend_packed(q, k, v, mask, self.cache.past_positions, codes, list(exact), params, scale, c.text())

    def _candidates(self, frame: Frame, positions: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for segment in self.cache.runtime.plans[self.layer].segments:
            key = segment.key if segment.source != "massive" else f"{segment.key}@{self.layer}"
            if key not in frame.candidates:
                assert segment.source == "first" and frame.valid is not None, segment
                frame.candidates[key] = first_rows(positions.expand(frame.valid.shape), frame.valid, segment.count)
            out += frame.candidates[key]
        return out


def _tables(c: Codec, side: str, p: dict[str, Tensor]) -> list[Tensor]:
    return [p[name] for name in c.table_names(side)]


def _encode(c: Codec, side: str, x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    s = c.key if side == "k" else c.value
    if not s.packed:
        return x, None
    if QUANTIZERS[s.kind].scalar:
        codes, scale = quantize(x, p.get(f"{side}_sigma"), s.kind, list(s.widths), s.group_size, s.clip, s.gain)
    else:
        codes, scale = encode(x, _tables(c, side, p), c.text(), side)
    return codes, scale if scale.shape[-1] else None


def _decode(c: Codec, side: str, codes: Tensor, scale: Tensor | None, p: dict[str, Tensor]) -> Tensor:
    s = c.key if side == "k" else c.value
    if not s.packed:
        return codes
    if scale is None:
        scale = codes.new_empty((*codes.shape[:-1], 0), dtype=torch.float16)
    if QUANTIZERS[s.kind].scalar:
        return dequantize(codes, scale, p.get(f"{side}_sigma"), s.kind, list(s.widths), s.group_size, s.gain)
    return decode(codes, scale, _tables(c, side, p), c.text(), side)


class _Shared:
    """What the hooks of a rewritten model write to: the frame of the running forward pass."""

    frame: Frame | None = None


class PackedPast(Cache):
    """The cache of one traced call; the hooks of a rewritten model fill its frame as they fill a KVSinkCache's."""

    is_kvsink = True

    def __init__(
        self, runtime: Runtime, past: dict[str, Tensor], params: list[dict[str, Tensor]], orders: Orders, fused: bool = False
    ) -> None:
        self.runtime, self.params, self.orders, self.fused = runtime, params, orders, fused
        self.past_positions = past["positions"]
        self.shared = _Shared()
        self.visual: Tensor | None = None
        self._positions: Tensor | None = None
        layers: list[Any] = []
        for i, plan in enumerate(runtime.plans):
            own = {name: past[f"{i}.{name}"] for name in past_names(plan.codec)}
            layers.append(PlainLayer(own) if plan.codec is None else _PackedLayer(own, self, i))
        super().__init__(layers=layers)

    def new_positions(self, frame: Frame, rows: Tensor) -> Tensor:
        """Positions of the new rows [B or 1, S]; without any from the model, their slots."""
        positions = frame.positions
        if positions is None:
            positions = torch.arange(rows.shape[2], device=rows.device)[None] + self.past_positions.shape[1]
        if self._positions is None:
            self._positions = positions.expand(rows.shape[0], rows.shape[2])
        return positions

    def present(self) -> dict[str, Tensor]:
        """What the call leaves, by graph name without prefix."""
        assert self._positions is not None
        out = {"positions": torch.cat([self.past_positions, self._positions.to(torch.int32)], dim=1)}
        for i, layer in enumerate(self.layers):
            out.update({f"{i}.{name}": tensor for name, tensor in layer.present.items()})
        return out


class ExportedModel(nn.Module):
    """(ids, mask, positions, past by name) -> (logits, present...): what is exported, and its definition in torch.

    tokens: positions it serves; block-start angles are a table of that reach. fused: one node reads the past of a layer.
    embeds: rows come as embeddings, not as ids.
    """

    def __init__(self, model: nn.Module, tokens: int, fused: bool = False, embeds: bool = False) -> None:
        super().__init__()
        self.model, self.rows = model, "inputs_embeds" if embeds else "input_ids"
        self.runtime = runtime_of(model)
        self.fused = fused and bool(getattr(model, "_supports_attention_backend", False))  # else attention is no function
        self.params: list[dict[str, Tensor]] = []
        shared: dict[int, Tensor] = {}  # equal tables are one tensor, so that the graph holds one initializer
        for i, plan in enumerate(self.runtime.plans):
            c, own = plan.codec, {}
            if c is not None:
                tables = self.runtime.params(i, c, tokens, torch.device("cpu"))
                for name, table in zip(c.param_names(), tables, strict=True):
                    if id(table) not in shared:
                        shared[id(table)] = table
                        self.register_buffer(f"{name}_{i}", table, persistent=False)
                    own[name] = shared[id(table)]
            self.params.append(own)
        self.orders = orders_of(self, self.runtime)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        cache = PackedPast(self.runtime, past, self.params, self.orders, self.fused)
        out = self.model(
            **{self.rows: input_ids},
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **given_cache(self.model, cache),
        )
        present = cache.present()
        return (out.logits, *(present[name] for name in past))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of exported graphs: one `Attend` node, keys and values not repeated for query groups."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    packed = _PACKED.found(key) or attend
    return packed(query, key, value, attention_mask, scale).transpose(1, 2), None


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


_register()

"""The packed cache as plain tensors in and out: what an exported graph holds in place of `KVSinkCache`, by the names of
`kvsink.export.state`.

Formula    a cache has C slots and holds as many tokens as the attention mask has columns, less the new ones; these are written
           behind them (`write_rows`), so that present and past may be one buffer. What stands in later slots nobody reads
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
from kvsink.export.nodes import Steps, attend, attend_packed, first_rows, lay_rows, preserve_sinks, write_rows
from kvsink.export.state import past_names
from kvsink.kernels import decode, dequantize, encode, quantize
from kvsink.kernels.backends import TABLES_BACK
from kvsink.model.frame import Frame
from kvsink.model.handover import Handover
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Runtime, runtime_of
from kvsink.model.turning import turns_back

__all__ = ["ATTENTION", "ExportedModel", "Orders", "PlainLayer", "Shared", "candidates_of", "orders_of", "takes_packed"]

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


def candidates_of(runtime: Runtime, layer: int, frame: Frame, positions: Tensor) -> list[Tensor]:
    """Scores and places of the new rows that may stay exact in a layer, a pair for every segment."""
    out: list[Tensor] = []
    for segment in runtime.plans[layer].segments:
        key = segment.key if segment.source != "massive" else f"{segment.key}@{layer}"
        if key not in frame.candidates:
            assert segment.source == "first" and frame.valid is not None, segment
            frame.candidates[key] = first_rows(positions.expand(frame.valid.shape), frame.valid, segment.count)
        out += frame.candidates[key]
    return out


class PlainLayer(CacheLayerMixin):
    """What transformers asks of a layer that holds `length` tokens; the mask, not the cache, applies a window."""

    is_sliding = False

    def __init__(self, past: dict[str, Tensor], length: Any) -> None:
        super().__init__()
        self.past, self.present, self.length = past, past, length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_seq_length(self) -> Any:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class _WholeLayer(PlainLayer):
    """A layer that kvsink leaves alone: rows as they came."""

    def __init__(self, past: dict[str, Tensor], cache: PackedPast, layer: int) -> None:
        super().__init__(past, cache.length)
        self.cache, self.layer = cache, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self._written(name, new) for name, new in (("key", key_states), ("value", value_states)))
        self.present = {"key": keys, "value": values}
        return self._shown(keys), self._shown(values)

    def _written(self, name: str, new: Tensor) -> Tensor:
        return write_rows(self.past[name], new, self.cache.first)

    def _shown(self, rows: Tensor) -> Tensor:
        """Rows [B, H, C, D] as attention takes them: our own function knows of the room behind the last."""
        return rows if self.cache.own_attention else rows[:, :, : self.cache.length + self.cache.new]


class _PackedLayer(_WholeLayer):
    """A packed layer: new rows are coded and written behind the past codes; all are decoded, new and exact rows laid over them."""

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
            present[name] = self._written(name, codes)
            if scale is not None:
                present[f"{name}_scale"] = self._written(f"{name}_scale", scale)
        held = [past[n] for n in ("exact_slot", "exact_score", "exact_key", "exact_value")] if c.segments else []
        kept: tuple[Tensor, ...] = ()
        if held:
            chosen = candidates_of(self.cache.runtime, self.layer, frame, positions)
            slot, score, *rows = preserve_sinks(*held, k, v, self.cache.first, chosen, list(c.segments))
            present |= {"exact_key": rows[0], "exact_value": rows[1], "exact_slot": slot, "exact_score": score}
            kept = (*rows, slot)
        self.present = present
        if self.cache.fused and takes_packed(c):
            _PACKED.leave(k, partial(self._attend, c, kept))
            return k, v
        every = []
        for side, name, new, place in (("k", "key", k, 0), ("v", "value", v, 1)):
            rows = _decode(c, side, present[name], present.get(f"{name}_scale"), p)
            if (c.key if side == "k" else c.value).packed:  # else they stand there as they came
                rows = rows.to(wide)
                if side == "k":
                    rows = c.restore_keys(rows, self.cache.positions(), p, steps=Steps)
                else:
                    rows = c.restore_values(rows, p, steps=Steps)
                rows = lay_rows(rows.to(new.dtype), new, self.cache.first, [kept[place], kept[2]] if kept else [])
            every.append(rows)
        keys, values = (self._shown(rows) for rows in every)
        return keys if order is None else keys.index_select(-1, order[1]), values

    def _attend(
        self, c: Codec, kept: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention output [B, Hq, S, D] as one node; q [B, Hq, S, D]."""
        p, codes, order = self.cache.params[self.layer], [], self.cache.orders[self.layer]
        q = q if order is None else q.index_select(-1, order[0])
        for name in ("key", "value"):
            stored = self.present[name]
            empty = stored.new_empty((*stored.shape[:-1], 0), dtype=torch.float16)
            codes += [stored, self.present.get(f"{name}_scale", empty)]
        params = [p[name] for name in c.param_names()]
        return attend_packed(q, k, v, mask, self.cache.positions(), codes, list(kept), params, scale, c.text())


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


class Shared:
    """What the hooks of a rewritten model write to: the frame of the running forward pass."""

    frame: Frame | None = None


class PackedPast(Cache):
    """The cache of one traced call; the hooks of a rewritten model fill its frame as they fill a KVSinkCache's."""

    is_kvsink = True

    def __init__(self, owner: ExportedModel, past: dict[str, Tensor], length: Any, new: Any, batch: Any) -> None:
        self.runtime, self.params, self.orders = owner.runtime, owner.params, owner.orders
        self.fused, self.own_attention = owner.fused, owner.own_attention
        self.length, self.new, self.past_positions = length, new, past["positions"]
        self.first = torch.full((batch,), length, dtype=torch.int64)
        self.shared = Shared()
        self.visual: Tensor | None = None
        self._new_positions: Tensor | None = None
        self._positions: Tensor | None = None
        layers: list[Any] = []
        for i, plan in enumerate(self.runtime.plans):
            own = {name: past[f"{i}.{name}"] for name in past_names(plan.codec)}
            layers.append((_WholeLayer if plan.codec is None else _PackedLayer)(own, self, i))
        super().__init__(layers=layers)

    def new_positions(self, frame: Frame, rows: Tensor) -> Tensor:
        """Positions of the new rows [B or 1, S]; without any from the model, their slots."""
        positions = frame.positions
        if positions is None:
            positions = torch.arange(rows.shape[2], device=rows.device)[None] + self.length
        if self._new_positions is None:
            self._new_positions = positions.expand(rows.shape[0], rows.shape[2])
        return positions

    def positions(self) -> Tensor:
        """Positions of all slots int32 [B, C], the new ones among them; those behind them are nobody's."""
        if self._positions is None:
            assert self._new_positions is not None
            self._positions = write_rows(self.past_positions, self._new_positions.to(torch.int32), self.first)
        return self._positions

    def present(self) -> dict[str, Tensor]:
        """What the call leaves, by graph name without prefix."""
        out = {"positions": self.positions()}
        for i, layer in enumerate(self.layers):
            out.update({f"{i}.{name}": tensor for name, tensor in layer.present.items()})
        return out


class ExportedModel(nn.Module):
    """(ids, mask, positions, past by name) -> (logits, present...): what is exported, and its definition in torch.

    tokens: positions it serves; block-start angles are a table of that reach. fused: one node reads the codes of a layer.
    embeds: rows come as embeddings, not as ids.
    """

    def __init__(self, model: nn.Module, tokens: int, fused: bool = False, embeds: bool = False) -> None:
        super().__init__()
        self.model, self.rows = model, "inputs_embeds" if embeds else "input_ids"
        self.runtime = runtime_of(model)
        self.own_attention = bool(getattr(model, "_supports_attention_backend", False))  # else it is no function
        self.fused = fused and self.own_attention
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
        batch, new = input_ids.shape[:2]
        cache = PackedPast(self, past, attention_mask.shape[1] - new, new, batch)
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

"""The `gqa` flavour: attention as com.microsoft::GroupQueryAttention over an int8 or packed int4 cache with fixed steps.

The operator codes new rows, joins them to the past and attends over the codes, new rows included. What it cannot do stands
around it and is exact: the mean of the values leaves before it and comes back after it, since shares of attention sum to one;
the mean of the keys, which RoPE turns with the position, comes back as a bias of every score.

Formula    k' = (R_j (k - mu)) H, q' = q H, so q'·k' = q·R_j k - q·R_j mu;  bias_ij = s q_i·R_j mu = s u_i·(cos_j, sin_j) with
           u = (q_a mu_a + q_b mu_b, q_b mu_a - q_a mu_b), a and b the halves of the rotary channels: one product with a table
           that all heads and layers share. Channels without RoPE add the same to all scores of a row, which softmax ignores
           v' = (v - nu) H;  o = o' H^T + nu
Source     ours; the operator is that of onnxruntime 1.31 and later
Shapes     q [B, Hq, S, D], k, v [B, H, S, D] after RoPE; past int8 [B, H, P, D] or uint8 [B, H, P, D / 2] (even channel low)
           lean, for CUDA, whose kernel takes no bias and is fast for one step of all channels alone: k'' = k' / step,
           q'' = q' step, o' = o'' step, codes of step 1. A row's slot is its position: the last one gives the length, of the
           attention mask the number of columns alone is read, which may be that of a cache with room
Exact      yes, up to the codes; positions of stored rows are those that the attention mask implies
Sinks      learned logits are the operator's head_sink; shares then sum to less than one, so no mean may leave
Declines   see `kvsink.export.flavours.gqa_refusal`
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvsink.codecs import Codec
from kvsink.export.asked import ASKED, register
from kvsink.export.past import PlainLayer, Shared, orders_of
from kvsink.kernels import stages
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.kernels.static import static_decode, static_encode
from kvsink.model.frame import Frame
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Runtime, runtime_of

__all__ = ["GQA_ATTENTION", "GQA_LEAN", "MASKED", "GroupQueryModel", "cache_bits", "empty_cache", "group_query"]

GQA_ATTENTION, GQA_LEAN = "kvsink_gqa", "kvsink_gqa_lean"
MASKED = -1e30  # finite, so that a row that sees nothing stays a number


def cache_bits(codec: Codec | None) -> int:
    """Bits of a layer's cache: 8, 4, or 32 where rows are kept as they are."""
    return codec.key.widths[0] if codec is not None and codec.key.packed else 32


def empty_cache(runtime: Runtime, batch: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A past of `length` slots by graph name; rows that are not coded have `dtype`."""
    a, out = runtime.anatomy, {}
    for i, plan in enumerate(runtime.plans):
        bits = cache_bits(plan.codec)
        kind = {8: torch.int8, 4: torch.uint8, 32: dtype}[bits]
        for name in ("key", "value"):
            out[f"{i}.{name}"] = torch.zeros(batch, a.kv_heads, length, a.head_dim // (2 if bits == 4 else 1), dtype=kind)
    return out


@torch.library.custom_op("kvsink_export::group_query", mutates_args=())
def group_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    bias: Tensor,
    k_step: Tensor | None,
    v_step: Tensor | None,
    scale: float,
    bits: int,
    sink: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One GroupQueryAttention node in plain torch: (output [B, S, Hq·D], present keys, present values); causal, bias added.

    bias: float [B, Hq or 1, S, P + S]; or the attention mask [B, P + S], all ones, and steps are 1. sink: learned logits [Hq] of a
    slot without a value, which takes its share of every row. last: int32 [B], with a mask, the slot of the last new row: P + S - 1
    here, and less in a graph whose mask has a column for every slot of a cache with room.
    """
    if bias.dim() == 2:
        bias = q.new_zeros(())
    present = [_join(past, x, step, bits) for past, x, step in ((past_k, k, k_step), (past_v, v, v_step))]
    groups = q.shape[1] // k.shape[1]
    keys, values = (
        _rows(x, step, bits).repeat_interleave(groups, dim=1) for x, step in zip(present, (k_step, v_step), strict=True)
    )
    rows, slots = q.shape[2], keys.shape[2]
    after = torch.ones(rows, slots, dtype=torch.bool).triu(slots - rows + 1)
    bias = bias.expand(q.shape[0], 1, rows, slots) if bias.dim() == 0 else bias
    bias = bias.masked_fill(after, MASKED)
    if sink is None:
        out = F.scaled_dot_product_attention(q, keys, values, bias, scale=scale)
    else:
        scores = torch.cat([scale * q @ keys.mT + bias, sink[:, None, None].expand(*q.shape[:3], 1)], dim=-1)
        out = scores.softmax(dim=-1)[..., :-1] @ values
    return out.transpose(1, 2).flatten(2), present[0], present[1]


@group_query.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    bias: Tensor,
    k_step: Tensor | None,
    v_step: Tensor | None,
    scale: float,
    bits: int,
    sink: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, s, d = q.shape
    made = [past.new_empty((b, past.shape[1], past.shape[2] + s, past.shape[3])) for past in (past_k, past_v)]
    return q.new_empty((b, s, h * d)), made[0], made[1]


def _join(past: Tensor, x: Tensor, step: Tensor | None, bits: int) -> Tensor:
    if step is None:
        return torch.cat([past, x], dim=2)
    codes = static_encode(x, step, bits)[0]
    return torch.cat([past, (codes ^ 128).view(torch.int8) if bits == 8 else codes], dim=2)


def _rows(codes: Tensor, step: Tensor | None, bits: int) -> Tensor:
    if step is None:
        return codes
    return static_decode(codes.view(torch.uint8) ^ 128 if bits == 8 else codes, step, bits)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    """Rows [B, H, S, D] times a matrix of every head [H, D, D], or a number of every channel [H, 1, D]."""
    return x * table if table.shape[1] == 1 else x @ table


def _tables(codec: Codec, params: dict[str, Tensor], groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What turns rows and divides them by their steps, and back, of a layer whose operator has steps of 1."""
    k_step, v_step, out = params["k_step"].double(), params["v_step"].double(), {}

    def turn(side: Any) -> Tensor:
        if side.transform != "hadamard" or (side is codec.value and side.folded):
            return torch.ones(1, 1, dtype=torch.float64)
        runs = k_step.shape[1] // side.order
        return torch.block_diag(*[hadamard_matrix(side.order).double()] * runs)

    out["to_k"], out["to_v"] = turn(codec.key) / k_step[:, None], turn(codec.value) / v_step[:, None]
    out["to_q"] = turn(codec.key) * k_step.repeat_interleave(groups, dim=0)[:, None]
    out["from_v"] = v_step.repeat_interleave(groups, dim=0)  # [Hq, D]
    return {name: table.to(dtype) for name, table in out.items()}


class _GroupQueryLayer(PlainLayer):
    """A layer whose new rows go to the operator as its codec turns them; `attend` does the rest when attention asks."""

    def __init__(self, past: dict[str, Tensor], cache: Any, layer: int) -> None:
        super().__init__(past, past["key"].shape[2])
        self.cache, self.layer = cache, layer
        codec = cache.runtime.plans[layer].codec
        self.codec: Codec | None = codec if codec is not None and codec.key.packed else None
        self.params: dict[str, Tensor] = cache.params[layer]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v, c, p = key_states, value_states, self.codec, self.params
        if c is not None and self.cache.lean:
            v = stages.center(v, p["v_mean"]).to(v.dtype) if c.value.center else v
            k, v = _turned(self._ordered(k), p["to_k"]), _turned(v, p["to_v"])
        elif c is not None:
            frame = self.cache.shared.frame or Frame()
            k = self._ordered(k)
            if c.key.center and frame.cos is not None and frame.sin is not None:
                k = stages.center_roped(k, p["k_mean"], *self.cache.runtime.canonical(self.layer, frame.cos, frame.sin))
            elif c.key.center:
                k = stages.center(k, p["k_mean"])
            k = self._turn(k, c.key)
            v = stages.center(v, p["v_mean"]) if c.value.center else v
            v = v if c.value.folded else self._turn(v, c.value)
            k, v = k.to(key_states.dtype), v.to(value_states.dtype)
        ASKED.leave(k, ref(self))
        return k, v

    def _ordered(self, x: Tensor) -> Tensor:
        """Queries or keys with their channels as keys are coded."""
        order = self.cache.orders[self.layer]
        return x if order is None else x.index_select(-1, order[0])

    def _turn(self, x: Tensor, side: Any, inverse: bool = False) -> Tensor:
        """Runs of `order` channels times the Hadamard matrix, as one product."""
        if side.transform != "hadamard":
            return x
        h = self.cache.hadamard[side.order].to(x.dtype)
        return (x.unflatten(-1, (-1, side.order)) @ (h.T if inverse else h)).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sink: Tensor | None = None) -> Tensor:
        """Attention output [B, S, Hq, D] of queries [B, Hq, S, D] over the past and the rows that `update` returned; sink [Hq]."""
        c, p, groups = self.codec, self.params, q.shape[1] // k.shape[1]
        if self.cache.lean:
            return self._attend_lean(q, k, v, scale)
        q = self._ordered(q)
        bias = self.cache.mask if mask is None else torch.where(mask, 0.0, MASKED)
        if c is not None and c.key.center and self.cache.turns(self.layer) is not None:
            bias = bias + scale * self._mean_scores(q, p["k_mean"].repeat_interleave(groups, dim=0))
        steps = (p["k_step"], p["v_step"]) if c is not None else (None, None)
        q = self._turn(q, c.key) if c is not None else q
        out, keys, values = group_query(q, k, v, self.past["key"], self.past["value"], bias, *steps, scale, cache_bits(c), sink)
        self.present = {"key": keys, "value": values}
        out = out.unflatten(-1, (q.shape[1], -1))
        if c is not None:
            out = out if c.value.folded else self._turn(out, c.value, inverse=True)
            out = out + p["v_mean"].repeat_interleave(groups, dim=0) if c.value.center else out
        return out

    def _attend_lean(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`attend` with steps of 1 inside the operator and their sizes outside of it."""
        c, p, groups, cache = self.codec, self.params, q.shape[1] // k.shape[1], self.cache
        bits, steps = cache_bits(c), (None, None) if c is None else (cache.one, cache.one)
        q = self._ordered(q) if c is None else _turned(self._ordered(q), p["to_q"])
        out, keys, values = group_query(
            q, k, v, self.past["key"], self.past["value"], cache.mask, *steps, scale, bits, None, cache.last
        )
        self.present = {"key": keys, "value": values}
        out = out.unflatten(-1, (q.shape[1], -1))
        if c is None:
            return out
        out = out * p["from_v"]
        out = out if c.value.folded else self._turn(out, c.value, inverse=True)
        return out + p["v_mean"].to(q.dtype).repeat_interleave(groups, dim=0) if c.value.center else out

    def _mean_scores(self, q: Tensor, mean: Tensor) -> Tensor:
        """q_i·R_j mu for all slots j, but for what is the same for all of them: [B, Hq, S, P + S]; mean [Hq, D]."""
        turns = self.cache.turns(self.layer)  # [B, 1, R, P + S]
        assert turns is not None
        half = turns.shape[2] // 2
        a, b = q[..., :half], q[..., half : 2 * half]
        mu_a, mu_b = mean[:, None, :half], mean[:, None, half : 2 * half]
        u = torch.cat([a * mu_a + b * mu_b, b * mu_a - a * mu_b], dim=-1)  # [B, Hq, S, R]
        # Heads are rows of one product: a product per head would read the angles of all slots for each of them.
        return (u.flatten(1, 2)[:, None] @ turns).reshape(*u.shape[:3], turns.shape[3])


class _GroupQueryPast(Cache):
    """The cache of one traced call."""

    is_kvsink = True

    def __init__(self, owner: GroupQueryModel, mask: Tensor, last: Tensor, past: dict[str, Tensor]) -> None:
        self.runtime, self.params, self.hadamard, self.table = owner.runtime, owner.params, owner.hadamard, owner.tables
        self.lean, self.mask, self.one, self.last = owner.lean, mask, owner.one, last
        self.orders = owner.orders
        self.shared = Shared()
        self.visual: Tensor | None = None
        self._positions = (mask.cumsum(1) - 1).clamp_min(0)
        self._turns: dict[str, Tensor] = {}
        layers: list[Any] = [
            _GroupQueryLayer({name: past[f"{i}.{name}"] for name in ("key", "value")}, self, i)
            for i in range(len(self.runtime.plans))
        ]
        super().__init__(layers=layers)

    def turns(self, layer: int) -> Tensor | None:
        """cos and sin of the positions of all slots, one below the other: [B, 1, R, P + S]; None without RoPE. Made once for
        layers alike."""
        kinds = self.runtime.anatomy.layer_types
        kind = kinds[layer] if kinds else ""
        if kind not in self.table:
            return None
        if kind not in self._turns:
            self._turns[kind] = self.table[kind][self._positions].transpose(1, 2)[:, None]
        return self._turns[kind]


class GroupQueryModel(nn.Module):
    """(ids, mask, positions, past by name) -> (logits, present...) for a model whose layers have fixed steps.

    tokens: positions it serves; the angles behind the mean of the keys are a table of that reach. lean: without bias, and the
    logits of the last row in float32 come behind those of all.
    """

    def __init__(self, model: nn.Module, tokens: int, lean: bool = False) -> None:
        super().__init__()
        self.model, self.runtime, self.lean = model, runtime_of(model), lean
        self.one: Tensor
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.params: list[dict[str, Tensor]] = []
        self.hadamard: dict[int, Tensor] = {}
        self.tables: dict[str, Tensor] = {}
        kinds = self.runtime.anatomy.layer_types
        for i, plan in enumerate(self.runtime.plans):
            c, own = plan.codec, {}
            if c is not None and c.key.packed:
                wanted = [n for n in c.param_names() if n in ("k_mean", "v_mean", "k_step", "v_step")]
                given = c.tables(self.runtime.params(i, c, tokens, torch.device("cpu")))
                tables = {n: given[n].float() for n in wanted}
                if lean:
                    heads, kv_heads, *_ = self.runtime.anatomy.layers[i]
                    dtype = next(model.parameters()).dtype
                    tables |= _tables(c, tables, heads // kv_heads, dtype)
                for name, table in tables.items():
                    self.register_buffer(f"{name}_{i}", table, persistent=False)
                    own[name] = getattr(self, f"{name}_{i}")
                for side in (c.key, c.value):
                    if side.transform == "hadamard" and side.order not in self.hadamard:
                        self.register_buffer(f"hadamard_{side.order}", hadamard_matrix(side.order).float(), persistent=False)
                        self.hadamard[side.order] = getattr(self, f"hadamard_{side.order}")
                kind = kinds[i] if kinds else ""
                if c.key.center and kind not in self.tables:
                    cos, sin = self.runtime.angles(i, torch.arange(tokens)[None])
                    if half := cos.shape[-1] // 2:
                        both = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)  # [tokens, R]
                        self.register_buffer(f"turns_{len(self.tables)}", both, persistent=False)
                        self.tables[kind] = getattr(self, f"turns_{len(self.tables)}")
            self.params.append(own)
        self.orders = orders_of(self, self.runtime)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _GroupQueryPast(self, attention_mask, position_ids[:, -1].to(torch.int32), past)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **given_cache(self.model, cache),
        )
        present = {f"{i}.{name}": tensor for i, layer in enumerate(cache.layers) for name, tensor in layer.present.items()}
        last = (out.logits[:, -1:].float(),) if self.lean else ()
        return (out.logits, *last, *(present[name] for name in past))


register(GQA_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
register(GQA_LEAN)

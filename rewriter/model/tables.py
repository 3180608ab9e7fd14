"""What the layers of a model are coded with: the plan of each, calibrated tensors and rotary angles, on the device that asks.

Shapes     cos, sin float32 [N, P, R] of positions [N, P]; calibrated tensors as `Codec.param_names` names them
Differs    a table in the order in which a kernel reads it is made once from the plain one, and kept
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvsink.codecs import Codec
from kvsink.codecs.codec import TABLE_TOKENS
from kvsink.codecs.protect import Segment
from kvsink.kernels.layout import TileTables, key_rows
from kvsink.kernels.stages import back_table
from kvsink.model.anatomy import Anatomy
from kvsink.model.turning import rotary_tables, turns_back

__all__ = ["LayerPlan", "Tables", "by_head"]


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer stores: its codec and the sources of its exact rows. `reason` says why it is left alone."""

    codec: Codec | None
    segments: tuple[Segment, ...] = ()
    reason: str = ""


def by_head(name: str, table: Tensor, heads: int) -> bool:
    """Whether a table has a row for every key-value head."""
    of_heads = name.startswith(("k_", "v_")) or name in ("tile_mean", "tile_rows", "tile_basis")
    return of_heads and table.dim() > 1 and table.shape[0] == heads


class Tables:
    """Plans, calibrated tables and rotary angles of one model.

    plans: one LayerPlan per layer; tables: tensors named `layers.{i}.{param}` (float32, or int64 permutations); where: what is
    known of the model; rotary: its module that gives the angles of RoPE, which is copied.
    """

    def __init__(
        self, plans: tuple[LayerPlan, ...], tables: Mapping[str, Tensor], where: Anatomy, rotary: nn.Module | None
    ) -> None:
        self.anatomy = where
        self.plans = plans
        self.tables = dict(tables)
        self._named = [f"layers.{i}." for i in range(len(plans))]  # in a graph with dynamic sizes no number becomes text
        self.rotary = copy.deepcopy(rotary).float() if rotary is not None else None
        self._tiles: dict[str, Tensor] = {}
        self._beyond_half: dict[int, bool] = {}
        self._rotary_channels: dict[int, int] = {}
        self._orders: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}
        self._starts: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
        self._turns = [f"{self._kind(i)} {turning}" for i, turning in enumerate(where.turnings)]  # equal for equal angles

    def keep(self, rank: int, ranks: int) -> None:
        """Leave the heads of one of `ranks` processes, which divide every layer's, in order; before anything is read."""
        layers = self.anatomy.layers
        for named, heads in zip(self._named, layers, strict=True):
            n = heads.kv // ranks
            for name, table in self.tables.items():
                if name.startswith(named) and by_head(name.removeprefix(named), table, heads.kv):
                    self.tables[name] = table[rank * n : (rank + 1) * n].clone()
        here = tuple(heads._replace(query=heads.query // ranks, kv=heads.kv // ranks) for heads in layers)
        self.anatomy = replace(self.anatomy, layers=here)

    def angles(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [N, P, R] of positions [N, P], attention scaling included; R = 0 without RoPE. Canonical, see
        `kvsink.model.turning`."""
        turning = self.anatomy.turnings[layer]
        if self.rotary is None or (turning is not None and not turning.channels):
            empty = torch.empty(1, positions.shape[-1], 0, device=positions.device)
            return empty, empty
        cos, sin = rotary_tables(self.rotary.to(positions.device), positions, self._kind(layer))
        return self.canonical(layer, cos.float(), sin.float())

    def frequencies(self) -> dict[str, list[float]]:
        """Radians per token of every pair of channels, and the scaling of angles, by kind of layer whose codec takes them back."""
        out: dict[str, list[float]] = {}
        for layer, plan in enumerate(self.plans):
            kind = self._kind(layer)
            if plan.codec is None or kind in out or not turns_back(plan.codec):
                continue
            cos, sin = (t[0, 0, : t.shape[-1] // 2].double() for t in self.angles(layer, torch.ones(1, 1, dtype=torch.int64)))
            if len(cos):
                out[kind] = [round(float(f), 12) for f in torch.cat((torch.atan2(sin, cos), torch.hypot(sin, cos)))]
        return out

    def canonical(self, layer: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own tables for a layer as canonical ones."""
        turning = self.anatomy.turnings[layer]
        return (cos, sin) if turning is None else turning.canonical(cos, sin)

    def order(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Channels of a key in canonical order, and of the canonical key in the model's: int64 [D] each. None where both are the
        same, or where the codec of the layer does not turn its keys back."""
        key = layer, str(device)
        if key not in self._orders:
            turning, plan = self.anatomy.turnings[layer], self.plans[layer]
            wanted = turning is not None and (plan.codec is None or turns_back(plan.codec))
            order = turning.order(self.anatomy.layers[layer].key_dim) if wanted and turning is not None else None
            index = None if order is None else torch.tensor(order, device=device)
            self._orders[key] = None if index is None else (index, index.argsort())
        return self._orders[key]

    def _kind(self, layer: int) -> str:
        return self.anatomy.layer_types[layer] if self.anatomy.layer_types else ""

    def start_angles(self, layer: int, block: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of the block starts 0, n, 2n, … for at least `rows` blocks: cos, sin [P + 1, R]. Cached and shared. The last row
        is NaN: whoever reads a position that the table does not reach, as only compiled code can, gets no other number."""
        key = self._turns[layer], block, str(device)
        held = self._starts.get(key)
        if held is None or held[0].shape[0] <= rows:
            whole = max(1, TABLE_TOKENS // block)
            rows = -(-max(rows, 16) // whole) * whole
            positions = torch.arange(rows, device=device)[None] * block
            cos, sin = self.angles(layer, positions)
            beyond = cos.new_full((1, cos.shape[-1]), math.nan)
            held = self._starts[key] = (torch.cat([cos[0], beyond]), torch.cat([sin[0], beyond]))
        return held

    def offset_angles(self, layer: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of the offsets 0 … block - 1 without attention scaling: cos, sin [block, R]."""
        cos, sin = self.angles(layer, torch.arange(block, device=device)[None])
        norm = (cos * cos + sin * sin).sqrt().clamp_min(1e-12)
        return (cos / norm)[0], (sin / norm)[0]

    def params(
        self, layer: int, codec: Codec, tokens: int, device: torch.device, given: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """The constant tables of one layer in the order its codec names them, for positions below `tokens`.

        given: tables that belong to the cache and not to the model, such as the anchors of its rows.
        """
        out = []
        for name in codec.param_names():
            if given and name in given:
                out.append(given[name])
            elif name.startswith("tile_"):
                out.append(self._tile_table(name, layer, codec, tokens, device))
            elif name in ("start_cos", "start_sin"):
                n = codec.table_tokens
                start = self.start_angles(layer, n, -(-tokens // n), device)
                out.append(start[name == "start_sin"])
            else:
                key = self._named[layer] + name
                table = self.tables[key]
                if table.device != device:
                    table = self.tables[key] = table.to(device)
                out.append(table)
        return out

    def beyond_half(self, layer: int, codec: Codec) -> bool:
        """Whether the basis of a layer's keys, in units of codes as the tile kernels take it, leaves float16's range."""
        if layer not in self._beyond_half:
            basis, sigma = (back_table(self.tables, f"layers.{layer}.k", n) for n in ("basis", "sigma"))
            self._beyond_half[layer] = False
            if basis is not None and sigma is not None and codec.key.kind in ("lloyd-even", "trellis"):
                rows = key_rows(basis, sigma, codec.key.widths, codec.key.kind)
                self._beyond_half[layer] = not bool(rows.half().isfinite().all())
        return self._beyond_half[layer]

    def _tile_table(self, name: str, layer: int, codec: Codec, tokens: int, device: torch.device) -> Tensor:
        """A table in the order in which the GPU kernel reads it, made once from the plain ones."""
        if name == "tile_turn":
            n = codec.table_tokens
            cos, sin = self.start_angles(layer, n, -(-tokens // n), device)
            key = f"turn.{self._turns[layer]}.{n}.{cos.shape[0]}@{device}"
            if key not in self._tiles:
                self._tiles[key] = TileTables.rotation(cos, sin)
            return self._tiles[key]
        key = f"layers.{layer}.{name}@{device}"
        if key not in self._tiles:
            prefix = f"layers.{layer}.k"
            given = *(back_table(self.tables, prefix, n) for n in ("basis", "sigma")), self.tables.get(f"{prefix}_table")
            basis, sigma, mean = (None if t is None else t.to(device) for t in given)
            if name == "tile_mean":
                assert mean is not None
                made = TileTables.mean(mean)
            elif name == "tile_rows":
                assert basis is not None
                made = basis.mT.contiguous()
            else:
                assert basis is not None and sigma is not None
                made = TileTables.basis(key_rows(basis, sigma, codec.key.widths, codec.key.kind))
            self._tiles[key] = made
        return self._tiles[key]

    def rotary_channels(self, layer: int) -> int:
        """Channels of a head that carry RoPE; 0 without it."""
        if layer not in self._rotary_channels:
            self._rotary_channels[layer] = self.angles(layer, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
        return self._rotary_channels[layer]

    def table_nbytes(self) -> int:
        """Bytes of the calibrated tables: weights of the method, not part of the cache."""
        return sum(t.numel() * t.element_size() for t in self.tables.values())

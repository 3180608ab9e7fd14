"""The codec of one layer: pure tensor functions from keys and values to what the cache stores, and back.

Formula    keys    x = R_d (k - mu) - mu2   with d = j mod n (domain "block"), or R_j (k - mu) (domain "post")
                   z = x U;  codes, scale = quantize(z)
                   k^ = R_{j - d} (z^ U^T + M[d]),  M[d] = R_d mu + mu2       (block)
                   k^ = z^ U^T + R_{j - d} M[d]                               (post)
                   z = (R_j k - mu) U, k^ = z^ U^T + mu, mu the mean after RoPE (post, with a klt)
           values  z = (v - mu) U;  v^ = z^ U^T + mu
           metric  where errors are measured by what attention makes of them, U is not orthogonal, and U^-1 stands for U^T
           axis "channel": z, divided by the norm of its token where the side says so, is coded by blocks of tokens
           (kvsink.kernels.tokens, .varn);  outliers: z^ = z at the entries of a record (kvsink.kernels.sparse)
Source     ours (`klt`); with U a Hadamard matrix and n = 1 it is RotateKV (arXiv 2501.16383), without U it is plain
           per-token quantization
Shapes     k, v [B, H, S, D]; positions int [B or 1, S]; codes uint8 [B, H, S, bytes]; scale float16 [B, H, S, n]
Exact      every transform has its inverse, so without quantization k^ = k up to rounding of the arithmetic (float32)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsink.errors import SidecarError, UnsupportedError
from kvsink.kernels import layout, stages
from kvsink.kernels.backends import KNOWN_STAGES, LayerFormat, LayerState, SideFormat, layer_format
from kvsink.kernels.base import set_codec_resolver
from kvsink.kernels.sparse import lay_sparse, record_size
from kvsink.kernels.tokens import dequantize_tokens, open_blocks, quantize_tokens, token_norm
from kvsink.kernels.varn import varn_decode, varn_encode, varn_numbers

from .anchors import Anchors
from .quantizers import QUANTIZERS
from .spec import SideSpec
from .steps import At, Stage, functions_of, stages_back, stages_in

__all__ = ["ANCHOR_NAMES", "SHARED_NAMES", "STATE_NAMES", "TABLE_TOKENS", "Codec", "Params"]

Params = Mapping[str, Tensor]

TABLE_TOKENS = 64  # rows of the mean table of a "post" codec: its blocks exist only to make the table finite

STATE_NAMES = LayerState._fields

SHARED_NAMES = ("positions", "real")  # of all layers: int32 and bool [B, L]; real is False where a slot holds padding

ANCHOR_NAMES = ("recent_score",)  # state that only the choice of anchors reads and writes


@dataclass(frozen=True)
class Codec:
    """Both sides of one layer and the rows it keeps exact.

    segments: capacity of each protection segment, in rows; window: recent rows kept exact; strict: new rows are read
    back from their codes like old ones (for evaluation); anchors: rows chosen by the attention they receive, whose
    places follow those of the segments and grow with the slots. tiles: codes stand in the order of `kvsink.kernels.layout`;
    a cache decides so when it is made, a rewritten model's plan never does; uneven: a cache has seen positions that do not all
    run as far ahead of their slots, which not every kernel reads.
    """

    key: SideSpec
    value: SideSpec
    segments: tuple[int, ...] = ()
    window: int = 0
    strict: bool = False
    anchors: Anchors | None = None
    tiles: bool = False
    uneven: bool = False

    def __post_init__(self) -> None:
        if self.value.norm:
            raise UnsupportedError(f"norm is for keys only, in {self.value!r}")
        if self.value.metric != "none" and self.value.spread == "none":
            raise UnsupportedError(f"metric={self.value.metric!r} is for keys only where nothing is spread, in {self.value!r}")

    @property
    def ring(self) -> int:
        """Recent rows held as they came: what the window and the unfinished blocks of either side need."""
        return max(self.window, *(max(s.flush, s.newest) for s in (self.key, self.value) if s.packed), 0)

    @property
    def opaque(self) -> bool:
        """True when coding is no chain of the same steps per row (codes in tiles, blocks of tokens, records of outliers, visual
        rows, rows beyond float16's range or exact on one side alone): compiled graphs then keep it inside the cache ops."""
        together = any(s.by_token_block or s.outliers or s.exponent for s in (self.key, self.value))
        return self.tiles or together or self.ring > self.window or self.modal

    @property
    def exact_rows(self) -> int:
        """Capacity of the protection segments in the exact side store, in rows per sequence; anchors come on top."""
        return sum(self.segments)

    def exact_places(self, slots: int) -> int:
        """Places of the exact side store of a cache with `slots` slots, anchors included."""
        return self.exact_rows + (self.anchors.capacity(slots) if self.anchors is not None else 0)

    @property
    def modal(self) -> bool:
        """Whether visual rows are coded otherwise than text: `append_` then takes a last candidate, bool [B, S]."""
        return bool(self.key.visual_bits or self.value.visual_bits)

    @property
    def table_tokens(self) -> int:
        """Tokens of a block: the period of the mean table and of the start angles."""
        return self.key.block if self.key.domain == "block" else TABLE_TOKENS

    @cached_property
    def format(self) -> LayerFormat:
        """The same as kernels see it; one object for equal formats."""
        key, value = (
            SideFormat(**{f: getattr(s, f) for f in _TOLD}, beyond=_beyond(s, prefix))
            for s, prefix in ((self.key, "k"), (self.value, "v"))
        )
        rest = self.segments, self.window, self.ring, self.table_tokens, self.strict, self.anchors is not None, self.uneven
        return layer_format(key, value, *rest, "mma" if self.tiles else "row")

    def in_tiles(self) -> Codec:
        """The same with codes in tiles; one object, which knows its text and its format from then on."""
        return self._tiled

    @cached_property
    def _tiled(self) -> Codec:
        return replace(self, tiles=True)

    def text(self) -> str:
        """Canonical JSON; equal codecs have equal text."""
        return self._text

    @cached_property
    def _text(self) -> str:
        record = {
            "key": self.key.as_dict(),
            "value": self.value.as_dict(),
            "segments": list(self.segments),
            "window": self.window,
            "strict": self.strict,
        }
        if self.anchors is not None:
            record["anchors"] = asdict(self.anchors)
        if self.tiles:
            record["tiles"] = True
        if self.uneven:
            record["uneven"] = True
        return json.dumps(record, sort_keys=True, separators=(",", ":"))

    @staticmethod
    @cache
    def parse(text: str) -> Codec:
        """The codec of a canonical text."""
        try:
            record = json.loads(text)
            return Codec(
                key=SideSpec.from_dict(record["key"]),
                value=SideSpec.from_dict(record["value"]),
                segments=tuple(int(n) for n in record.get("segments", ())),
                window=int(record.get("window", 0)),
                strict=bool(record.get("strict", False)),
                anchors=Anchors(**record["anchors"]) if "anchors" in record else None,
                tiles=bool(record.get("tiles", False)),
                uneven=bool(record.get("uneven", False)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SidecarError(f"codec record {text[:80]!r} cannot be read ({error}); rewrite the model again") from error

    def param_names(self) -> tuple[str, ...]:
        """Names of the constant tables this codec needs, in the order ops receive them."""
        k, v, names = self.key, self.value, []
        if self.tiles:
            return self._tile_param_names()
        if k.packed:
            before = k.domain == "block" or k.transform != "klt"
            if k.center and before:
                names += ["k_mean", "k_table"]
            if k.domain == "block" and k.block > 1:
                names += ["offset_cos", "offset_sin"]
            if k.domain == "block" or (k.center and before):
                names += ["start_cos", "start_sin"]
            if k.transform in ("klt", "grouped"):
                names += [*(["k_mean2"] if k.center else []), "k_basis", *(["k_unbasis"] if k.own_inverse else [])]
            if k.reorder:
                names += ["k_perm", "k_unperm"]
            names += QUANTIZERS[k.kind].tables(k, "k")
        if v.packed:
            if v.center:
                names += ["v_mean"]
            if v.transform == "klt":
                names += ["v_basis", *(["v_unbasis"] if v.own_inverse else [])]
            names += QUANTIZERS[v.kind].tables(v, "v")
        return tuple(names)

    def tables(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The constant tables, as ops receive them, by name."""
        return dict(zip(self.param_names(), params, strict=True))

    @cached_property
    def _starts(self) -> int:
        names = self.param_names()
        return names.index("start_cos") if "start_cos" in names else -1

    def rotary(self, params: Sequence[Tensor]) -> int:
        """Channels of the table of block starts; 0 where there is none."""
        return params[self._starts].shape[-1] if self._starts >= 0 else 0

    def _tile_param_names(self) -> tuple[str, ...]:
        """The tables of a codec in tiles: those of its reference, and `tile_` ones in the order a kernel reads them."""
        k, v, names = self.key, self.value, []
        if k.center:
            names += ["k_table", "start_cos", "start_sin", "origin_cos", "origin_sin", "tile_mean", "tile_turn"]
        if k.transform == "klt":
            names += ["k_basis", *(["k_unbasis"] if k.own_inverse else []), "tile_rows", "tile_basis"]
        names += QUANTIZERS[k.kind].tables(k, "k")
        names += ["v_mean"] if v.center else []
        return (*names, *QUANTIZERS[v.kind].tables(v, "v"))

    # -- storage -----------------------------------------------------------------------------------------------------

    def row_bytes(self, side: SideSpec, dim: int) -> int:
        """Width of the code tensor of one side: bytes when packed, channels when kept in 16 bit."""
        if self.tiles:
            return layout.tile_bytes(side.widths, side.kind)
        return QUANTIZERS[side.kind].row_bytes(side, dim) if side.packed else dim

    def row_scales(self, side: SideSpec, dim: int) -> int:
        """float16 numbers stored beside the codes of one row."""
        return QUANTIZERS[side.kind].row_scales(side, dim) if side.packed else 0

    def layout(
        self, batch: int, heads: int, key_dim: int, value_dim: int, slots: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """Shape, dtype and first fill of every state tensor of one layer: STATE_NAMES in their order, then ANCHOR_NAMES."""

        def codes(side: SideSpec, dim: int) -> tuple[tuple[int, ...], torch.dtype, float]:
            return (batch, heads, slots, self.row_bytes(side, dim)), torch.uint8 if side.packed else dtype, 0

        def scale(side: SideSpec, dim: int) -> tuple[tuple[int, ...], torch.dtype, float]:
            if side.by_token_block:
                group, size = side.group_tokens, side.group_size
                numbers = varn_numbers(side.axis, dim, group, size) if side.varn else 2 * dim
                return (batch, heads, -(-slots // group), numbers), torch.float16, 0
            one = side.packed and QUANTIZERS[side.kind].scale_of_token
            return (batch, 1 if one else heads, slots, self.row_scales(side, dim)), torch.float16, 0

        def record(side: SideSpec, prefix: str, channels: int) -> tuple[int, ...]:
            m = self.record_size(prefix, channels)
            return (batch, -(-slots // side.outlier_tokens) if m else 0, m)

        e, w, normed = self.exact_places(slots), self.ring, self.key.packed and self.key.norm
        return {
            "k_codes": codes(self.key, key_dim),
            "k_scale": scale(self.key, key_dim),
            "v_codes": codes(self.value, value_dim),
            "v_scale": scale(self.value, value_dim),
            "exact_k": ((batch, heads, e, key_dim), dtype, 0),
            "exact_v": ((batch, heads, e, value_dim), dtype, 0),
            "exact_slot": ((batch, e), torch.int32, -1),
            "exact_score": ((batch, e), torch.float32, float("-inf")),
            "recent_k": ((batch, heads, w, key_dim), dtype, 0),
            "recent_v": ((batch, heads, w, value_dim), dtype, 0),
            "recent_slot": ((w,), torch.int32, -1),
            "length": ((), torch.int64, 0),
            "k_norm": ((batch, 1, slots if normed else 0, 1), torch.float16, 0),
            "k_sparse": (record(self.key, "k", heads * key_dim), torch.float16, 0),
            "k_sparse_at": (record(self.key, "k", heads * key_dim), torch.int16, -1),
            "v_sparse": (record(self.value, "v", heads * value_dim), torch.float16, 0),
            "v_sparse_at": (record(self.value, "v", heads * value_dim), torch.int16, -1),
            "recent_score": ((batch, w if self.anchors is not None else 0), torch.float32, 0),
        }

    def record_size(self, side: str, channels: int) -> int:
        """Outliers kept per block of tokens; 0 when none are, or when their share of a token's values is less than one."""
        s = self.key if side == "k" else self.value
        if not s.packed or not s.outliers or (side == "v" and not round(s.outliers / 2 * channels)):
            return 0
        return record_size(s.outliers, channels, s.outlier_tokens)

    @staticmethod
    def named(state: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state of a layer, as ops receive it, by name."""
        return dict(zip(STATE_NAMES, state, strict=True))

    # -- the quantizers ------------------------------------------------------------------------------------------------

    def encode_block(self, x: Tensor, s: SideSpec, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Transformed rows [B, H, N, D] of whole groups of tokens → codes, scale, and the norm of each token."""
        if s.varn:
            return *varn_encode(x, valid, s.axis, s.widths[0], s.group_tokens, s.group_size, s.varn), None
        norm = token_norm(x) if s.norm else None
        x = x if norm is None else x / norm.to(x.dtype)
        return *quantize_tokens(x, valid, s.widths[0], s.group_tokens), norm

    def quantize(self, side: str, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Transformed rows of side "k" or "v" → (codes, scale); of blocks of tokens, the first one begins with the rows."""
        s = self.key if side == "k" else self.value
        if not s.by_token_block:
            return QUANTIZERS[s.kind].encode(x, s, p, side)
        rows = x.shape[2]
        x = F.pad(x, (0, 0, 0, -rows % s.group_tokens))
        valid = (torch.arange(x.shape[2], device=x.device) < rows).expand(x.shape[0], -1)
        codes, scale, _ = self.encode_block(x, s, valid)
        return codes[:, :, :rows], scale

    def dequantize(self, side: str, codes: Tensor, scale: Tensor, p: Params, skip: int = 0) -> Tensor:
        """The inverse of `quantize` up to its rounding, float32; codes begin `skip` rows into their first group of tokens."""
        s = self.key if side == "k" else self.value
        if not s.by_token_block:
            return QUANTIZERS[s.kind].decode(codes, scale, s, p, side)
        if s.varn:
            return varn_decode(codes, scale, s.axis, s.widths[0], s.group_tokens, s.group_size, skip)
        return dequantize_tokens(codes, scale, s.widths[0], s.group_tokens, skip)

    def table_names(self, side: str) -> tuple[str, ...]:
        """Names of the tables of one side's quantizer."""
        spec = self.key if side == "k" else self.value
        return QUANTIZERS[spec.kind].tables(spec, side)

    def row_channels(self, side: str, tables: Sequence[Tensor]) -> int:
        """Channels of one row, as widths or the codebook say."""
        spec = self.key if side == "k" else self.value
        return 8 * len(spec.widths) if spec.widths else tables[-1].shape[1] * spec.couple

    def _stored(self, st: Params, s: SideSpec, p: Params, prefix: str, start: int, end: int) -> Tensor:
        """The packed rows of slots start … end - 1, in the basis of the quantizer."""
        codes, scale = st[f"{prefix}_codes"], st[f"{prefix}_scale"]
        if self.tiles:
            codes = layout.fetch(codes, s.widths, prefix, s.kind, start, end - start)
            return QUANTIZERS[s.kind].decode(codes, scale[:, :, start:end], s, p, prefix)
        codes = codes[:, :, start:end]
        if not s.by_token_block:
            x = self.dequantize(prefix, codes, scale[:, :, start:end], p)
            if not st[f"{prefix}_sparse"].shape[2]:
                return x
            return lay_sparse(x, st[f"{prefix}_sparse"], st[f"{prefix}_sparse_at"], start, s.outlier_tokens)
        g = s.group_tokens
        x = self.dequantize(prefix, codes, scale[:, :, start // g : -(-end // g)], p, start % g)
        return x * st[f"{prefix}_norm"][:, :, start:end].float() if s.norm else x

    def read_keys(self, st: Params, p: Params, start: int, end: int, wide: torch.dtype = torch.float32) -> Tensor:
        """Slots start … end - 1 of a state by name → keys after RoPE [B, H, end - start, D], computed in `wide`."""
        if not self.key.packed:
            return st["k_codes"][:, :, start:end].to(wide)
        x = self._stored(st, self.key, p, "k", start, end).to(wide)
        if self.tiles:
            slots = torch.arange(start, end, device=x.device)
            return layout.restore_keys(x, slots, self.key, p, lambda rows: self._rotate_keys(rows, inverse=True))
        return self.restore_keys(x, st["positions"][:, start:end], p)

    def read_values(self, st: Params, p: Params, start: int, end: int, wide: torch.dtype = torch.float32) -> Tensor:
        """Slots start … end - 1 of a state by name → values [B, H, end - start, D], computed in `wide`."""
        if not self.value.packed:
            return st["v_codes"][:, :, start:end].to(wide)
        return self.restore_values(self._stored(st, self.value, p, "v", start, end).to(wide), p)

    def dense_range(self, side: str, scale: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Offset and range of the dense codes: [1, 1, C] of the channels, or [B, N, 1] of the tokens with `scale`."""
        if side == "k":
            return p["k_offset"].flatten()[None, None], p["k_range"].flatten()[None, None]
        half, middle = scale[:, 0].float().split(1, dim=-1)
        return middle, torch.where(half > 0, half, torch.ones_like(half))

    def store_tiles(self, k: Tensor, v: Tensor, slots: Tensor, st: Params, p: Params) -> None:
        """Code new rows, keys after RoPE, and write them to their slots int64 [S] of a state in tiles."""
        x = layout.transform_keys(k, slots, self.key, p, self._rotate_keys)
        for prefix, side, rows in (("k", self.key, x), ("v", self.value, self.transform_values(v, p))):
            codes, scale = QUANTIZERS[side.kind].encode(rows, side, p, prefix)
            layout.store(st[f"{prefix}_codes"], codes, slots, side.widths, prefix, side.kind)
            st[f"{prefix}_scale"].index_copy_(2, slots, scale)

    def _rotate_keys(self, x: Tensor, inverse: bool = False) -> Tensor:
        return stages.hadamard_heads(x, self.key.order, inverse=inverse)

    def exact_recent(self, side: SideSpec, recent_slot: Tensor, total: Tensor | int) -> Tensor:
        """Slots of the ring that `side` reads as they came when `total` rows are held; -1 for the others."""
        return open_blocks(recent_slot, total, side.flush, max(self.window, side.newest))

    # -- keys --------------------------------------------------------------------------------------------------------

    def encode_keys(self, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, p: Params, roped: bool) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, D], after RoPE when `roped` else before it → (codes, scale)."""
        s = self.key
        if not s.packed:
            full = k if roped else stages.rope_rows(k, cos, sin)
            return full, k.new_empty((*k.shape[:-1], 0), dtype=torch.float16)
        return self.quantize("k", self.transform_keys(k, cos, sin, positions, p, roped), p)

    def transform_keys(
        self, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, p: Params, roped: bool, steps: Any = stages
    ) -> Tensor:
        """Keys [B, H, S, D] through every stage before the quantizer. `steps` carries out the stages, by their names."""
        s, x = self.key, _ranged(_wide(k), -self.key.exponent)
        at = At(p, positions, cos, sin, s.block)
        return _through(stages_in(s, "k", roped), steps, x, at)

    def decode_keys(self, codes: Tensor, scale: Tensor, positions: Tensor, p: Params, wide: torch.dtype = torch.float32) -> Tensor:
        """Packed keys of the slots with `positions` [B, L] → keys after RoPE [B, H, L, D], computed in `wide`."""
        s = self.key
        if not s.packed:
            return codes.to(wide)
        return self.restore_keys(self.dequantize("k", codes, scale, p).to(wide), positions, p)

    def restore_keys(self, x: Tensor, positions: Tensor, p: Params, steps: Any = stages) -> Tensor:
        """The stages of `transform_keys` taken back, last first; keys after RoPE."""
        x = _through(stages_back(self.key, "k"), steps, x, At(p, positions, block=self.table_tokens))
        return _ranged(x, self.key.exponent)

    # -- values ------------------------------------------------------------------------------------------------------

    def encode_values(self, v: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Values [B, H, S, D] → (codes, scale)."""
        s = self.value
        if not s.packed:
            return v, v.new_empty((*v.shape[:-1], 0), dtype=torch.float16)
        return self.quantize("v", self.transform_values(v, p), p)

    def transform_values(self, v: Tensor, p: Params, steps: Any = stages) -> Tensor:
        """Values [B, H, S, D] through every stage before the quantizer."""
        return _through(stages_in(self.value, "v"), steps, _ranged(_wide(v), -self.value.exponent), At(p))

    def decode_values(self, codes: Tensor, scale: Tensor, p: Params, wide: torch.dtype = torch.float32) -> Tensor:
        """Packed values → values [B, H, L, D], computed in `wide`."""
        s = self.value
        if not s.packed:
            return codes.to(wide)
        return self.restore_values(self.dequantize("v", codes, scale, p).to(wide), p)

    def restore_values(self, x: Tensor, p: Params, steps: Any = stages) -> Tensor:
        """The stages of `transform_values` taken back, last first."""
        return _ranged(_through(stages_back(self.value, "v"), steps, x, At(p)), self.value.exponent)


_TOLD = tuple(f.name for f in fields(SideFormat) if f.name != "beyond")
_READ = (*_TOLD, "bits", "clip", "shared", "axis", "group_tokens", "outlier_tokens", "visual_clip", "weights", "flat")
"""Fields of a side that kernels are told of, read off the side itself, or have no use for."""
_SETTINGS = {"domain": ("post", "block"), "transform": ("none", "hadamard", "klt"), "axis": ("token", "channel")}
"""Fields that are words, with the words that kernels know."""


def _beyond(s: SideSpec, prefix: str) -> tuple[str, ...]:
    """Names of what a side declares and no kernel was written for: other fields, other words, other stages."""
    if not s.packed:
        return ()
    names = [f.name for f in fields(s) if f.name not in _READ and getattr(s, f.name) != f.default]
    names += [getattr(s, field) for field, words in _SETTINGS.items() if getattr(s, field) not in words]
    names += ["klt after RoPE"] if prefix == "k" and s.transform == "klt" and s.domain == "post" else []
    return (*names, *(name for name in functions_of(s, prefix) if name not in KNOWN_STAGES))


def _through(chain: Sequence[Stage], do: Any, x: Tensor, at: At) -> Tensor:
    for stage in chain:
        x = stage.run(do, x, at)
    return x


def _ranged(x: Tensor, exponent: int) -> Tensor:
    """x·2^exponent, exact."""
    return x * 2.0**exponent if exponent else x


def _wide(x: Tensor) -> Tensor:
    """What transforms are computed in: float32, or float64 where the model is."""
    return x if x.dtype == torch.float64 else x.float()


set_codec_resolver(Codec.parse)

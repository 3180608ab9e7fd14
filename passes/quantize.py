"""Code the NEW rows, store them, and read every row back through the stages taken back.

Formula    codes, scale = quantize(x);  state[length .. length + S - 1] = codes, scale;  x^ = undo(dequantize(state))
           on a stock cache: x^ = undo(dequantize(quantize(x))) replaces the new row on its way into the cache
           kinds that are not scalar do the same through `kvsink.encode` and `kvsink.decode`
           codecs over blocks of tokens or with outliers keep the cache's own `append_` and `read`, which `fuse` takes over
Source     see the quantizer of the codec, `kvsink.kernels.quantize`, `vector`, `nuq`
Differs    no
Shapes     x [B, Hkv, S, D] float32 → codes uint8 [B, Hkv, S, bytes], scale float16 [B, Hkv, S, n]
           → x^ [B, Hkv, L or S, D]
Exact      no: |x^ - x| <= scale / 2 per element for uniform quantizers without clipping
Declines   sites without a codec; codecs with a stage that no pass before this one put in
Cost       see `kvsink.kernels.quantize`; the read-back of all rows is what `fuse` removes
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import value
from kvsink.passes.base import Declined, RewritePass, Work, register_pass
from kvsink.passes.chain import Chain, Side


@register_pass
@dataclass(frozen=True)
class Quantize(RewritePass):
    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ("attach", "center", "rotate", "reorder")
    before: ClassVar[tuple[str, ...]] = ("preserve", "fuse")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None:
            return site.declined("no codec is attached")
        if chain.fault:
            return site.declined(chain.fault)
        if not chain.packed and not chain.keys.spec.packed and not chain.values.spec.packed:
            return site.declined("its codec keeps keys and values in 16 bit")
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        if chain.opaque:
            assert chain.read is not None
            chain.keys.full = chain.read  # the markers stay as they are: they store and read blocks of tokens
            return
        if chain.packed:
            _open_slots(chain)
        for side in chain.sides:
            codes, scale = _encode(chain, side)
            positions = chain.positions
            if chain.packed:
                codes, scale = _store(chain, side, codes, scale)
                positions = chain.state["positions"]
            side.full = _decode(chain, side, codes, scale, positions)


def _open_slots(chain: Chain) -> None:
    """The slots of the new rows, and their positions stored."""
    at, state, k = chain.keys.write_at, chain.state, chain.keys.new
    device = value(state["length"]).device
    rows = chain.size(at, k, 2)
    chain.slots = chain.put(at, torch.add, state["length"], chain.put(at, torch.arange, rows, device=device))
    new = chain.put(at, "expand", chain.positions, chain.size(at, k, 0), rows)
    chain.put(at, "index_copy_", state["positions"], 1, chain.slots, chain.put(at, "to", new, value(state["positions"]).dtype))


def _encode(chain: Chain, side: Side) -> tuple[Node, Node | None]:
    spec, at = side.spec, side.write_at
    if not spec.packed:
        return side.x, None
    if QUANTIZERS[spec.kind].scalar:
        sigma = chain.params.get(f"{side.prefix}_sigma")
        op = torch.ops.kvsink.quantize.default
        pair = chain.put(at, op, side.x, sigma, spec.kind, list(spec.widths), spec.group_size, spec.clip, spec.gain)
    else:
        op = torch.ops.kvsink.encode.default
        pair = chain.put(at, op, side.x, _tables(chain, side), chain.codec_text, side.prefix)
    return chain.put(at, operator.getitem, pair, 0), chain.put(at, operator.getitem, pair, 1)


def _tables(chain: Chain, side: Side) -> list[Node]:
    return [chain.params[name] for name in QUANTIZERS[side.spec.kind].tables(side.spec, side.prefix)]


def _store(chain: Chain, side: Side, codes: Node, scale: Node | None) -> tuple[Node, Node | None]:
    at, stored = side.write_at, chain.state[f"{side.prefix}_codes"]
    if not side.spec.packed:
        codes = chain.put(at, "to", codes, value(stored).dtype)
    chain.put(at, "index_copy_", stored, 2, chain.slots, codes)
    if scale is not None:
        chain.put(at, "index_copy_", chain.state[f"{side.prefix}_scale"], 2, chain.slots, scale)
    return stored, chain.state[f"{side.prefix}_scale"]


def _decode(chain: Chain, side: Side, codes: Node, scale: Node | None, positions: Node) -> Node:
    spec, at, dtype = side.spec, side.read_at, value(side.new).dtype
    if not spec.packed:
        return chain.put(at, "clone", chain.put(at, "to", codes, dtype)) if chain.packed else codes
    if QUANTIZERS[spec.kind].scalar:
        sigma = chain.params.get(f"{side.prefix}_sigma")
        op = torch.ops.kvsink.dequantize.default
        x = chain.put(at, op, codes, scale, sigma, spec.kind, list(spec.widths), spec.group_size, spec.gain)
    else:
        op = torch.ops.kvsink.decode.default
        x = chain.put(at, op, codes, scale, _tables(chain, side), chain.codec_text, side.prefix)
    if dtype == torch.float64:
        x = chain.put(at, "to", x, dtype)
    return chain.put(at, "to", chain.leave(side, x, positions), dtype)

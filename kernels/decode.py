"""Codes back through the quantizer of a codec, for kinds that need tables: the inverse of `encode` up to its rounding.

Formula    x^ = Q^-1(codes, scale) with the quantizer of side "k" or "v" of the codec
Source     see `vector` and `nuq`
Shapes     codes uint8 [B, H, S, bytes], scale float16 [B, H or 1, S, n], params: the tables, in the codec's order
           → x^ float32 [B, H, S, D]
Exact      yes: a pure function of the codes
Cost       a table look-up per code
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op, resolve_codec
from .encode import EXAMPLES as ENCODE_EXAMPLES
from .encode import encode_ref

__all__ = ["decode", "decode_ref"]


def decode_ref(codes: Tensor, scale: Tensor, params: Sequence[Tensor], codec: str, side: str) -> Tensor:
    """The definition, for any device."""
    c = resolve_codec(codec)
    return c.dequantize(side, codes, scale, dict(zip(c.table_names(side), params, strict=True))).contiguous()


def _outputs(codes: Tensor, scale: Tensor, params: Sequence[Tensor], codec: str, side: str) -> Tensor:
    dim = resolve_codec(codec).row_channels(side, params)
    return codes.new_empty((*codes.shape[:-1], dim), dtype=torch.float32)


@torch.library.custom_op("kvsink::decode", mutates_args=())
def decode(codes: Tensor, scale: Tensor, params: Sequence[Tensor], codec: str, side: str) -> Tensor:
    return decode_ref(codes, scale, params, codec, side)


decode.register_fake(_outputs)


def _from_encode(make: Callable[[torch.Generator], Mapping[str, Any]]) -> Callable[[torch.Generator], Mapping[str, Any]]:
    def example(g: torch.Generator) -> Mapping[str, Any]:
        a = dict(make(g))
        codes, scale = encode_ref(**a)
        return dict(codes=codes, scale=scale, params=a["params"], codec=a["codec"], side=a["side"])

    return example


def _cost(**a: Any) -> Cost:
    out = _outputs(**a)
    return Cost(flops=2 * out.numel(), read=nbytes(a["codes"], a["scale"]), written=4 * out.numel())


SPEC = register_op(
    OpSpec(name="decode", op=decode, ref=decode_ref, cost=_cost, examples=tuple(_from_encode(e) for e in ENCODE_EXAMPLES))
)

"""Rows through the quantizer of a codec, for kinds that need tables: the one step of the graph that the codec text explains.

Formula    codes, scale = Q(x) with the quantizer of side "k" or "v" of the codec
Source     see `vector`, `nuq` and `trellis`
Shapes     x [B, H, S, D] after the stages before the quantizer; params: its tables, in the codec's order
           → codes uint8 [B, H, S, bytes], scale float16 [B, H or 1, S, n]
Exact      no
Cost       vector: 2·2^b·D flops per row and head; nuq: 2^b comparisons per entry at most; trellis: see there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op, resolve_codec

__all__ = ["EXAMPLES", "encode", "encode_ref"]


def _params(codec: str, side: str, params: Sequence[Tensor]) -> Mapping[str, Tensor]:
    c = resolve_codec(codec)
    return dict(zip(c.table_names(side), params, strict=True))


def encode_ref(x: Tensor, params: Sequence[Tensor], codec: str, side: str) -> tuple[Tensor, Tensor]:
    """The definition, for any device."""
    codes, scale = resolve_codec(codec).quantize(side, x, _params(codec, side, params))
    return codes.contiguous(), scale.contiguous()


def _outputs(x: Tensor, params: Sequence[Tensor], codec: str, side: str) -> tuple[Tensor, Tensor]:
    b, h, s, d = x.shape
    layout = resolve_codec(codec).layout(b, h, d, d, s, x.dtype)
    (codes, codes_dtype, _), (scale, scale_dtype, _) = layout[f"{side}_codes"], layout[f"{side}_scale"]
    return x.new_empty(codes, dtype=codes_dtype), x.new_empty(scale, dtype=scale_dtype)


@torch.library.custom_op("kvsink::encode", mutates_args=())
def encode(x: Tensor, params: Sequence[Tensor], codec: str, side: str) -> tuple[Tensor, Tensor]:
    return encode_ref(x, params, codec, side)


encode.register_fake(_outputs)


def _vector(
    couple: int, code_bits: int, gain: bool, side: str, kind: str = "vector"
) -> Callable[[torch.Generator], Mapping[str, Any]]:
    spec = f'{{"bits":{code_bits / couple},"kind":"{kind}","couple":{couple},"code_bits":{code_bits},"gain":{str(gain).lower()}}}'

    def make(g: torch.Generator) -> Mapping[str, Any]:
        book = torch.randn(3, 32 // couple, 2**code_bits, couple, generator=g)
        codec = f'{{"key":{spec},"value":{spec}}}'
        return dict(x=torch.randn(2, 3, 7, 32, generator=g), params=[book], codec=codec, side=side)

    return make


def _nuq(bits: int, side: str) -> Callable[[torch.Generator], Mapping[str, Any]]:
    field = f'"bits":{bits}.0,"kind":"nuq","widths":{[bits] * 4}'
    codec = f'{{"key":{{{field},"domain":"block","block":1}},"value":{{{field}}}}}'

    def make(g: torch.Generator) -> Mapping[str, Any]:
        levels = torch.randn(2**bits, generator=g).sort().values
        static = [torch.randn(3, 32, generator=g), torch.rand(3, 32, generator=g) + 1.0] if side == "k" else []
        params = [*static, levels, 1.1 * levels]
        return dict(x=torch.randn(2, 3, 7, 32, generator=g), params=params, codec=codec, side=side)

    return make


def _trellis(widths: tuple[int, ...], side: str) -> Callable[[torch.Generator], Mapping[str, Any]]:
    spec = f'{{"bits":2.0,"kind":"trellis","widths":{list(widths)}}}'

    def make(g: torch.Generator) -> Mapping[str, Any]:
        sigma = torch.rand(3, 8 * len(widths), generator=g) + 0.5
        x = torch.randn(2, 3, 7, 8 * len(widths), generator=g)
        return dict(x=x, params=[sigma], codec=f'{{"key":{spec},"value":{spec}}}', side=side)

    return make


EXAMPLES = (
    _vector(4, 8, False, "k"),
    _vector(8, 10, True, "v"),
    _vector(16, 5, False, "v"),
    _vector(8, 8, False, "k", "vector-normed"),
    _nuq(2, "k"),
    _nuq(3, "v"),
    _trellis((4, 3, 2, 1), "k"),
    _trellis((2, 2, 2), "v"),
    _trellis((5, 2, 1), "k"),
)


def _cost(**a: Any) -> Cost:
    table = a["params"][-1]  # deviations [H, D], code points [2^b] or codebooks [H, D/c, 2^b, c]
    return Cost(
        flops=2 * a["x"].numel() * (64 if table.dim() == 2 else table.shape[-2 if table.dim() > 1 else -1]),
        read=nbytes(a["x"]),
        written=sum(t.numel() * t.element_size() for t in _outputs(**a)),
    )


SPEC = register_op(OpSpec(name="encode", op=encode, ref=encode_ref, cost=_cost, examples=EXAMPLES))

"""Functions of ONNX in the making: a body that takes nodes one after another, and codes of few bits as bytes.

Formula    a byte of 1, 2, 4 or 8 bit codes becomes values by one look-up in a table of 256 rows; other widths are cut out of words
           of up to 24 bits, in float32, since CUDA has no shifts
Shapes     codes [.., count] of `width` bits <-> bytes uint8 [.., count * width / 8, rounded up]
Exact      yes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvsink.kernels.packing import packed_bytes

__all__ = ["HALF_MAX", "Body", "look_up", "pack", "pack_any", "unpack"]

HALF_MAX = 65504.0


class Body:
    """Nodes of one function in the making: `b.Add(x, y)` appends a node and returns the name of its output."""

    def __init__(self, dtype: str = "float32") -> None:
        self.kind = np.dtype(dtype)
        self.nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}

    def __getattr__(self, op: str) -> Callable[..., Any]:
        from onnx import helper

        def call(*inputs: str, outputs: int = 1, **attributes: Any) -> Any:
            names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
            return names[0] if outputs == 1 else names

        return call

    def const(self, value: Any, dtype: Any = None) -> str:
        """A constant, of the type the body computes in by default; equal ones are one node."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype=self.kind if dtype is None else dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.Constant(value=numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def cast(self, x: str, to: str) -> str:
        from onnx import TensorProto

        return str(self.Cast(x, to=getattr(TensorProto, to)))

    def number(self, x: str) -> str:
        """Cast to the type the body computes in."""
        from onnx import helper

        return str(self.Cast(x, to=helper.np_dtype_to_tensor_dtype(self.kind)))

    def widened(self, x: str) -> str:
        """A float32 table or product in the type the body computes in."""
        return self.number(x) if self.kind == np.float64 else x

    def half(self, x: str) -> str:
        """Rounded to float16, saturating."""
        return self.cast(self.Clip(x, self.const(-HALF_MAX), self.const(HALF_MAX)), "FLOAT16")

    def reshape(self, x: str, *shape: int) -> str:
        return str(self.Reshape(x, self.ints(*shape)))

    def reduce(self, op: str, x: str, axis: int = -1, keep: bool = True) -> str:
        return str(getattr(self, op)(x, self.ints(axis), keepdims=int(keep)))

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        return str(self.Slice(x, self.ints(start), self.ints(stop), self.ints(axis)))

    def size(self, x: str, axis: int) -> str:
        """One dimension as int64 [1]."""
        return str(self.Shape(x, start=axis, end=axis + 1))

    def empty_scale(self, codes: str) -> str:
        return self.cast(self.slice(codes, 0, 0, 3), "FLOAT16")


def pack(b: Body, codes: str, width: int, count: int) -> str:
    """Codes of `width` bits (any number type, [.., count]) → bytes, as `kvsink.kernels.packing.pack_bits`."""
    if width == 8:
        return b.cast(codes, "UINT8")
    if 8 % width == 0:
        per = 8 // width
        fields = b.Mul(b.number(codes), b.const([1 << (i % per * width) for i in range(count)]))
        return b.cast(b.reduce("ReduceSum", b.reshape(fields, 0, 0, 0, count // per, per), keep=False), "UINT8")
    return pack_any(b, codes, width, count)


def pack_any(b: Body, codes: str, width: int, count: int) -> str:
    """Codes of 1 to 12 bits in any count, as `kvsink.kernels.packing.pack_codes`."""
    if width == 8:
        return b.cast(codes, "UINT8")
    size = packed_bytes(count, width)
    shifted = b.Mul(b.Unsqueeze(b.number(codes), b.ints(-1)), b.const([2.0**-i for i in range(width)]))
    bits = _low_bits(b, b.Floor(shifted), 1)
    bits = b.reshape(bits, 0, 0, 0, count * width)
    if rest := 8 * size - count * width:
        bits = b.Pad(bits, b.ints(0, 0, 0, 0, 0, 0, 0, rest))
    word = b.Mul(b.reshape(bits, 0, 0, 0, size, 8), b.const([1 << i for i in range(8)]))
    return b.cast(b.reduce("ReduceSum", word, keep=False), "UINT8")


def _low_bits(b: Body, x: str, width: int) -> str:
    """x mod 2**width of whole numbers below 2**24 in float32, exactly; CUDA has no shifts."""
    above = b.Floor(b.Mul(x, b.const(2.0**-width)))
    return str(b.Sub(x, b.Mul(above, b.const(2.0**width))))


def unpack(b: Body, packed: str, width: int, count: int) -> str:
    """Bytes → codes [.., count] as int32, any width from 1 to 12."""
    if width == 8:
        return b.cast(packed, "INT32")
    if width in (3, 6) and not count * width % 24:  # whole words of three bytes
        per, whole = 24 // width, count * width // 24
        shares = b.Mul(b.number(packed), b.const(np.tile(256.0 ** np.arange(3), whole)))
        word = b.reduce("ReduceSum", b.reshape(shares, 0, 0, 0, whole, 3))
        word = b.Floor(b.Mul(word, b.const(2.0 ** (-width * np.arange(per)))))
        return b.cast(b.reshape(_low_bits(b, word, width), 0, 0, 0, count), "INT32")
    last = packed_bytes(count, width) - 1
    bit = np.arange(count) * width
    words = b.number(packed)  # at most three bytes of one: whole numbers below 2**24
    word = b.Gather(words, b.ints(*(bit // 8)), axis=3)
    for byte in range(1, -(-(width + 7) // 8)):
        more = b.Gather(words, b.ints(*np.minimum(bit // 8 + byte, last)), axis=3)
        word = b.Add(word, b.Mul(more, b.const(256.0**byte)))
    word = b.Floor(b.Mul(word, b.const(2.0 ** -(bit % 8))))
    return b.cast(_low_bits(b, word, width), "INT32")


def look_up(b: Body, packed: str, width: int, count: int, table: Any, dtype: Any = None) -> str:
    """Bytes → table[code] [.., count], of the type the body computes in by default."""
    if 8 % width:
        return str(b.Gather(b.const(table, dtype), unpack(b, packed, width, count)))
    per = 8 // width
    byte = np.arange(256)[:, None] >> (width * np.arange(per)) & ((1 << width) - 1)
    rows = b.Gather(b.const(np.asarray(table)[byte], dtype), b.cast(packed, "INT32"))  # [.., bytes, per]
    return b.reshape(rows, 0, 0, 0, count)

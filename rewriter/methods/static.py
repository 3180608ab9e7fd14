"""Fixed steps per channel of centred, rotated rows: what onnxruntime's GroupQueryAttention stores, made from what `centred` does.

Variants: rotated, without centring (what the mean costs); plain, without any transform (the cache as others fill it).

Source     ours; the quantizer is that of com.microsoft::GroupQueryAttention in onnxruntime (k_quant_type PER_CHANNEL)
Differs    steps are those of least squared error on calibration rows, not the largest value seen
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

_SIDE = SideSpec(bits=4, center=True, transform="hadamard", kind="static")
_ROTATED = replace(_SIDE, center=False)
_PLAIN = replace(_ROTATED, transform="none")

STATIC = register_method(
    Method(
        name="static",
        summary="mean removed, Hadamard, one fixed step per channel: leaves ONNX as GroupQueryAttention",
        source=Paper("ours"),
        key=_SIDE,
        value=_SIDE,
        key_bits=4,
        value_bits=4,
        variants={"plain": {"key": _PLAIN, "value": _PLAIN}, "rotated": {"key": _ROTATED, "value": _ROTATED}},
    )
)

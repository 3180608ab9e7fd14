"""Fixed steps per channel of centred, rotated rows: what onnxruntime's GroupQueryAttention stores, made from what `centred` does.

Source     ours; the quantizer is that of com.microsoft::GroupQueryAttention in onnxruntime (k_quant_type PER_CHANNEL)
Differs    steps are those of least squared error on calibration rows, not the largest value seen
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

STATIC = register_method(
    Method(
        name="static",
        summary="mean removed, Hadamard, one fixed step per channel: leaves ONNX as GroupQueryAttention",
        source=Paper("ours"),
        key=SideSpec(bits=4, center=True, transform="hadamard", kind="static"),
        value=SideSpec(bits=4, center=True, transform="hadamard", kind="static"),
        key_bits=4,
        value_bits=4,
    )
)

"""`static` without centring: what the mean costs.

Source     ours; the quantizer is that of com.microsoft::GroupQueryAttention in onnxruntime (k_quant_type PER_CHANNEL)
Differs    steps are those of least squared error on calibration rows, not the largest value seen
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

STATIC_ROTATED = register_method(
    Method(
        name="static-rotated",
        summary="Hadamard, one fixed step per channel",
        source=Paper("ours"),
        key=SideSpec(bits=4, transform="hadamard", kind="static"),
        value=SideSpec(bits=4, transform="hadamard", kind="static"),
        key_bits=4,
        value_bits=4,
    )
)

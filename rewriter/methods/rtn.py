"""Round to nearest: every token by its own minimum and maximum, after RoPE. The plainest baseline.

Source     the per-token quantizer that KIVI (arXiv 2402.02750, section 3) and KVQuant (arXiv 2401.18079) compare against
Differs    one group per head (at most 128 channels); scale and minimum in float16
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

RTN = register_method(
    Method(
        name="rtn",
        summary="per token, asymmetric, no transform",
        source=Paper("2402.02750", "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "ICML 2024"),
        key=SideSpec(bits=2, kind="uniform"),
        value=SideSpec(bits=2, kind="uniform"),
        key_bits=4,
        value_bits=4,
    )
)

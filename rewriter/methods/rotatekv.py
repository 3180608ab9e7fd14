"""RotateKV: keys rotated across heads before RoPE and sorted by their mean, values rotated per head, massive rows exact.

Source     arXiv 2501.16383 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

ROTATEKV = register_method(
    Method(
        name="rotatekv",
        summary="grouped-head Hadamard before RoPE, channels sorted by mean, per token",
        source=Paper(
            "2501.16383",
            "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
            "IJCAI 2025",
            code="ZunhaiSu/RotateKV@3055e2b",
            differs=(
                "the step divides by 2**bits - 1; the released code has bits**2 - 1, which differs at 3 bits",
                "channel order is calibrated on text that is not measured afterwards",
                "a group of channels is the largest divisor of the head dimension up to 128",
                "rows may enter the exact store while decoding; the release protects rows of the prompt only",
            ),
        ),
        key=SideSpec(bits=2, domain="block", block=1, transform="hadamard", heads_per_group=4, reorder=True, kind="uniform-int"),
        value=SideSpec(bits=2, transform="hadamard", kind="uniform-int"),
        key_bits=2,
        value_bits=2,
        protect="massive:20",
        clip_at={1: 0.8, 2: 0.8},
        claims=(
            Claim("wikitext2/ppl increase below", 0.3, "Llama-2-13B, 2 bit", "arXiv 2501.16383, abstract"),
            Claim("gsm8k decrease below, percent", 1.7, "model not stated there, 2 bit", "arXiv 2501.16383, abstract"),
        ),
    )
)

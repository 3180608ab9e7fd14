"""OScaR: keys rotated after RoPE and divided by one norm per token, then per channel; values rotated, per token.

Source     arXiv 2605.19660 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_README = "released code of arXiv 2605.19660, README"

OSCAR = register_method(
    Method(
        name="oscar",
        summary="Hadamard after RoPE, one norm per token, keys per channel over 32 tokens; blocks of 128",
        source=Paper(
            "2605.19660",
            "OScaR",
            "2026",
            differs=(
                "the norm of a token is stored in float16; the released code keeps float32",
                "the minimum of a group is stored as it is; the released code rounds the zero point to whole steps",
                "blocks close at 128 tokens; the released kernels close them at 256",
                "a token whose norm is zero in float16 is divided by one",
                "a head dimension that is no power of two is rotated in shorter runs",
                "padding is left out of the ranges",
            ),
        ),
        key=SideSpec(bits=2, transform="hadamard", kind="uniform", axis="channel", group_tokens=32, flush=128, norm=True),
        value=SideSpec(bits=2, transform="hadamard", kind="uniform", group_size=32, flush=128),
        key_bits=2,
        value_bits=2,
        claims=(
            Claim("longbench-e/average", 41.75, "Llama-3.1-8B, INT2 (16 bit 41.70)", _README),
            Claim("longbench-e/average", 48.74, "Qwen3-8B, INT2 (16 bit 49.56)", _README),
            Claim("ocrbench", 856.0, "Qwen3-VL-8B, INT2 (16 bit 858)", _README),
            Claim("ocrbench", 519.0, "LLaVA-1.6-7B, INT2 (16 bit 536)", _README),
            Claim("throughput, times that of bfloat16", 4.1, "Qwen3-8B, H20, batch 48, context 4K", _README),
        ),
    )
)

"""KVarN: Hadamard after RoPE, then scales of tokens and of channels that even out their variance, 128 first rows exact.

Source     arXiv 2606.03458
Differs    see `source.differs`
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_TABLE = "arXiv 2606.03458v1, table"
_SIDE = SideSpec(bits=2, transform="hadamard", kind="uniform", group_tokens=128, flush=128, varn=8)

KVARN = register_method(
    Method(
        name="kvarn",
        summary="Hadamard after RoPE, a scale for every token and for every channel of a block of 128; no calibration",
        source=Paper(
            "2606.03458",
            "KVarN: Variance-Normalized KV-Cache Quantization Mitigates Error Accumulation in Reasoning Tasks",
            code="huawei-csl/KVarN",
            differs=(
                "scales, steps and minima are float16, as in the released code; the paper counts 8 bits for two of them",
                "the pair of scales that is kept is chosen by ratios of deviations, as in the code; the paper's are of variances",
                "what ships in vLLM is 4-bit keys over 2-bit values: --key-bits 4",
                "rows of an unfinished block stay exact; new rows are exact for each other unless reading is strict",
                "padding and rows kept exact are left out of all scales",
                "a head dimension that is no power of two is rotated in shorter runs",
            ),
        ),
        key=replace(_SIDE, axis="channel"),
        value=_SIDE,
        key_bits=2,
        value_bits=2,
        protect="first:128",
        claims=(
            Claim("aime24", 60.0, "Qwen3-4B, 2 bit, 128 first and up to 128 recent rows exact (16 bit 61.1)", f"{_TABLE} 1"),
            Claim("math500", 79.2, "Qwen3-4B, the same (16 bit 82.6)", f"{_TABLE} 1"),
            Claim("aime24", 61.7, "Phi-4-14B reasoning-plus, the same (16 bit 62.2)", f"{_TABLE} 1"),
            Claim("humaneval", 88.4, "Qwen3-4B, the same (16 bit 88.8)", f"{_TABLE} 2"),
            Claim("line retrieval, 600 lines", 85.0, "Qwen3-4B, the same (16 bit 90)", f"{_TABLE} 4"),
        ),
    )
)

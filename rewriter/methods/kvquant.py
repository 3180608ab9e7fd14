"""KVQuant: keys per channel before RoPE in calibrated ranges, values per token, code points learnt with Fisher weights.

Source     arXiv 2401.18079 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_PPL = "wikitext2/ppl"
_TABLE = "arXiv 2401.18079v6, main table"

KVQUANT = register_method(
    Method(
        name="kvquant",
        summary="non-uniform code points, keys per channel before RoPE, values per token, first row exact; -1% keeps outliers",
        source=Paper(
            "2401.18079",
            "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
            "NeurIPS 2024",
            code="SqueezeAILab/KVQuant",
            differs=(
                "weights are F·r^2 as the paper's appendix has them; the released code takes F",
                "rows kept exact are left out of the ranges too, not of the code points alone",
                "code points are fitted to 4096 bins of the normalised entries, the best of 16 starts",
                "Q-Norm is on at 2 bits and below, folded into the code points of reading",
                "a constant vector has range 1",
                "calibration is the record's, not 16 sequences of 2048 tokens",
                "with outliers (kvquant-1%): entries compete for a record of fixed size per block of tokens, by their distance "
                "from the range in units of the entry; the released code keeps all, or a capped number per token",
                "values whose share of outliers is below one entry per token keep none",
                "an outlier takes 32 bits, value and index; the release adds a pointer per token",
            ),
        ),
        key=SideSpec(bits=2, domain="block", block=1, kind="nuq", weights="fisher"),
        value=SideSpec(bits=2, kind="nuq", weights="fisher"),
        key_bits=2,
        value_bits=2,
        protect="first:1",
        claims=(
            Claim(_PPL, 5.68, "LLaMA-7B, 16 bit, context 2K", _TABLE),
            Claim(_PPL, 7.23, "LLaMA-7B, 2 bit, context 2K", _TABLE),
            Claim(_PPL, 6.01, "LLaMA-7B, 2 bit, 1 % outliers, context 2K", _TABLE),
            Claim(_PPL, 7.04, "LLaMA-3-8B, 2 bit, context 8K", _TABLE),
            Claim(_PPL, 6.04, "LLaMA-3-8B, 2 bit, 1 % outliers, context 8K", _TABLE),
            Claim(_PPL, 6.84, "Mistral-7B, 2 bit, context 8K", _TABLE),
            Claim(_PPL, 5.14, "Mistral-7B, 2 bit, 1 % outliers, context 8K", _TABLE),
        ),
    )
)

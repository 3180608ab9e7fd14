"""CQ: neighbouring channels of a head share one code of a codebook learnt with Fisher weights; keys before RoPE.

Source     arXiv 2405.03917
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_PPL = "wikitext2/ppl"
_TABLE = "arXiv 2405.03917, main table"

CQ = register_method(
    Method(
        name="cq",
        summary="coupled channels in Fisher-weighted codebooks, keys before RoPE",
        source=Paper(
            "2405.03917",
            "KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization",
            "NeurIPS 2024",
            differs=(
                "no code was published; everything is from the formulas",
                "k-means stops at a relative change below 1e-4 or 100 steps (8 on a CPU, on at most 8192 rows)",
                "a cluster without weight moves to the row with the largest weighted error",
                "several k-means++ seeds are drawn at once when there are more than 128 centroids",
                "calibration is the record's, not 16 sequences of 2048 tokens",
                "4c9b and 8c12b are settings of ours",
            ),
        ),
        key=SideSpec(bits=2, domain="block", block=1, kind="vector", weights="fisher"),
        value=SideSpec(bits=2, kind="vector", weights="fisher"),
        key_bits=2,
        value_bits=2,
        claims=(
            Claim(_PPL, 5.68, "LLaMA-7B, 16 bit, context 2K", _TABLE),
            Claim(_PPL, 8.09, "LLaMA-7B, CQ-8c8b, 1 bit, context 2K", _TABLE),
            Claim(_PPL, 32.12, "LLaMA-7B, CQ-8c8b without Fisher weights, context 2K", _TABLE),
            Claim(_PPL, 7.25, "Mistral-7B, 1 bit", "arXiv 2506.19505, abstract"),
        ),
    )
)

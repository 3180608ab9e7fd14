"""TaSQ: keys before RoPE in codebooks of eight channels each, weighed by causal queries, normed over all heads and regrouped.

Codebooks are 2,048 bytes a channel of every layer, on either side: 4 bits an element of one sequence of 4,096 tokens, beside those
that are counted.

Source     arXiv 2610.03027 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_PAGE = "authors' project page"

TASQ = register_method(
    Method(
        name="tasq",
        summary="codebooks of 8 channels; keys before RoPE weighed by causal queries, normed once a token, pairs regrouped",
        source=Paper(
            "2610.03027",
            "TaSQ",
            code="mscheong01/TaSQ@f7381d2",
            differs=(
                "codebooks, 2,048 bytes a channel and side in each layer, are not in the counted bits, as in the source",
                "groups come from a matching that is good, not the least; see kvsink.calibrate.grouping",
                "Fisher weights go with the square of norm over weight, by the chain rule (not verified)",
                "k-means leaves no outliers out (not verified); seeding and its steps are those of cq here",
                "every eighth query is looked at; calibration is the record's, not 48 windows of GPQA and 16 of Python",
                "the basis is a table of its own; the release folds it into codebooks and projections",
                "other widths than 1.25 take the couplings of cq",
            ),
        ),
        key=SideSpec(
            bits=1.25, domain="block", block=1, transform="grouped", metric="attention", kind="vector-normed", weights="fisher"
        ),
        value=SideSpec(bits=1.25, kind="vector", weights="fisher"),
        key_bits=1.25,
        value_bits=1.25,
        window=64,
        claims=(
            Claim("gsm8k", 81.73, "Llama-3.1-8B, 1.26 bit, 64 recent rows exact (16 bit 83.62)", _PAGE),
            Claim("math500", 34.0, "Llama-3.1-8B, the same (16 bit 42.20)", _PAGE),
            Claim("aime25", 56.67, "Qwen3-4B-Thinking, 64 first and 256 recent rows exact (16 bit 74.44)", _PAGE),
            Claim("niah 64k", 93.2, "Llama-3.1-8B (16 bit 98.2)", _PAGE),
            Claim("niah 64k", 81.5, "Qwen3-4B-Thinking (16 bit 95.3)", _PAGE),
        ),
    )
)

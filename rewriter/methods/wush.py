"""WUSH-KV: keys and values in bases that need not be orthogonal, made of what is stored and of what reads it; 2 bits per token.

Source     arXiv 2609.38121
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_SIDE = SideSpec(bits=2, transform="klt", metric="attention", spread="balanced", kind="uniform-quantile")
_TASKS, _PPL = "Qwen3-8B, 2 bit, 64 first and 256 recent rows exact", "arXiv 2609.38121v1, table 1"

WUSH = register_method(
    Method(
        name="wush",
        summary="rows and what reads them balanced by a dense transform of each head, keys after RoPE; clipped ranges per token",
        source=Paper(
            "2609.38121",
            "WUSH-KV",
            differs=(
                "no code was published; everything is from the formulas, in the simple form of the transform",
                "exact rows are those of the paper's perplexity, 16 first and 128 recent; its tasks had 64 and 256",
                "ranges are those of the paper's tasks, which end at the 0.96 and 0.92 quantile of a row at 2 bits; other widths, "
                "for which none are published, take the whole range",
                "step and minimum are float16 (the paper does not say)",
                "values are transformed when they are stored and read, not in the weights: equal in real arithmetic",
                "every eighth query is looked at, and rows kept exact are left out of the moments of keys and values",
                "calibration is the record's, not 4.2 million tokens of windows of 32,768",
                "where queries are not shown or no plain projection follows, that factor is the identity",
            ),
        ),
        key=_SIDE,
        value=_SIDE,
        key_bits=2,
        value_bits=2,
        protect="first:16",
        window=128,
        clip_at={2: 0.96},
        value_clip_at={2: 0.92},
        claims=(
            Claim("wikitext2/ppl", 10.51, "Qwen3-8B, length 2048, 2 bit, another quantizer (16 bit 9.72)", _PPL),
            Claim("aime25", 46.7, f"{_TASKS} (16 bit 67.8)", "arXiv 2609.38121v1, table 2"),
            Claim("livecodebench", 35.2, f"{_TASKS} (16 bit 47.8)", "arXiv 2609.38121v1, table 2"),
            Claim("ruler/niah 128k", 57.3, f"{_TASKS} (16 bit 79.2)", "arXiv 2609.38121v1, table 4"),
        ),
    )
)

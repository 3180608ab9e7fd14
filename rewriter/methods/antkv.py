"""AnTKV: coupled codes whose centroids are weighted by how far an error of their token reaches into the attention output.

Source     arXiv 2506.19505
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_PPL = "wikitext2/ppl"

ANTKV = register_method(
    Method(
        name="antkv",
        summary="coupled channels in codebooks weighted by error propagation, keys before RoPE",
        source=Paper(
            "2506.19505",
            "AnTKV: Anchor Token-Aware Sub-Bit Vector Quantization for KV Cache in Large Language Models",
            differs=(
                "no code was published; weights are the factors of theorem 3.1, in closed form",
                "weights have mean 1 per window and are clipped at their 99.9 % quantile (not verified)",
                "keys are coded before RoPE (not verified)",
                "couplings per budget follow CQ; 32c12b for 0.375 bit is inferred",
                "anchors by attention mass, summed over heads; the paper's simplified score could not be read (not verified)",
                "a window of 128 recent rows (not verified); anchors go on collecting score while they are held",
                "calibration is the record's (the paper's was not verified)",
            ),
        ),
        key=SideSpec(bits=1, domain="block", block=1, kind="vector", weights="error"),
        value=SideSpec(bits=1, kind="vector", weights="error"),
        key_bits=1,
        value_bits=1,
        protect="anchors:1%",
        window=128,
        claims=(
            Claim(_PPL, 4.73, "Mistral-7B, 16 bit (text presumed)", "arXiv 2506.19505, abstract"),
            Claim(_PPL, 6.32, "Mistral-7B, 1 bit, 1 % anchors (text presumed)", "arXiv 2506.19505, abstract"),
            Claim(_PPL, 8.87, "Mistral-7B, 0.375 bit, 1 % anchors (text presumed)", "arXiv 2506.19505v1, abstract"),
        ),
    )
)

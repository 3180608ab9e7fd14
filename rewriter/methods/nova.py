"""NOVA-KV: keys after RoPE in the basis in which errors count as queries count them, four channels a code; values as oscar-int2.

Source     arXiv 2608.04074, from its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_PAGE = "authors' project page"

NOVA = register_method(
    Method(
        name="nova",
        summary="query-whitened keys after RoPE, centred, four channels a code with a gain; values rotated, clipped ranges",
        source=Paper(
            "2608.04074",
            "NOVA-KV: Spend Bits Where Queries Look",
            code="Amir-zsh/nova-kv@d81c77b",
            differs=(
                "the moment of queries is damped by 0.01 of its mean diagonal; the release damps nothing",
                "groups have nearly equal products of variance, as reviews of the paper say; the release deals out in turn",
                "the scale of a row is fitted to its code vectors by least squares; the release takes its rms",
                "centroids are float16 (the release: 8 bits), 512 bytes a channel of keys in each layer, not in the counted bits",
                "k-means is that of cq here; the release has 25 steps from random rows",
                "calibration is the record's, not 198 prompts of GPQA; every eighth query is looked at",
                "values as in oscar-int2",
            ),
        ),
        key=SideSpec(bits=2, center=True, transform="klt", metric="attention", kind="vector", gain=True),
        value=SideSpec(bits=2, transform="klt", metric="directions", spread="hadamard", kind="uniform-quantile"),
        key_bits=2,
        value_bits=2,
        protect="first:64",
        window=256,
        value_clip_at={2: 0.92},
        claims=(
            Claim("ruler/niah 64k", 76.4, "Qwen3-8B, 64 first and 256 recent rows exact (16 bit 84.3)", _PAGE),
            Claim("ruler/niah 128k", 75.4, "Qwen3-8B, the same (16 bit 83.4)", _PAGE),
            Claim("mean of 5 generation tasks", 72.4, "gpt-oss-20b, the same (16 bit 76.5)", _PAGE),
        ),
    )
)

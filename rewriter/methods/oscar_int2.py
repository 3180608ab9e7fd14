"""OSCAR: keys and values rotated to the directions that attention reads, then by Hadamard; clipped ranges per token, 2 bits.

Not OScaR, whose name here is `oscar`.

Source     arXiv 2605.17757 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_SIDE = SideSpec(bits=2, transform="klt", metric="directions", spread="hadamard", kind="uniform-quantile")
_README = "released code of arXiv 2605.17757, README"

OSCAR_INT2 = register_method(
    Method(
        name="oscar-int2",
        summary="eigenvectors of queries and of values by score, then Hadamard, after RoPE; clipped ranges per token",
        source=Paper(
            "2605.17757",
            "OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization",
            "2026",
            differs=(
                "a rotation for every head, as the release has had since August 2026; the paper has one a layer",
                "the release's order of channels is left out: with one range for all of a row it changes nothing",
                "step and minimum are float16, as the paper counts them; published scripts store step and zero in float32",
                "levels are those of the plain range; the release's Lloyd-Max levels are off by default there too",
                "widths other than 2 bits take the whole range: no quantile is published for them",
                "a value is weighed by the scores of its key with the queries of its own calibration window",
                "every eighth query is looked at; rows kept exact are left out of the moment of values",
                "calibration is the record's, not 16 to 30 thousand tokens of GPQA prompts",
                "values are rotated when they are stored and read, not in the weights",
            ),
        ),
        key=_SIDE,
        value=_SIDE,
        key_bits=2,
        value_bits=2,
        protect="first:64",
        window=256,
        clip_at={2: 0.96},
        value_clip_at={2: 0.92},
        claims=(
            Claim("mean of 5 reasoning tasks", 71.86, "Qwen3-4B-Thinking, 64 + 256 rows exact (16 bit 75.64)", _README),
            Claim("mean of 5 reasoning tasks", 69.42, "Qwen3-8B (16 bit 70.84)", _README),
            Claim("mean of 5 reasoning tasks", 74.17, "Qwen3-32B (16 bit 74.19)", _README),
            Claim("longbench-e/average", 50.25, "Qwen3-8B (16 bit 49.56)", _README),
        ),
    )
)

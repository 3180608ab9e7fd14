"""AKVQ-VL: rotated 2-bit rows, pivots and recent rows exact; text keeps 4 bits in layers that look at text.

Variant even, as the CUDA kernel reads it and ours where it departs: no window, a row stores its scale and minimum, not an integer
zero point, and text-salient layers give visual rows 4 bits too, which take places of that width in any case.

Source     arXiv 2501.15021
Differs    see `source.differs`
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Modality, Paper, register_method

_SETTING = "LLaVA-v1.5, MileBench, 2 bit"
_TABLE = "arXiv 2501.15021v1, table II"
_SIDE = SideSpec(bits=2, transform="hadamard", kind="uniform-int", group_size=128)
_EVEN = replace(_SIDE, kind="uniform", group_size=256)
_MODALITY = Modality(text_bits=4, ratio=2.0, share=0.5, protect="first:1")

AKVQ_VL = register_method(
    Method(
        name="akvq-vl",
        summary="Hadamard after RoPE, per token; text at 4 bit in text-salient layers, pivots and recent rows exact",
        source=Paper(
            "2501.15021",
            "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models",
            differs=(
                "no code was published; layers are classed by measured attention, text-salient when text receives more than "
                "twice what visual tokens do and 15 positions hold less than half (not verified)",
                "pivots: at most 15 rows with max |h| above 100 and above 1000 times the median |h| behind the first block whose "
                "activations pass that; chosen from the prompt only (not verified)",
                "layers before the probe block, and text-salient layers, keep the first row instead of pivots (not verified)",
                "text-salient layers store 4-bit places for every row; a visual row uses 4 of the 16 levels, so the at most "
                "two such layers are counted at 4 bit",
                "a group has at most one head's channels; the clip ratio scales minimum and maximum (not verified)",
                "a text model, or a calibration without images, has pivot-salient layers only",
            ),
        ),
        key=_SIDE,
        value=_SIDE,
        key_bits=2,
        value_bits=2,
        protect="pivots:15",
        window=128,
        clip_at={1: 0.8, 2: 0.8},
        modality=_MODALITY,
        variants={
            "even": {
                "key": _EVEN,
                "value": _EVEN,
                "window": 0,
                "value_clip_at": {1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95},
                "modality": replace(_MODALITY, coarse=False),
            }
        },
        claims=(
            Claim("webpage QA", 57.0, f"{_SETTING}, 7B (16 bit: 59.0)", _TABLE),
            Claim("textbook QA", 51.0, f"{_SETTING}, 13B (16 bit: 55.0)", _TABLE),
            Claim("scene transition", 78.0, f"{_SETTING}, 7B (16 bit: 73.0)", _TABLE),
            Claim("peak memory, times smaller", 2.13, "LLaVA-v1.5-7B, batch sweep on 4 x V100", "arXiv 2501.15021v1, abstract"),
        ),
    )
)

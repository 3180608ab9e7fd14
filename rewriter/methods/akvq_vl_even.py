"""`akvq-vl` as the CUDA kernel reads it: scale and minimum per row, no window, one width for every row of a layer.

Source     arXiv 2501.15021; ours where it departs
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Modality, Paper, register_method

_SIDE = SideSpec(bits=2, transform="hadamard", kind="uniform", group_size=256)

AKVQ_VL_EVEN = register_method(
    Method(
        name="akvq-vl-even",
        summary="as akvq-vl, without the window and with one width per layer: served by the CUDA kernel",
        source=Paper(
            "2501.15021",
            "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models",
            differs=(
                "recent rows are not kept in 16 bit: pivots are the only exact rows",
                "text-salient layers give visual rows 4 bits too: they take places of that width in any case",
                "a row stores its scale and minimum, not an integer zero point; layers and pivots as in akvq-vl",
            ),
        ),
        key=_SIDE,
        value=_SIDE,
        key_bits=2,
        value_bits=2,
        protect="pivots:15",
        clip_at={1: 0.8, 2: 0.8},
        value_clip_at={1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95},
        modality=Modality(text_bits=4, ratio=2.0, share=0.5, protect="first:1", coarse=False),
    )
)

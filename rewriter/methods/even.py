"""`klt` and `centred` with equally spaced levels, which the GPU kernel over packed codes reads without a table.

Source     ours. Same transforms and tables; the steps of least squared error of a Gaussian source instead of Lloyd-Max levels,
           values on a uniform grid clipped where the squared error of a Gaussian row of 128 channels is least
Differs    no
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.centred import CENTRED
from kvsink.methods.klt import KLT
from kvsink.methods.registry import register_method

VALUE = SideSpec(bits=4, center=True, transform="hadamard", kind="uniform")
VALUE_CLIP = {1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95}

KLT_EVEN = register_method(
    replace(
        KLT, name="klt-even", summary="klt with equally spaced levels and no codebooks, for the GPU kernel",
        key=replace(KLT.key, kind="lloyd-even"), value=VALUE, key_below=None, value_below=None, value_clip_at=VALUE_CLIP,
    )
)  # fmt: skip

CENTRED_EVEN = register_method(
    replace(
        CENTRED, name="centred-even", summary="centred with values on a uniform grid, for the GPU kernel", value=VALUE,
        value_clip_at=VALUE_CLIP,
    )
)  # fmt: skip

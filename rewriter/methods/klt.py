"""Transform-coded keys: centred, rotated only by their offset inside a block, projected on the eigenbasis of what is left.

Source     ours. Karhunen-Loève transform with reverse water-filling over runs of 8 components and the equally spaced levels of least error
Differs    no
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

KLT = register_method(
    Method(
        name="klt",
        summary="block-KLT keys with gain, equally spaced levels; values centred and rotated",
        source=Paper("ours"),
        key=SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", kind="lloyd-even", gain=True),
        value=SideSpec(bits=4, center=True, transform="hadamard", kind="uniform"),
        key_bits=2,
        value_bits=4,
        value_clip_at={1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95},  # of least error on a Gaussian row of 128 channels
        protect="kvsink:5+first:1",
    )
)

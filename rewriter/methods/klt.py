"""Transform-coded keys: centred, rotated only by their offset inside a block, projected on the eigenbasis of what is left.

Source     ours. Karhunen-Loève transform with reverse water-filling over runs of 8 components and Lloyd-Max levels
Differs    no
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

KLT = register_method(
    Method(
        name="klt",
        summary="block-KLT keys with gain, codebooks below 1.5 bits; values centred and rotated, codebooks below 2.5",
        source=Paper("ours"),
        key=SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", kind="lloyd", gain=True),
        value=SideSpec(bits=4, center=True, transform="hadamard", kind="gauss"),
        key_below=(1.5, SideSpec(bits=1, domain="block", block=64, center=True, transform="klt", kind="vector")),
        value_below=(2.5, SideSpec(bits=2, center=True, transform="hadamard", kind="vector", weights="error")),
        key_bits=2,
        value_bits=4,
        protect="kvsink:5+first:1",
    )
)

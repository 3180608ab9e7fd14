"""Centred keys: the calibrated mean leaves before RoPE, a Hadamard rotation follows after it, one scale per token.

Source     ours; the fast sibling of `klt`: nothing is undone per token at read time
Differs    no
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

CENTRED = register_method(
    Method(
        name="centred",
        summary="mean removed before RoPE, Hadamard after it, per token",
        source=Paper("ours"),
        key=SideSpec(bits=2, center=True, transform="hadamard", kind="uniform"),
        value=SideSpec(bits=2, center=True, transform="hadamard", kind="gauss"),
        key_bits=2,
        value_bits=4,
        protect="kvsink:5+first:1",
        clip_at={1: 0.8, 2: 0.8},
    )
)

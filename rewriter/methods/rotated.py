"""Rotated keys and values in trellis-coded levels: nothing is calibrated, and no table belongs to a model.

Keys take a Hadamard rotation after RoPE, values one in the weights; all channels then have about one deviation, and a row stores
one byte of gain. What the keys of a channel have in common costs bits here, which `klt` takes away by means from text. Four first
rows stay exact: sinks are mostly there, and nobody has looked where else.

Source     ours; see kvsink.kernels.trellis
Differs    no
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

_SIDE = SideSpec(bits=4, transform="hadamard", kind="trellis", flat=True)
_ABOVE = (4, replace(_SIDE, bits=8, kind="uniform", flat=False))

ROTATED = register_method(
    Method(
        name="rotated",
        summary="Hadamard and trellis-coded levels of 1 to 4 bits, one byte of gain per row; nothing is calibrated",
        source=Paper("ours"),
        key=_SIDE,
        value=replace(_SIDE, unbiased=True),
        key_bits=4,
        value_bits=4,
        key_above=_ABOVE,
        value_above=_ABOVE,
        protect="first:4",
    )
)

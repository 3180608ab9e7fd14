"""Block-KLT keys in the basis that attention asks for and centred, rotated values, both as trellis-coded levels: no codebooks, no
16-bit numbers beside a row. Levels of values are read without bias, since attention sums many rows.

Below 1.5 bits, where a walk has one bit for every component and none to spare for the strong ones, codebooks are far better.

Source     ours; see `klt`, kvsink.kernels.trellis and kvsink.calibrate.metric
Differs    no
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

KLT_TRELLIS = register_method(
    Method(
        name="klt-trellis",
        summary="block-KLT keys and rotated values in trellis-coded levels of 1.5 to 4 bits, one byte of gain per row",
        source=Paper("ours"),
        key=SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", metric="attention", kind="trellis"),
        value=SideSpec(bits=2, center=True, transform="hadamard", kind="trellis", unbiased=True),
        key_below=(1.5, SideSpec(bits=1, domain="block", block=64, center=True, transform="klt", kind="vector")),
        value_below=(1.5, SideSpec(bits=1, center=True, transform="hadamard", kind="vector", weights="error")),
        key_above=(4, SideSpec(bits=8, domain="block", block=64, center=True, transform="klt", kind="lloyd", gain=True)),
        value_above=(4, SideSpec(bits=8, center=True, transform="hadamard", kind="gauss")),
        key_bits=2,
        value_bits=2,
        protect="kvsink:5+first:1",
    )
)

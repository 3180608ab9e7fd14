"""The keys of `klt` with values coded one by one at every width: no codebooks. The CUDA kernel serves its sibling `klt-even`.

Source     ours; see `klt`
Differs    no codebooks: values at 2 bits take a mean and a deviation per token instead
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

KLT_SCALAR = register_method(
    Method(
        name="klt-scalar",
        summary="block-KLT keys with gain; values centred and rotated, one code per channel at every width",
        source=Paper("ours"),
        key=SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", kind="lloyd", gain=True),
        value=SideSpec(bits=2, center=True, transform="hadamard", kind="gauss"),
        key_bits=2,
        value_bits=2,
        protect="kvsink:5+first:1",
    )
)

"""`klt-scalar` with equally spaced levels for keys and values: what the CUDA kernel reads without a table.

Source     ours; see `klt`
Differs    levels of least error under equal spacing: on a Gaussian 0.1188 at 2 bits, 0.0374 at 3, 0.0115 at 4 (Lloyd-Max 0.1175,
           0.0345, 0.0095); values as in `centred-even`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

KLT_EVEN = register_method(
    Method(
        name="klt-even",
        summary="block-KLT keys with gain and equally spaced levels, values alike: served by the CUDA kernel",
        source=Paper("ours"),
        key=SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", kind="lloyd-even", gain=True),
        value=SideSpec(bits=2, center=True, transform="hadamard", kind="uniform", group_size=256),
        key_bits=2,
        value_bits=2,
        protect="kvsink:5+first:1",
        value_clip_at={1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95},
    )
)

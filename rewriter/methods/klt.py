"""Block-KLT keys in the basis that attention asks for and centred, rotated values, both as trellis-coded levels: no codebooks, no
16-bit numbers beside a row. Levels of values are read without bias, since attention sums many rows.

Below 1.5 bits, where a walk has one bit for every component and none to spare for the strong ones, codebooks are far better.
Variants: what 0.1 called klt-scalar (best: Lloyd-Max levels), klt-even (even: equally spaced ones, read without a table) and klt
below 2.5 bits of values (codebooks).

Source     ours; see kvsink.kernels.trellis and kvsink.calibrate.metric
Differs    no
"""

from dataclasses import replace

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

_KEY = SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", metric="attention", kind="trellis")
_VALUE = SideSpec(bits=2, center=True, transform="hadamard", kind="trellis", unbiased=True)
_LLOYD = replace(_KEY, metric="none", kind="lloyd", gain=True)
_GAUSS = replace(_VALUE, kind="gauss", unbiased=False)
_CODEBOOKS = replace(_VALUE, kind="vector", weights="error", unbiased=False)
_ALIKE: dict[str, None] = dict.fromkeys(("key_below", "value_below", "key_above", "value_above"))

KLT = register_method(
    Method(
        name="klt",
        summary="block-KLT keys and rotated values in trellis-coded levels of 1.5 to 4 bits, one byte of gain per row",
        source=Paper("ours"),
        key=_KEY,
        value=_VALUE,
        key_below=(1.5, replace(_KEY, bits=1, kind="vector")),
        value_below=(1.5, replace(_CODEBOOKS, bits=1)),
        key_above=(4, replace(_LLOYD, bits=8)),
        value_above=(4, replace(_GAUSS, bits=8)),
        protect="kvsink:auto+first:1",
        value_clip_at={1: 0.3, 2: 0.6, 3: 0.8, 4: 0.95},  # of the variant even
        variants={
            "best": {"key": _LLOYD, "value": _GAUSS, **_ALIKE},
            "codebooks": {"key": _LLOYD, "value": _CODEBOOKS},
            "even": {
                "key": replace(_LLOYD, kind="lloyd-even", metric="attention"),
                "value": replace(_GAUSS, kind="uniform", group_size=256),
                **_ALIKE,
            },
        },
    )
)

"""Triton code of a 16-bit cache's write: one row of keys and one of values in one launch, position read on the device.

Imported only where Triton is there. Names in capitals are constants of the compilation.
"""

import triton
import triton.language as tl


@triton.jit
def write_rows(k, v, new_k, new_v, position, n, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """new rows [n] = [B · Hkv · D] to row `position` of caches whose heads are `stride` apart; program axis 1: keys, values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    place = (at // D).to(tl.int64) * stride + tl.load(position) * D + at % D
    if tl.program_id(1) == 0:
        tl.store(k + place, tl.load(new_k + at, mask=inside), mask=inside)
    else:
        tl.store(v + place, tl.load(new_v + at, mask=inside), mask=inside)

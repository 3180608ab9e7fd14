"""Launches one variant a few times for ncu: python profile_one.py NAME B T."""
import sys

import torch

from bench_attend import VARIANTS
from driver import HERE, Kernel, name_of
from layout import bind, make_case

name, b, t = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
v = next(x for x in VARIANTS if name_of(x) == name)
k = Kernel(HERE / "build" / f"{name}.cubin", v)
c = make_case(v["MODE"], b, 8, 4, t, device="cuda", key_widths=v["KW"], value_widths=v["VW"])
c["out"] = torch.empty_like(c["q"])
grid = k.grid_x(8)
p, keep = bind(c, grid)
trace = torch.zeros(k.grid_x(8) * 8, 16, dtype=torch.int64, device="cuda")
p.trace = trace.data_ptr()
other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
for _ in range(3):
    other.fill_(1)
    k.launch(p, grid)
torch.cuda.synchronize()
if "trace" in name:
    t = (trace - trace[:, 0].min()).double() / 1e3
    t[trace == 0] = float("nan")
    print(name, "B", b, "T", sys.argv[3], "us after the first mark, min/mean/max:", end="")
    for i in range(16):
        x = t[:, i][~t[:, i].isnan()]
        if len(x):
            print(f"  {i}: {x.min():.2f}/{x.mean():.2f}/{x.max():.2f}", end="")
    print()

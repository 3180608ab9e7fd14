"""Native correctness of the built variants: ragged rows, starts, exact rows, empty rows, bf16, many small shapes."""
from __future__ import annotations

import sys

import torch

from bench_attend import VARIANTS
from driver import HERE, Kernel, name_of
from layout import KLT, bind, make_case, reference, relative_error


def main() -> int:
    bad = 0
    only = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    for v in VARIANTS:
        name = name_of(v)
        if v.get("ABLATE") or v.get("TRACE") or (only and name not in only):
            continue
        k = Kernel(HERE / "build" / f"{name}.cubin", v)
        worst = 0.0
        for b, t, ragged, start, dtype in [(1, 1, False, False, torch.float16), (1, 2, False, False, torch.float16), (1, 129, False, False, torch.float16),
                                           (3, 700, True, True, torch.float16), (2, 5000, True, True, torch.bfloat16), (7, 1031, True, False, torch.float16),
                                           (33, 300, True, True, torch.float16), (70, 2049, True, True, torch.float16)]:
            for grid in {1, 5, k.grid_x(8)}:
                c = make_case(v["MODE"], b, 8, 4, t, device="cuda", seed=t, ragged=ragged, start=start, dtype=dtype, key_widths=v["KW"], value_widths=v["VW"],
                              exact=8 if t > 8 else 0)
                c["out"] = torch.full_like(c["q"], float("nan"))
                p, keep = bind(c, grid)
                ref = reference(c)
                errs = []
                for _ in range(3):
                    c["out"].fill_(float("nan"))
                    k.launch(p, grid)
                    torch.cuda.synchronize()
                    errs.append(relative_error(c["out"], ref))
                e = max(errs) if all(x == x for x in errs) else float("nan")
                if not e <= (4e-3 if dtype == torch.bfloat16 else 2e-3):
                    bad += 1
                    print(f"WRONG {name} B{b} T{t} grid {grid} {dtype}: {errs}", flush=True)
                worst = max(worst, e) if dtype == torch.float16 else worst
        print(f"{name}: worst {worst:.2e}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())

"""What layer 12 still looks for when the Super Experts are skipped: `python examples/what_keeps_a_sink.py smollm2-mixtral`.

Write the mixture first: `python -m kvsink.tools.to_mixtral demo:smollm2 smollm2-mixtral`. Experts 11:6 and 11:7 are skipped,
and behind block 11 the largest channels of the first token are set to the mean of the other tokens, more and more of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvsink.evaluate.texts import builtin_text
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.model.anatomy import anatomy
from kvsink.profiling.attention import START, AttentionSums, sink_decay, watching_attention
from kvsink.profiling.layout import find_layout
from kvsink.profiling.record import windows_of
from kvsink.profiling.watch import watching_experts

BLOCK, SKIPPED = 11, frozenset({"11:6", "11:7"})


def run(model: Any, ids: Tensor, skip: frozenset[str], edit: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """Attention to the first token [N, L, Hq, T] and the edited output of the block [N, T, E]."""
    where, sums, first, outputs = anatomy(model), AttentionSums(), [], []

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        edit(hidden[0])
        outputs.append(hidden[0])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.get_submodule(where.blocks[BLOCK]).register_forward_hook(hook)
    watched = watching_attention(model, where, sums)
    with torch.no_grad(), watching_experts(model, find_layout(model, where), skip=skip), watched:
        for row in ids:
            model(input_ids=row[None], use_cache=False)
            first.append(sums.take(len(where.blocks))[1])
    handle.remove()
    return torch.stack(first), torch.stack(outputs)


def main(path: str, windows: int = 4) -> None:
    """Print D_sink of the layers behind the block for every edit."""
    model, ids = load_model(path, "cpu", "float32"), windows_of(builtin_text(), load_tokenizer(path), 8, 512)[:windows]
    base, _ = run(model, ids, frozenset(), lambda h: None)
    skipped, hidden = run(model, ids, SKIPPED, lambda h: None)
    others = hidden[:, START:].mean((0, 1))
    order = hidden[:, 0].abs().mean(0).argsort(descending=True)

    def show(what: str, first: Tensor) -> None:
        d = [x or 0.0 for x in sink_decay(base, first)[0]]
        print(f"{what:24} D_sink of layers 12-14: {d[12]:.2f} {d[13]:.2f} {d[14]:.2f}; mean of 12-27: {sum(d[12:28]) / 16:.2f}")

    show("skipped", skipped)
    for count in (1, 8, 32):
        chosen = order[:count]

        def edit(h: Tensor, chosen: Tensor = chosen) -> None:
            h[0, chosen] = others[chosen]

        show(f"and {count} channels reset", run(model, ids, SKIPPED, edit)[0])
    show("and 2:0 skipped too", run(model, ids, SKIPPED | {"2:0"}, lambda h: None)[0])
    heads = [sink_decay(base[:, 12:13, h : h + 1], skipped[:, 12:13, h : h + 1])[0][0] for h in range(base.shape[2])]
    print("layer 12 by head, skipped:", " ".join("none" if d is None else f"{d:.2f}" for d in heads))
    sizes = hidden.norm(dim=-1)
    print(
        f"norm of the first row {float(sizes[:, 0].mean()):.0f}, of the others {float(sizes[:, START:].mean()):.0f}; "
        f"largest channel {int(order[0])}"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(sys.argv[1])

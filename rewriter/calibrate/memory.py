"""What a rewrite needs of memory and disk, and what is free: whether a model has to be read layer by layer.

Units      bytes
Source     ours
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsink.folder.checkpoint import Checkpoint
from kvsink.model.anatomy import anatomy

__all__ = ["Needs", "SHARE_OF_MEMORY", "available_memory", "needs"]

SHARE_OF_MEMORY = 0.8  # a model that needs more of the free memory is read layer by layer


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Needs:
    """Bytes a run needs: memory with the whole model and by layers (`base` of it for Python, torch and transformers), and disk."""

    whole: int
    by_layer: int
    disk: int
    base: int = 0

    @property
    def memory(self) -> str:
        """Both ways in words."""
        return f"about {self.whole / 2**30:.1f} GiB of memory with the whole model, {self.by_layer / 2**30:.1f} GiB layer by layer"

    def __str__(self) -> str:
        return f"{self.memory}, and {self.disk / 2**30:.1f} GiB of disk"


def needs(model: Any, checkpoint: Checkpoint, tokens: int, window: int) -> Needs:
    """What a rewrite of the model takes on a CPU, where weights are float32; activations of `tokens` in windows of `window`."""
    config = model.config.get_text_config(decoder=True)
    where = anatomy(model)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    layer = max(sum(s for n, s in sizes.items() if n.startswith(b + ".")) for b in where.blocks)
    largest = max((e.nbytes for n, e in checkpoint.entries.items() if n.startswith(where.blocks)), default=0)
    embedding = max((e.nbytes for e in checkpoint.entries.values()), default=0)
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(inner) if isinstance(inner, list | tuple) else inner  # of each layer, where they differ
    busy = 4 * window * (4 * hidden + 4 * width)  # of the window that is in a layer
    stats = 8 * len(where.blocks) * where.kv_heads * where.head_dim * (2 * where.head_dim + 64)
    base = 600 << 20  # Python, torch and transformers
    return Needs(
        whole=base + 4 * sum(sizes.values()) + busy + 4 * window * config.vocab_size + stats,
        by_layer=base + max(embedding, 4 * layer + largest) + 4 * tokens * hidden + busy + stats,
        disk=checkpoint.nbytes + stats,
        base=base,
    )

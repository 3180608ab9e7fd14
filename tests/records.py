"""Rows of the comparison as they are written, without a measurement."""

from __future__ import annotations

from typing import Any

from kvsink.tools.compare_rows import row


def record(method: str = "rtn", bits: float = 2.5, gap: float = 0.1, model: str = "M", **more: Any) -> dict[str, Any]:
    """A measured row of `method` at 2 bits with these figures; more: fields that are added or changed."""
    return {
        "row": row(method, 2, 2).as_dict(),
        "name": method,
        "model": model,
        "text": "WikiText-2 test",
        "windows": 16,
        "window_tokens": 1024,
        "chunk": 64,
        "command": "",
        "status": "measured",
        "protect": "none",
        "bits": bits,
        "bits_at_window": bits + 1,
        "table_bytes": 10**6,
        "perplexity": 10 * (1 + gap),
        "gap": gap,
        "kl": gap / 10,
        "top1": 0.5,
        "strict_gap": None,
        "strict_kl": None,
        "strict_top1": None,
        "baseline_perplexity": 10.0,
        "device": "GPU",
        "versions": {"kvsink": "7.2.0"},
        **more,
    }

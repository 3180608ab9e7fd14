"""Lists of modules that a weight quantizer must leave alone, in the words of llm-compressor and torchao.

llm-compressor   `ignore` of a recipe's modifier: module names; stacked experts are named as its linearised experts are
torchao          `modules_to_not_convert` of transformers' TorchAoConfig; a module of stacked experts goes in whole
Source           ours, for the Super Experts of arXiv 2507.23279
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsink.profiling.layout import Entry

__all__ = ["ignore_lists"]


def ignore_lists(model: Any, entries: Sequence[Entry]) -> dict[str, dict[str, list[str]]]:
    """Both lists, the language-model head first, as quantizers usually leave it."""
    head = [n for n, m in model.named_modules() if m is model.get_output_embeddings()] if model.get_output_embeddings() else []
    each = [f"{e.module}.{e.name}.down_proj" if e.stacked else e.module for e in entries]
    whole = list(dict.fromkeys(e.module for e in entries))
    return {"llm-compressor": {"ignore": [*head, *each]}, "torchao": {"modules_to_not_convert": [*head, *whole]}}

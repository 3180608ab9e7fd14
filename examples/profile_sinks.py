"""Where the sinks of a model come from, and rows kept exact by that: `python examples/profile_sinks.py MODEL TEXT_FILE`.

MODEL is a folder, a hub id or demo:smollm2; TEXT_FILE holds some thousand words that it might read. `kvsink-profile MODEL OUT_DIR`
writes the whole record with a page of figures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink
from kvsink.folder.demo import resolve_model_dir
from kvsink.profiling import ProfileOptions, profile
from kvsink.profiling.record import windows_of


def main(path: str, text_path: str, windows: int = 4, window_tokens: int = 256, **options: Any) -> None:
    """Print the findings, and what a rewrite by this profile keeps exact; options are those of `kvsink.rewrite`."""
    folder = resolve_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = windows_of(Path(text_path).read_text(encoding="utf-8"), tokenizer, windows, window_tokens)
    record, _ = profile(model, ids, ProfileOptions(len(ids), window_tokens), tokenizer=tokenizer)
    print("\n".join(record["findings"]))
    report = kvsink.rewrite(model, tokenizer=tokenizer, profile=record, **options)  # stages are not looked for again
    print(f"a rewrite by {report.method} keeps exact: {report.protect}")
    print("\n".join(f"note: {note}" for note in report.notes))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:3])

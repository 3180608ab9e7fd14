"""A model with a packed cache as ONNX, from Python: `python examples/onnx_export.py MODEL OUT_FOLDER [METHOD]`.

MODEL is a folder, a hub id or demo:smollm2. `kvsink-rewrite MODEL OUT_FOLDER --onnx` does the same and keeps the rewritten model
too. Run the file with examples/onnx_generate.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink
from kvsink.export import onnx
from kvsink.folder.demo import resolve_model_dir


def main(path: str, out: str, method: str = "klt", **options: Any) -> None:
    """Rewrite MODEL in memory, write OUT/model.onnx with its manifest and tokenizer, and print what the file takes and gives."""
    folder = resolve_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kvsink.rewrite(model, method, tokenizer=tokenizer, **options)
    file = Path(out) / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    manifest = onnx(model, file)  # checked in onnxruntime beside the torch model before it appears
    tokenizer.save_pretrained(file.parent)
    check = manifest["check"]
    print(f"{file}: opset {manifest['opset']}, {len(manifest['inputs'])} inputs, {len(manifest['outputs'])} outputs")
    print(f"checked: {check['packed_bytes']} packed bytes, {check['different_bytes']} of them not those of the torch model")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:4])

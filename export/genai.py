"""genai_config.json beside a model of flavour gqa: how onnxruntime-genai names its tensors and sizes its cache.

Source     the configuration reference of onnxruntime-genai
Differs    head_size is the width of the cache tensors: half the channels where two codes share a byte
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_genai"]


def write_genai(path: Path, model: Any, manifest: Mapping[str, Any]) -> None:
    """Write the file into the folder of model.onnx at `path`."""
    config = model.config.get_text_config(decoder=True)
    key = next(e for e in manifest["inputs"] if e["name"] == "past_key_values.0.key")
    layers = sum(e["name"].endswith(".key") for e in manifest["inputs"])
    past, present = "past_key_values.%d.{}", "present.%d.{}"
    names = ("input_ids", "attention_mask", "position_ids")
    record = {
        "model": {
            "type": config.model_type,
            "context_length": manifest["max_positions"],
            "vocab_size": manifest["vocab_size"],
            "bos_token_id": config.bos_token_id if isinstance(config.bos_token_id, int) else 0,
            "eos_token_id": manifest["eos_token_id"],
            "pad_token_id": manifest["pad_token_id"],
            "decoder": {
                "filename": path.name,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": key["shape"][3],
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": key["shape"][1],
                "num_hidden_layers": layers,
                "inputs": {**{n: n for n in names}, "past_key_names": past.format("key"), "past_value_names": past.format("value")},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": present.format("key"),
                    "present_value_names": present.format("value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": manifest["max_positions"],
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": not manifest["padding"],
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "diversity_penalty": 0.0,
        },
    }
    (path.parent / "genai_config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

"""Tiny vision-language models with random weights and prompts for them: several images per prompt, text around them.

Shapes     2 decoder layers, hidden 64, 4 query and 2 key-value heads of 16 channels; one image is 4 tokens
Prompts    `images` tells how many images each row has; rows are left-padded to one length
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.models import _DECODER

__all__ = ["FAMILIES", "IMAGE", "build", "plain", "prompt"]

IMAGE, PER_IMAGE, PAD = 96, 4, 0
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_START, _END = 94, 95  # vision_start and vision_end of the Qwen family


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(**_CLIP, image_size=16, patch_size=8)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**_DECODER),
            image_token_id=IMAGE,
            image_seq_length=PER_IMAGE,
            vision_feature_layer=-1,
        )
    )


def _llava_next() -> Any:
    vision = hf.CLIPVisionConfig(**_CLIP, image_size=16, patch_size=8)
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**_DECODER),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[16, 16]],
        )
    )


def _qwen(name: str) -> Callable[[], Any]:
    def make() -> Any:
        prefix = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL", "qwen3-vl": "Qwen3VL"}[name]
        vision: dict[str, Any] = {
            "qwen2-vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
            "qwen2.5-vl": {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "intermediate_size": 48,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "qwen3-vl": {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "intermediate_size": 48,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        }[name]
        config = getattr(hf, f"{prefix}Config")(
            text_config={**_DECODER, **_ROPE},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=93,
            vision_start_token_id=_START,
            vision_end_token_id=_END,
        )
        return getattr(hf, f"{prefix}ForConditionalGeneration")(config)

    return make


def _gemma3() -> Any:
    vision = hf.SiglipVisionConfig(**_CLIP, image_size=16, patch_size=8)
    text = hf.Gemma3TextConfig(
        **_DECODER, query_pre_attn_scalar=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            mm_tokens_per_image=PER_IMAGE,
            boi_token_index=_START,
            eoi_token_index=_END,
        )
    )


def _idefics3(name: str) -> Callable[[], Any]:
    def make() -> Any:
        prefix = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name]
        vision = {**_CLIP, "image_size": 32, "patch_size": 8}
        config = getattr(hf, f"{prefix}Config")(
            vision_config=vision, text_config=hf.LlamaConfig(**_DECODER), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        )
        return getattr(hf, f"{prefix}ForConditionalGeneration")(config)

    return make


def _internvl() -> Any:
    vision = hf.InternVLVisionConfig(**_CLIP, image_size=[32, 32], patch_size=[8, 8])
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=vision,
            text_config=hf.Qwen2Config(**_DECODER),
            image_token_id=IMAGE,
            image_seq_length=PER_IMAGE,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
        )
    )


_BUILD: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava-next": _llava_next,
    "qwen2-vl": _qwen("qwen2-vl"),
    "qwen2.5-vl": _qwen("qwen2.5-vl"),
    "qwen3-vl": _qwen("qwen3-vl"),
    "gemma3": _gemma3,
    "idefics3": _idefics3("idefics3"),
    "smolvlm": _idefics3("smolvlm"),
    "internvl": _internvl,
}
FAMILIES = tuple(_BUILD)


def build(family: str) -> Any:
    """A model of the family, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = _BUILD[family]()
        for name, weight in model.named_parameters():
            if "proj" in name and weight.dim() > 1 and weight.dtype.is_floating_point:
                weight.data.normal_(std=0.15)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def prompt(family: str, images: Sequence[int] = (1,), seed: int = 0, length: int | None = None) -> dict[str, Tensor]:
    """One row per entry of `images`: text, image, text, image, …, text; left-padded, with the processor's modality mask."""
    g = torch.Generator().manual_seed(seed)
    wide = family.startswith("llava-next")
    shown = 2 * PER_IMAGE + 2 if wide else PER_IMAGE  # the base picture and its one tile, whose two rows end in a newline
    rows = []
    for count in images:
        ids = torch.randint(3, 90, (3 + count % 2,), generator=g).tolist()
        for _ in range(count):
            marks = ([_START], [_END]) if family.startswith(("qwen", "gemma3")) else ([], [])
            ids += [*marks[0], *[IMAGE] * shown, *marks[1], *torch.randint(3, 90, (5,), generator=g).tolist()]
        rows.append(ids)
    longest = max(map(len, rows)) if length is None else length
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    out = {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}
    total = sum(images)
    if family.startswith(("qwen", "gemma3")):
        out["mm_token_type_ids" if family.startswith("qwen") else "token_type_ids"] = (ids == IMAGE).long()
    if total:
        out |= _pixels(family, images, g)
    return out


def _pixels(family: str, images: Sequence[int], g: torch.Generator) -> dict[str, Tensor]:
    total = sum(images)
    if family.startswith("qwen"):
        channels = 3 * 2 * 4 * 4
        grid = torch.tensor([[1, 4, 4]] * total)
        return {"pixel_values": torch.randn(total * 16, channels, generator=g), "image_grid_thw": grid}
    if family in ("idefics3", "smolvlm"):
        most = max(images)
        values = torch.randn(len(images), most, 3, 32, 32, generator=g)
        for row, count in enumerate(images):
            values[row, count:] = 0.0
        return {"pixel_values": values, "pixel_attention_mask": torch.ones(len(images), most, 32, 32, dtype=torch.bool)}
    if family == "llava-next":
        return {"pixel_values": torch.randn(total, 2, 3, 16, 16, generator=g), "image_sizes": torch.tensor([[16, 16]] * total)}
    size = 32 if family == "internvl" else 16
    return {"pixel_values": torch.randn(total, 3, size, size, generator=g)}


def plain(given: dict[str, Tensor], row: int, images: Sequence[int]) -> dict[str, Tensor]:
    """One row of a batch alone and without its padding."""
    keep = given["attention_mask"][row].bool()
    before, count = sum(images[:row]), images[row]
    out = {}
    for name, t in given.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            out[name] = t[row : row + 1, keep]
        elif name == "pixel_attention_mask" or (t.dim() == 5 and t.shape[0] == len(images) and t.shape[1] == max(images)):
            out[name] = t[row : row + 1, :count]
        elif "image_grid_thw" in given and name == "pixel_values":
            out[name] = t[16 * before : 16 * (before + count)]
        else:
            out[name] = t[before : before + count]
    return {n: t for n, t in out.items() if count or n in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")}

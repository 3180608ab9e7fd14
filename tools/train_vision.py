"""A small vision-language model that truly reads: SmolLM2 behind a tiny vision tower, trained on drawn pictures.

    python -m kvsink.tools.train_vision OUT_DIR [--tower-minutes 4] [--joint-minutes 10]

Two stages on a CPU. The tower (a CLIP vision model of 3 layers, 64 x 64 pixels, 16 patches) and the projector learn to give each
patch the embedding of a word of SmolLM2: a cell of the picture has four patches, which say its colour, shape, row and column.
Then projector and attention of the language model are tuned lightly on questions and captions. OUT_DIR is an ordinary
LLaVA folder with its processor. Pictures of the evaluation are never trained on (`kvsink.evaluate.pictures.HELD_BACK`).

Source     ours; the architecture is LLaVA-1.5, arXiv 2310.03744; the language model is demo:smollm2
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from kvsink.evaluate.pictures import COLUMNS, ROWS, Picture, picture
from kvsink.tools.cli import command_line

__all__ = ["ANSWER", "IMAGE_TOKEN", "build", "document", "train_joint", "train_tower"]

IMAGE_TOKEN = "<filename>"  # a special token of SmolLM2 that its texts do not use
PATCHES = 16
ANSWER = " A:"


def build(source: str | Path = "demo:smollm2") -> tuple[Any, Any]:
    """The untrained model around a language model, float32, and its processor."""
    import transformers as hf

    from kvsink.folder.demo import resolve_model_dir

    folder = resolve_model_dir(source)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    language = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vision = hf.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        projection_dim=128,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.generation_config = language.generation_config
    for weight in model.model.vision_tower.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.05)
    pixels = hf.CLIPImageProcessorPil(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = hf.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    return model, processor


def words_of(p: Picture) -> list[str]:
    """The word that each of the 4 x 4 patches shall say, in reading order."""
    said = []
    for patch in range(PATCHES):
        y, x = divmod(patch, 4)
        cell = p.cells[y // 2 * 2 + x // 2]
        if cell is None:
            said.append("none")
        elif y % 2 == 0:
            said.append(cell[x % 2])
        else:
            said.append(ROWS[y // 2] if x % 2 == 0 else COLUMNS[x // 2])
    return said


def pixels(images: list[Any]) -> Tensor:
    """As the processor makes them, [N, 3, 64, 64]."""
    import numpy as np

    rows = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
    return rows.float() / 127.5 - 1.0


def document(pictures: list[Picture], tokenizer: Any, caption: bool) -> tuple[list[int], list[bool]]:
    """Token ids of pictures with their questions, or with their captions, and which of them are the answer or the caption."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids, asked = [], []
    for p in pictures:
        ids += [image] * PATCHES
        asked += [False] * PATCHES
        parts = [("\nCaption:", f" {p.caption}")] if caption else [(f"\nQ: {q}{ANSWER}", f" {a}") for q, a, _ in p.questions]
        for text, answer in parts:
            for piece, counts in ((text, False), (answer, True)):
                new = tokenizer(piece, add_special_tokens=False)["input_ids"]
                ids += new
                asked += [counts] * len(new)
        ids.append(tokenizer("\n", add_special_tokens=False)["input_ids"][0])
        asked.append(False)
    return ids, asked


def train_tower(model: Any, tokenizer: Any, seconds: float, say: Any = print, batch: int = 64, most: int | None = None) -> float:
    """Tower and projector alone: each patch takes the embedding of its word. Returns the share of right patches at the end.

    most: a number of steps to train for, whatever time they take, instead of `seconds`.
    """
    table = model.model.language_model.embed_tokens.weight.detach()
    index: dict[str, int] = {}
    vocabulary: list[int] = []
    spread = float(table.var())
    learnt = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    steps = torch.optim.AdamW(learnt, lr=1e-3, weight_decay=0.01)
    begun, step, right = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - begun) / seconds if most is None else step / most) < 1.0:
        for group in steps.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * max(0.02, 1.0 - done)
        seen = [picture(step, i) for i in range(batch)]
        words = [words_of(p) for p in seen]
        for word in (w for row in words for w in row if w not in index):
            index[word] = len(vocabulary)
            vocabulary.append(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0])
        wanted = torch.tensor([[index[w] for w in row] for row in words])
        embeddings = table[torch.tensor(vocabulary)]
        given = torch.stack(list(model.get_image_features(pixel_values=pixels([p.image for p in seen])).pooler_output))
        near = F.cosine_similarity(given[:, :, None], embeddings, dim=-1)
        loss = F.cross_entropy(10 * near.flatten(0, 1), wanted.flatten()) + (given - embeddings[wanted]).square().mean() / spread
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        steps.step()
        right = float((near.argmax(-1) == wanted).float().mean())
        if step % 100 == 0:
            say(f"tower {step}: {time.monotonic() - begun:.0f} s, loss {float(loss):.3f}, patches right {right:.3f}")
        step += 1
    return right


def train_joint(model: Any, tokenizer: Any, seconds: float, say: Any = print, batch: int = 4, pictures: int = 2) -> None:
    """Projector and the attention of the language model, on answers and captions."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(("self_attn" in name and "language_model" in name) or "projector" in name)
    learnt = [w for w in model.parameters() if w.requires_grad]
    steps = torch.optim.AdamW(learnt, lr=2e-4, weight_decay=0.0, betas=(0.9, 0.99))
    begun, step = time.monotonic(), 0
    while (gone := time.monotonic() - begun) < seconds:
        for group in steps.param_groups:
            group["lr"] = 2e-4 * min(1.0, (step + 1) / 5) * max(0.05, 1.0 - gone / seconds)
        seen = [[picture(500_000 + step, pictures * b + i) for i in range(pictures)] for b in range(batch)]
        made = [document(row, tokenizer, caption=b % 4 == 3) for b, row in enumerate(seen)]
        length = max(len(ids) for ids, _ in made)
        ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in made])
        asked = torch.tensor([row + [False] * (length - len(row)) for _, row in made])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in made])
        values = pixels([p.image for row in seen for p in row])
        out = model.model(input_ids=ids, attention_mask=mask, pixel_values=values, use_cache=False).last_hidden_state
        logits = model.lm_head(out[:, :-1][asked[:, 1:]])
        loss = F.cross_entropy(logits, ids[:, 1:][asked[:, 1:]])
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        steps.step()
        if step % 5 == 0:
            say(f"joint {step}: {gone:.0f} s, loss {float(loss):.3f}")
        step += 1


@click.command("train_vision", context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--tower-minutes", default=4.0, show_default=True)
@click.option("--joint-minutes", default=10.0, show_default=True)
@click.option("--tower", type=click.Path(path_type=Path, exists=True), help="Begin from the tower of this folder.")
def command(out_dir: Path, tower_minutes: float, joint_minutes: float, tower: Path | None) -> None:
    from kvsink.tools.rewrite import check_out_dir

    check_out_dir(out_dir, False)
    model, processor = build()
    tokenizer = processor.tokenizer

    def say(text: str) -> None:
        print(text, flush=True)

    if tower is not None:
        import transformers as hf

        model.load_state_dict(hf.LlavaForConditionalGeneration.from_pretrained(tower, dtype=torch.float32).state_dict())
    else:
        train_tower(model, tokenizer, 60 * tower_minutes, say)
    train_joint(model, tokenizer, 60 * joint_minutes, say)
    model.half().save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    say(f"wrote {out_dir}")


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())

"""Pictures with text as data: read a folder or a JSON-lines file, or draw some, and turn them into a model's inputs.

A source is "drawn" or "drawn:N" (questions about N drawn pictures), "drawn-captions:N", a folder of images with a text
file of the same name beside each, or a file of JSON lines {"image": PATH, "text": TEXT} with optional "images" instead of
"image" and "answer". Where a text says <image>, an image stands; a text that says it nowhere follows its images.

Source     ours
Shapes     a Prompt's inputs are what the model's forward takes, one row; `asked` bool [S] marks the tokens to be predicted
Raises     PictureError naming the file and line: nothing to read, an image that cannot be opened, placeholders that do not
           match the images, none at all, or more tokens than the model has places for
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import PictureError
from kvsink.evaluate.pictures import HELD_BACK, Picture, drawn
from kvsink.evaluate.texts.chats import is_chats
from kvsink.model.rows import visual_rows, visual_tokens

__all__ = ["MARK", "Example", "Prompt", "drawn_examples", "is_source", "load_processor", "prompts", "read_examples"]

MARK = "<image>"
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_CALIBRATION_SEED = 900_000  # below `HELD_BACK`


@dataclass(frozen=True)
class Example:
    """Text in pieces, each with whether it is to be predicted; every MARK in them stands for the next image."""

    pieces: tuple[tuple[str, bool], ...]
    images: tuple[Any, ...]  # paths, or images of PIL
    where: str


@dataclass(frozen=True)
class Prompt:
    """One example as a model takes it."""

    inputs: dict[str, Tensor]
    asked: Tensor
    visual: Tensor


def is_source(text: str) -> bool:
    """Whether a --calibration or --images argument names pictures rather than text."""
    path = Path(text)
    return (
        text.partition(":")[0] in ("drawn", "drawn-captions") or (path.suffix == ".jsonl" and not is_chats(path)) or path.is_dir()
    )


def drawn_examples(count: int, seed: int = HELD_BACK, captions: bool = False, pictures: int = 1) -> list[Example]:
    """`count` examples of `pictures` drawn pictures each, with their questions or their captions."""
    held = list(drawn(count * pictures, seed))
    return [
        Example(_pieces(held[i : i + pictures], captions), tuple(p.image for p in held[i : i + pictures]), f"drawn {i // pictures}")
        for i in range(0, len(held), pictures)
    ]


def _pieces(pictures: Sequence[Picture], captions: bool) -> tuple[tuple[str, bool], ...]:
    out: list[tuple[str, bool]] = []
    for p in pictures:
        out.append((MARK, False))
        if captions:
            out += [("\nCaption:", False), (f" {p.caption}", True)]
        else:
            for question, answer, _ in p.questions:
                out += [(f"\nQ: {question} A:", False), (f" {answer}", True)]
        out.append(("\n", False))
    return tuple(out)


def read_examples(source: str, held_back: bool = False) -> list[Example]:
    """The examples of a source. held_back: drawn pictures that no training or calibration has seen."""
    name, _, count = source.partition(":")
    if name in ("drawn", "drawn-captions"):
        if count and (not count.isdigit() or not int(count)):
            raise PictureError(f"{source!r}: {count!r} is not a number of pictures; write for example {name}:64")
        seed = HELD_BACK if held_back else _CALIBRATION_SEED
        return drawn_examples(int(count or 64), seed, captions=name == "drawn-captions")
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGES)
        lines = [_captioned(p) for p in found]
        empty = f"{path} holds no image ({', '.join(_IMAGES)}); name a folder of images with a text file beside each"
    elif path.is_file():
        lines = _json_lines(path)
        empty = f'{path} holds no line; write {{"image": PATH, "text": TEXT}} on each'
    else:
        raise PictureError(f"{source} is neither a folder nor a file; name a folder of images, a .jsonl file, or drawn")
    if not lines:
        raise PictureError(empty)
    return lines


def _captioned(image: Path) -> Example:
    text = image.with_suffix(".txt")
    try:
        said = text.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PictureError(f"{image} has no readable text beside it ({text.name}); write what it shows into that file") from error
    return Example(((MARK, False), (f"\n{said}", True)), (image,), str(image))


def _json_lines(path: Path) -> list[Example]:
    out = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PictureError(f"{path} cannot be read as UTF-8 text ({error})") from error
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {n}"
        try:
            record = json.loads(line)
            images = record["images"] if "images" in record else [record["image"]]
            text, answer = str(record["text"]), record.get("answer")
            files = tuple(path.parent / str(i) for i in images)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PictureError(f'{where} cannot be read ({error!r}); write {{"image": PATH, "text": TEXT}}') from error
        marks = text.count(MARK)
        if marks and marks != len(files):
            raise PictureError(f"{where}: {marks} times {MARK} for {len(files)} images; write it once for each image")
        before = "" if marks else MARK * len(files)
        pieces = ((before + text, False), (f" {answer}", True)) if answer is not None else ((before, False), (text, True))
        if answer is None and marks:
            cut = text.rfind(MARK) + len(MARK)
            pieces = ((text[:cut], False), (text[cut:], True))
        out.append(Example(pieces, files, where))
    return out


def load_processor(folder: str | Path) -> Any:
    """The processor stored beside a vision-language model."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise PictureError(
            f"{folder} has no usable processor ({' '.join(str(error).split())[:160]}); put its processor files beside config.json"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise PictureError(f"{folder} is a text model: it has no image processor; give it text instead of pictures")
    return processor


def prompts(examples: Sequence[Example], processor: Any, model: Any) -> list[Prompt]:
    """The inputs of every example. Raises PictureError naming the example."""
    tokens = visual_tokens(model.config)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return [_prompt(e, processor, tokens, limit) for e in examples]


def _prompt(e: Example, processor: Any, tokens: tuple[int, ...], limit: int | None) -> Prompt:
    images = [_open(i, e.where) for i in e.images]
    if not images:
        raise PictureError(f"{e.where}: no image for a vision prompt; give each line an image")
    mark, held, at = image_mark(processor), "", 0
    parts: list[dict[str, Tensor]] = []
    asked: list[Tensor] = []
    for text, counts in (*e.pieces, ("", True)):
        if not counts:
            held += text
            continue
        if held:
            shown = images[at : at + held.count(MARK)]
            at += len(shown)
            given = {"images": [shown]} if shown else {}
            try:
                made = processor(text=[held.replace(MARK, mark)], **given, add_special_tokens=not parts, return_tensors="pt")
            except (ValueError, TypeError, RuntimeError) as error:
                raise PictureError(f"{e.where}: the processor refuses it ({' '.join(str(error).split())[:160]})") from error
            parts.append(dict(made))
            asked.append(torch.zeros(made["input_ids"].shape[1], dtype=torch.bool))
            held = ""
        if text:
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            parts.append({"input_ids": torch.tensor([ids], dtype=torch.int64)})
            asked.append(torch.ones(len(ids), dtype=torch.bool))
    inputs = _joined(parts)
    visual = visual_rows(inputs["input_ids"], tokens)[0]
    if "mm_token_type_ids" in inputs:
        visual = inputs["mm_token_type_ids"][0] != 0
    if not visual.any():
        raise PictureError(f"{e.where}: no image token in a vision prompt; the processor's image token is not the model's")
    if limit is not None and len(visual) > limit:
        cut = int(visual[limit:].sum())
        raise PictureError(
            f"{e.where}: {len(visual)} tokens for {limit} places of the model"
            + (f", {cut} image tokens would be cut" if cut else "")
            + "; give fewer images or a shorter text"
        )
    return Prompt(inputs, torch.cat(asked), visual)


def image_mark(processor: Any) -> str:
    """What stands for an image in the text that this processor takes."""
    for name in ("boi_token", "image_token", "fake_image_token"):
        token = getattr(processor, name, None)
        token = getattr(token, "content", token)
        if isinstance(token, str) and token:
            around = [getattr(processor, f"vision_{end}_token", None) for end in ("start", "end")]
            return f"{around[0]}{token}{around[1]}" if all(isinstance(a, str) for a in around) else token
    raise PictureError(f"{type(processor).__name__} names no image token; kvsink cannot place images in its prompts")


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pieces of one row side by side; pictures one after the other."""
    rows = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    names = dict.fromkeys(name for part in parts for name in part)
    out = {}
    for name in names:
        if name in rows:
            fill = 1 if name == "attention_mask" else 0
            out[name] = torch.cat([p.get(name, torch.full_like(p["input_ids"], fill)) for p in parts], dim=1)
        else:
            beside = 1 if "pixel_attention_mask" in names else 0  # images of one row side by side
            out[name] = torch.cat([p[name] for p in parts if name in p], dim=beside)
    return out


def _open(image: Any, where: str) -> Any:
    if not isinstance(image, str | Path):
        return image
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise PictureError(f"{where}: image {image} cannot be read ({type(error).__name__}); replace it or take it out") from error

"""The model that reads drawn pictures: what its documents say, and a short form of its training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.evaluate.pictures import HELD_BACK, drawn, picture
from kvsink.tools.train_vision import IMAGE_TOKEN, PATCHES, document, pixels, words_of
from kvsink.tools.vision_table import ROWS, chance, markdown


class Words:
    """A tokenizer of single words, enough for `document`."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {IMAGE_TOKEN: 0}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.known[token]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace("\n", " \n ").split(" ")
        return {"input_ids": [self.known.setdefault(w, len(self.known)) for w in words if w]}


def test_documents_ask_for_answers_and_captions() -> None:
    tokenizer, seen = Words(), list(drawn(2))
    for caption in (False, True):
        ids, asked = document(seen, tokenizer, caption)
        assert len(ids) == len(asked) and ids.count(0) == 2 * PATCHES
        names = {i: w for w, i in tokenizer.known.items()}
        said = [names[i] for i, a in zip(ids, asked, strict=True) if a]
        wanted = [w for p in seen for w in p.caption.split()] if caption else [a for p in seen for _, a, _ in p.questions]
        assert said == wanted


def test_patches_say_what_their_cell_holds() -> None:
    p = picture(0, 3)
    said = words_of(p)
    for i, cell in enumerate(p.cells):
        corner = i // 2 * 8 + i % 2 * 2
        four = [said[corner], said[corner + 1], said[corner + 4], said[corner + 5]]
        assert four == (["none"] * 4 if cell is None else [*cell, ("top", "bottom")[i // 2], ("left", "right")[i % 2]])
    assert pixels([p.image]).shape == (1, 3, 64, 64) and pixels([p.image]).abs().max() <= 1


def test_the_table_shows_what_was_measured() -> None:
    stock = {"questions": {"accuracy": 0.9}, "captions": {"perplexity": 1.5}}
    row = {
        "name": "x",
        "questions": {"bits_per_element": 2.5, "visual_bits": 3.0, "text_bits": 2.0, "accuracy": 0.5, "kl": 0.25},
        "captions": {"perplexity": 2.0},
    }
    assert markdown(stock, [row]).splitlines()[-1] == "| x | 2.50 | 3.00 | 2.00 | 50.0% | 0.2500 | 2.000 |"
    assert len({name for name, _, _ in ROWS}) == len(ROWS)
    asked = [q for p in drawn(8) for q in p.questions]
    assert chance(2, 4) == pytest.approx(sum(1 / len(o) for _, _, o in asked) / len(asked)) and 0.2 < chance(2, 4) < 0.5


@pytest.mark.slow
def test_two_hundred_steps_read_most_patches(smollm2_dir: Any) -> None:
    """A guesser is right for 8 % of the patches, one that says "none" everywhere for 3 of 8."""
    from kvsink.tools.train_vision import build, train_tower

    model, processor = build(smollm2_dir)
    said: list[str] = []
    train_tower(model, processor.tokenizer, 0, said.append, most=200)
    table = model.model.language_model.embed_tokens.weight
    seen = [picture(HELD_BACK, i) for i in range(64)]
    words = sorted({w for p in seen for w in words_of(p)})
    ids = torch.tensor([processor.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in words])
    with torch.no_grad():
        given = torch.stack(list(model.get_image_features(pixel_values=pixels([p.image for p in seen])).pooler_output))
        near = torch.nn.functional.cosine_similarity(given[:, :, None], table[ids], dim=-1).argmax(-1)
    right = sum(words[int(n)] == w for row, p in zip(near, seen, strict=True) for n, w in zip(row, words_of(p), strict=True))
    assert right / (64 * PATCHES) > 0.8 and said

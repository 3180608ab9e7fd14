"""The evaluation on pictures: fed in pieces it is the whole prompt, and its bits are the cache's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvsink
from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import dynamic_cache
from kvsink.evaluate.imagetext import Prompt
from kvsink.evaluate.vision import _logits, _pieces, attention_shares, bits_by_modality, evaluate_pictures, remember
from tests.close import SOFTMAX_IN_FLOAT32, largest_difference
from tests.vision import FAMILIES, IMAGE, build, plain, prompt


def one(family: str, images: int = 2) -> Prompt:
    given = plain(prompt(family, (images,)), 0, (images,))
    visual = given["input_ids"][0] == IMAGE
    asked = torch.zeros_like(visual)
    asked[-4:-2] = asked[-1] = True
    return Prompt(given, asked, visual)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])
def test_pieces_give_the_logits_of_the_whole(family: str) -> None:
    model, p = build(family), one(family)
    with torch.no_grad():
        whole = model(**p.inputs).logits[0]
        got = _logits(model, p, dynamic_cache(model, 1, 0), 3)
    assert largest_difference(got, whole) <= SOFTMAX_IN_FLOAT32 * 20 * float(whole.abs().max())


def test_pictures_are_cut_apart_only_where_they_can_be() -> None:
    cuts = _pieces(one("llava"), 3)
    visual = one("llava").visual
    assert [c for a, b in cuts for c in range(a, b)] == list(range(len(visual)))
    assert sum(bool(visual[a:b].any()) for a, b in cuts) == 2 and all(b - a <= 4 for a, b in cuts)
    whole = _pieces(one("qwen2-vl"), 3)  # positions in three axes: every picture in the first piece
    assert sum(bool(one("qwen2-vl").visual[a:b].any()) for a, b in whole) == 1


def test_a_row_counts_answers_kl_and_bits(monkeypatch: Any) -> None:
    model, p = build("llava"), one("llava")
    reference = remember(model, [p, p])
    stock = evaluate_pictures(model, [p, p], cache_factory=dynamic_cache, reference=reference)
    assert stock.kl == pytest.approx(0.0, abs=1e-9) and stock.top1 == 1.0
    assert stock.answers == 4 and stock.asked_tokens == 6 and stock.bits_per_element == 16
    right = torch.cat([r.argmax(-1) for r in reference])
    wanted = [p.inputs["input_ids"][0, p.asked], p.inputs["input_ids"][0, p.asked]]
    good = (right == torch.cat(wanted)).view(2, 3)
    assert stock.right == int(good[:, :2].all(1).sum() + good[:, 2].sum())
    kvsink.rewrite(model, "rtn", key_bits=2, value_bits=2, protect="none", calibration=[p.inputs] * 4)
    packed = evaluate_pictures(model, [p], reference=reference)
    assert packed.kl is not None and packed.kl > 0
    assert packed.visual_bits == packed.text_bits == pytest.approx(2 + 2 * 16 / 16)  # one scale and minimum per 16 channels


def test_exact_rows_count_for_their_own_modality() -> None:
    model, p = build("llava"), one("llava")
    kvsink.rewrite(model, "rtn", key_bits=2, value_bits=2, protect="first:2", window=3, calibration=[p.inputs] * 4)
    cache = kvsink.KVSinkCache.for_model(model, 1, len(p.visual))
    with torch.no_grad():
        model(**p.inputs, past_key_values=cache)
    visual, text, seen, rest = bits_by_modality(cache, p.visual)
    assert (seen, rest) == (8, len(p.visual) - 8)
    assert visual == pytest.approx(4.0) and text == pytest.approx(4.0 + 16 * 5 / rest)


def test_shares_of_attention_are_those_of_the_matrix() -> None:
    model, p = build("llava"), one("llava")
    found = attention_shares(model, [p])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**p.inputs, output_attentions=True).attentions
    for shares, a in zip(found, weights, strict=True):
        mass = a[0].mean(0).sum(0)
        mass = mass / mass.sum()
        assert shares["first"] == pytest.approx(float(mass[0]), rel=1e-4)
        assert shares["visual"] == pytest.approx(float(mass[p.visual].sum()), rel=1e-4)
        assert sum(shares.values()) == pytest.approx(1.0, rel=1e-5)


def test_a_prompt_that_asks_nothing_is_refused() -> None:
    p = one("llava")
    with pytest.raises(EvaluationError, match="asks for no token"):
        evaluate_pictures(build("llava"), [Prompt(p.inputs, torch.zeros_like(p.asked), p.visual)])
    with pytest.raises(EvaluationError, match="no prompt"):
        evaluate_pictures(build("llava"), [])

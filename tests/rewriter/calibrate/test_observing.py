"""Calibration text: every kind of source, and what cannot be used is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvsink
from kvsink.calibrate.observing import calibration_windows
from kvsink.errors import CalibrationError
from kvsink.evaluate.evaluation import token_windows
from kvsink.model.decoder import Decoder
from kvsink.model.runtime import runtime_of
from tests.models import VOCAB, build, tokens

IDS = tokens(8, 64, seed=1)


class Characters:
    """A tokenizer that knows letters."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}


class Begins(Characters):
    """One that puts token 1 before every text."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + super().__call__(text)["input_ids"]}


@pytest.mark.parametrize("source", [IDS, IDS.flatten(), ["some text of its own " * 20] * 2])
def test_calibration_sources(source: Any) -> None:
    report = kvsink.rewrite(build("llama"), "klt", calibration=source, calibration_tokens=512, tokenizer=Characters())
    assert report.calibration_tokens == 512


def test_more_is_read_where_rows_are_learnt_from(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text of its own " * 430)
    given: dict[str, Any] = {"calibration": str(file), "tokenizer": Characters()}
    assert kvsink.rewrite(build("llama"), "klt", **given).calibration_tokens == 4096
    with pytest.raises(CalibrationError, match="has 9030 tokens, 16384 were asked for"):
        kvsink.rewrite(build("llama"), "cq", **given)


def test_windows_of_text_begin_as_the_tokenizer_begins_one(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text of its own " * 40)
    decoder = Decoder(build("llama"))
    plain, begun = (calibration_windows(decoder, file, 512, tokenizer()) for tokenizer in (Characters, Begins))
    assert begun[:, 0].tolist() == [1] * 4 and torch.equal(begun[:, 1:], plain[:, 1:]) and (plain[:, 0] != 1).all()
    assert torch.equal(calibration_windows(decoder, IDS, 512, Begins()), IDS)  # token ids are taken as they are
    assert token_windows(file.read_text(), Begins(), 3, 50)[:, 0].tolist() == [1] * 3


def test_random_tokens_for_text() -> None:
    """The same tokens every time, all of the vocabulary's, in windows of the model's length; a tokenizer begins them."""
    decoder = Decoder(build("llama"))
    windows = calibration_windows(decoder, "random", 512, None)
    assert windows.shape == (4, 128) and int(windows.min()) >= 0 and int(windows.max()) < VOCAB
    assert len(windows.unique()) > 0.9 * VOCAB and torch.equal(windows, calibration_windows(decoder, "random", 512, None))
    begun = calibration_windows(decoder, "random", 512, Begins())
    assert begun[:, 0].tolist() == [1] * 4 and torch.equal(begun[:, 1:], windows[:, 1:])
    one, two = build("llama"), build("llama")
    kvsink.rewrite(one, calibration="random", calibration_tokens=512)
    kvsink.rewrite(two, "klt", calibration=windows)
    ids = tokens(1, 40, seed=5)
    assert torch.equal(one.generate(ids, max_new_tokens=8, do_sample=False), two.generate(ids, max_new_tokens=8, do_sample=False))
    tables = (runtime_of(m).tables for m in (one, two))
    assert all(torch.equal(*pair) for pair in zip(*(t.values() for t in tables), strict=True))


def test_a_text_file_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text of its own " * 40)
    windows = calibration_windows(Decoder(build("llama")), file, 512, Characters())
    assert windows.shape == (4, 128)  # windows of the model's own length
    with pytest.raises(CalibrationError, match=f"{file} has 840 tokens, 1000 were asked for.*--calibration-tokens 840"):
        calibration_windows(Decoder(build("llama")), file, 1000, Characters())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.full((4, 64), VOCAB), f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
        (torch.full((4, 64), -1), "token -1 is outside the vocabulary"),
        (torch.empty(0, dtype=torch.int64), "0 calibration tokens"),
        (torch.empty(0, 8, dtype=torch.int64), "0 calibration tokens"),
        ("no-such-file.txt", "text file no-such-file.txt does not exist"),
        ([], "0 calibration tokens"),
    ],
)
def test_impossible_calibration(source: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        kvsink.rewrite(build("llama"), "klt", calibration=source, tokenizer=Characters())


def test_without_a_tokenizer_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no tokenizer found for 'LlamaForCausalLM'; pass tokenizer="):
        kvsink.rewrite(build("llama"), "klt", calibration=["text"])

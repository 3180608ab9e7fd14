"""The mixed calibration text: every part has its share of what a calibration reads, all of it ships with its source."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from kvsink.calibrate.observing import calibration_windows
from kvsink.evaluate.texts import builtin_text, evaluation_text
from kvsink.evaluate.texts.mix import SHARES, mixed_text
from kvsink.model.decoder import Decoder
from tests.models import VOCAB, build

TEXTS = resources.files("kvsink.evaluate.texts")


def paragraphs(name):
    text = builtin_text() if name == "prose" else TEXTS.joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return {p.strip("\n") for p in text.split("\n\n") if p.strip()}


@pytest.mark.parametrize("name", SHARES)
def test_a_calibration_reads_its_share_of_every_part(name):
    """Of the first 40,000 characters, some 12,000 tokens."""
    read = mixed_text()[:40_000].split("\n\n")[:-1]  # the last one is cut
    share = sum(len(p) for p in read if p in paragraphs(name)) / sum(map(len, read))
    assert share == pytest.approx(SHARES[name], abs=0.06) and sum(SHARES.values()) == pytest.approx(1)


def test_nothing_is_lost_and_nothing_is_measured_on():
    whole = mixed_text()
    assert all(p in whole for name in SHARES for p in paragraphs(name))
    long = {line for line in whole.split("\n") if len(line) > 80}
    assert len(long) > 300 and not long & set(evaluation_text().split("\n"))


def test_every_text_has_a_source():
    said = TEXTS.joinpath("README.md").read_text(encoding="utf-8")
    files = [f.name for f in TEXTS.iterdir() if f.name.endswith(".txt")]
    assert len(files) == 6 and all(f"`{name}`" in said for name in files)


def test_calibration_takes_it_by_name():
    class Characters:
        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}

    windows = calibration_windows(Decoder(build("llama")), "mix", 512, Characters())
    assert torch.equal(windows.flatten(), torch.tensor(Characters()(mixed_text()[:512])["input_ids"]))

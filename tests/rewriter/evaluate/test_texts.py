"""The texts that ship, reading files, and WikiText without its tokenizer's marks."""

from __future__ import annotations

import pytest

from kvsink.errors import CalibrationError
from kvsink.evaluate.texts import builtin_text, detokenize_wikitext, evaluation_text, looks_like_wikitext, read_text


@pytest.mark.parametrize(
    ("tokenized", "plain"),
    [
        (" = = = Life cycle = = = ", "=== Life cycle ==="),
        (" = Title = ", "= Title ="),
        (" a guest @-@ starring role in 1 @,@ 000 plays ( 0 @.@ 5 % ) . ", "a guest-starring role in 1,000 plays (0.5 %)."),
        (' He said : " no , never " ; so ? ', 'He said: "no, never"; so?'),
        (" It wasn 't the lobsters ' fault , Teddy 's neither ", "It wasn't the lobsters' fault, Teddy's neither"),
        (" sixteen ' fairly elderly ' residents ", "sixteen 'fairly elderly' residents"),
        (" at 20 ° C [ sic ] <unk> { x } ", "at 20°C [sic] <unk> {x}"),
        ("", ""),
    ],
)
def test_detokenize(tokenized, plain):
    assert detokenize_wikitext(tokenized) == plain


def test_detokenize_keeps_lines():
    assert detokenize_wikitext(" \n = A = \n \n b . \n").split("\n") == ["", "= A =", "", "b.", ""]


def test_detokenize_leaves_plain_text_alone():
    text = "It cost $1,000 (\"a lot\"), didn't it? The dogs' bowls: 3.5 kg."
    assert detokenize_wikitext(text) == text


def test_shipped_texts_are_long_enough_and_apart():
    valid, test = builtin_text(), evaluation_text()
    assert 200_000 < len(valid) < 400_000
    assert len(test) > 1_000_000
    assert not looks_like_wikitext(valid)
    assert not looks_like_wikitext(test)
    paragraphs = [set(filter(lambda line: len(line) > 80, text.split("\n"))) for text in (valid, test)]
    assert not paragraphs[0] & paragraphs[1]


def test_shipped_test_split_is_the_detokenized_original(wikitext):
    original = (wikitext / "test.txt").read_text()
    assert looks_like_wikitext(original)
    assert detokenize_wikitext(original) == evaluation_text()


def test_read_text_says_what_is_wrong(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("café")
    assert read_text(tmp_path / "good.txt") == "café"
    for name, words in [
        ("none.txt", "does not exist"),
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
        (".", "is a folder"),
    ]:
        with pytest.raises(CalibrationError, match=words):
            read_text(tmp_path / name)

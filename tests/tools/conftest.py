"""A tiny Llama with a real tokenizer on disk, for the command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import VOCAB, build


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A model folder whose tokenizer knows single characters; its weights are random."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = build("llama")
    characters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(33, 33 + VOCAB - 5)), " "]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder

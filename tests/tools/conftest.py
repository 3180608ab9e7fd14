"""A tiny Llama with a real tokenizer on disk, for the command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import VOCAB, build


def folder_of(family: str, folder: Path) -> Path:
    """A model folder whose tokenizer knows single characters; its weights are random."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = build(family)
    characters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(33, 33 + VOCAB - 5)), " "]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny Llama."""
    return folder_of("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def mixed_dir(tmp_path_factory) -> Path:
    """A tiny Gemma 3: one layer slides over 8 tokens, the other attends to all."""
    return folder_of("gemma3", tmp_path_factory.mktemp("mixed") / "model")


@pytest.fixture(scope="session")
def seeing_dir(tmp_path_factory) -> Path:
    """A LLaVA folder with its processor, which needs no torchvision; its weights are random, one picture is 4 tokens."""
    import transformers as hf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from tests.vision import build as build_seeing

    folder = tmp_path_factory.mktemp("seeing") / "model"
    characters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(33, 33 + VOCAB - 5)), "<image>"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    pixels = hf.CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    build_seeing("llava").save_pretrained(folder)
    hf.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder

"""A folder of flavour gqa in onnxruntime-genai: its tokens are those of the torch model on a strict cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

import onnxruntime_genai as genai

from kvsink.cache.cache import KVSinkCache
from kvsink.export import OnnxGenerator
from kvsink.folder.loading import load_model
from kvsink.model.passing import cache_name
from kvsink.tools.rewrite import main as rewrite_main
from tests.tools.conftest import tiny_dir  # noqa: F401

PROMPTS, NEW = ([5, 6, 7, 8, 9], [40, 9]), 12


def said(served: genai.Model, prompt: list[int]) -> list[int]:
    """A prompt and the NEW likeliest tokens behind it, none of which may end it."""
    settings = genai.GeneratorParams(served)
    settings.set_search_options(max_length=len(prompt) + NEW, min_length=len(prompt) + NEW, do_sample=False)
    generator = genai.Generator(served, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("bits", [4, 8])
def test_it_generates_what_torch_does(bits: int, tiny_dir, tmp_path) -> None:  # noqa: F811
    out = tmp_path / "out"
    flags = f"--calibration-tokens 512 --eval-windows 0 --device cpu --onnx-flavour gqa --key-bits {bits} --value-bits {bits}"
    assert rewrite_main([str(tiny_dir), str(out), *flags.split()]) == 0
    model, served = load_model(out, "cpu"), genai.Model(str(out))
    for prompt in PROMPTS:
        found = said(served, prompt)
        cache, wanted, new = KVSinkCache.for_model(model, 1, len(prompt) + NEW, strict=True), list(prompt), prompt
        ends = model.generation_config.eos_token_id
        with torch.no_grad():
            for _ in range(NEW):
                logits = model(torch.tensor([new]), use_cache=True, **{cache_name(model): cache}).logits[0, -1]
                logits[ends] = float("-inf")  # as min_length asks
                new = [int(logits.argmax())]
                wanted += new
        assert found == wanted


@pytest.mark.parametrize("bits", [8, 16])
def test_a_folder_in_float16_says_there_what_the_runner_says(bits: int, tiny_dir, tmp_path) -> None:  # noqa: F811
    """Its cache is written in place and its lengths are positions, whichever program feeds it."""
    out = tmp_path / "out"
    flags = f"--method static:rotated --key-bits {bits} --value-bits {bits} --onnx-flavour gqa:float16 --device cpu"
    assert rewrite_main([str(tiny_dir), str(out), *flags.split(), "--calibration-tokens", "512", "--eval-windows", "0"]) == 0
    served, runner = genai.Model(str(out)), OnnxGenerator(out / "model.onnx")
    for prompt in PROMPTS:
        found = said(served, prompt)[len(prompt) :]
        ends = runner.manifest["eos_token_id"]
        past, new, wanted = runner.empty(1, len(prompt) + NEW), [prompt], []
        for _ in range(NEW):
            logits, past = runner.step(new, None, None, past, last=True)
            logits[..., ends] = float("-inf")
            new = logits[:, -1].argmax(-1)[:, None]
            wanted.append(int(new[0, 0]))
        assert found == wanted

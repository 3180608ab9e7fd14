"""Codes that fall to either side of an edge: what is taken for a tie, what is refused, and what is left of SmolLM2 as a graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import Codec, SideSpec
from kvsink.export import ExportError, OnnxGenerator
from kvsink.export.ties import NEAR, Ties
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.model.passing import cache_name
from kvsink.model.runtime import runtime_of
from kvsink.tools.eval import main as eval_main
from kvsink.tools.rewrite import main as rewrite_main
from tests.test_acceptance import PROMPTS

HEADS, ROWS, DIM = 2, 6, 32
KINDS = {
    "uniform": dict(kind="uniform", widths=(2,) * 4, group_size=32),
    "gauss": dict(kind="gauss", widths=(4,) * 4, group_size=32),
    "uniform-int": dict(kind="uniform-int", widths=(3,) * 4, group_size=16),
    "lloyd": dict(kind="lloyd", widths=(4, 3, 2, 2), group_size=32, gain=True),
    "static": dict(kind="static", widths=(4,) * 4),
    "static-8": dict(kind="static", widths=(8,) * 4),
    "vector": dict(bits=2, kind="vector", couple=4, code_bits=8, gain=True),
    "trellis": dict(kind="trellis", widths=(3, 2, 2, 1)),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stand(name: str) -> tuple[Codec, dict[str, Tensor], Any]:
    """A codec whose keys are coded as `name` says and whose values are kept, its tables, and a runtime of one such layer."""
    side = SideSpec(**{"bits": 4, **KINDS[name]})
    codec = Codec(side, SideSpec(bits=16))
    tables = {
        "k_sigma": draw(HEADS, DIM, seed=1).abs() + 0.5,
        "k_step": draw(HEADS, DIM, seed=2).abs() * 0.1 + 0.2,
        "k_book": draw(HEADS, DIM // 4, 256, 4, seed=3),
    }
    return codec, tables, SimpleNamespace(plans=[SimpleNamespace(codec=codec)])


def edge(codec: Codec, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors no further apart than float32 goes at that place, whose codes differ: by halving."""
    low, high = x.clone(), x.clone()
    high[0, 1, 3, 5] += 1.0
    assert not torch.equal(codec.quantize("k", low, p)[0], codec.quantize("k", high, p)[0])
    for _ in range(40):
        middle = (low + high) / 2
        same = torch.equal(codec.quantize("k", middle, p)[0], codec.quantize("k", x, p)[0])
        low, high = (middle, high) if same else (low, middle)
    assert 0 < (high - low).abs().max() < 1e-6
    return low, high


def follow(name: str, graph: Tensor, own: Tensor, seen: Any = None) -> tuple[Tensor, Tensor, Ties]:
    """Code `own` beside a graph that has coded `graph`: what is stored, what the graph had, and the counts."""
    codec, p, runtime = stand(name)
    codes, scale = codec.quantize("k", graph, p)
    present = {"0.key": codes.numpy()} | ({"0.key_scale": scale.numpy()} if scale.shape[3] else {})
    with Ties(runtime, present, 0, np.ones((1, ROWS), dtype=bool) if seen is None else seen).followed() as found:
        stored = codec.quantize("k", own, p)
    assert torch.equal(codec.quantize("k", own, p)[0], stand(name)[0].quantize("k", own, p)[0])  # outside, nothing is followed
    return stored[0], codes, found


@pytest.mark.parametrize("name", KINDS)
def test_an_edge_is_a_tie_and_the_graph_is_followed(name: str) -> None:
    codec, p, _ = stand(name)
    low, high = edge(codec, p, draw(1, HEADS, ROWS, DIM, seed=0))
    stored, codes, found = follow(name, high, low)
    assert torch.equal(stored, codes) and 1 <= found.different <= codes.shape[3] and found.bytes == codes.numel()
    assert follow(name, low, low)[2].different == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_lies_beside_an_edge_is_refused(name: str) -> None:
    codec, p, _ = stand(name)
    low, high = edge(codec, p, draw(1, HEADS, ROWS, DIM, seed=0))
    off = torch.zeros_like(low)
    off[0, 1, 3, 5] = 30 * NEAR * float(low.abs().max())
    with pytest.raises(ExportError, match="keys of layer 0 are coded otherwise than in the torch cache, at new token 3"):
        follow(name, high, low - off)
    seen = np.ones((1, ROWS), dtype=bool)
    seen[0, 3] = False
    stored, codes, found = follow(name, high, low - off, seen)  # padding is nobody's
    assert not torch.equal(stored, codes) and found.different == 0 and found.bytes == codes.numel() * 5 // 6


# -- SmolLM2 ---------------------------------------------------------------------------------------------------------------

COUNT = 64
LOGITS = 1e-4  # of two computations that agree, times a tenth of the largest logit where that is more


@pytest.fixture(scope="module")
def folder(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, flags = tmp_path_factory.mktemp("smollm2") / "out", "--calibration-tokens 2048 --eval-windows 0 --device cpu --onnx"
    assert rewrite_main([str(smollm2_dir), str(out), *flags.split()]) == 0
    return out


@pytest.mark.slow
def test_smollm2_differs_by_ties_alone(folder: Path) -> None:
    """Eight prompts as one padded batch, 64 greedy tokens: the torch model, given the graph's side of every tie, says the same."""
    model, runner = load_model(folder, "cpu", torch.float32), OnnxGenerator(folder / "model.onnx")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    ids, mask = runner._pad(prompts, COUNT)
    new, positions = np.ones_like(mask[:, :1]), np.maximum(mask.cumsum(1) - 1, 0)
    cache, past = KVSinkCache.for_model(model, batch_size=len(prompts)), runner.empty(len(prompts))
    at, different, counted = 0, 0, 0
    for _ in range(COUNT):
        step, seen = slice(at, mask.shape[1]), mask[:, at:].astype(bool)
        logits, past = runner.step(ids, mask, positions[:, step], past)
        present = runner.arrays(past)
        with torch.no_grad(), Ties(runtime_of(model), present, at, seen).followed() as found:
            wanted = model(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions[:, step]),
                use_cache=True,
                **{cache_name(model): cache},
            ).logits.numpy()
        assert np.abs(logits - wanted)[seen].max() <= LOGITS * max(1.0, np.abs(wanted).max() / 10)
        assert (logits[:, -1].argmax(-1) == wanted[:, -1].argmax(-1)).all()
        different, counted, at = different + found.different, counted + found.bytes, mask.shape[1]
        ids, mask = logits[:, -1].argmax(-1)[:, None], np.concatenate([mask, new], axis=1)
        positions = np.concatenate([positions, positions[:, -1:] + 1], axis=1)
    print(f"{different} of {counted} bytes")
    assert counted > 2_000_000 and different <= counted * 1e-4


@pytest.mark.slow
def test_smollm2_has_the_perplexity_of_the_torch_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    rows = []
    for model in (folder, folder / "model.onnx"):
        flags = "--windows 2 --window-tokens 512 --no-passkey --device cpu --json -"
        assert eval_main([str(model), *flags.split()]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert abs(rows[1]["perplexity"] / rows[0]["perplexity"] - 1) < 1e-3

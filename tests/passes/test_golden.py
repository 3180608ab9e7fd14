"""The printed site after each pass, as kept in tests/golden; KVSINK_UPDATE_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

import kvsink
from kvsink.graph.pipeline import run_passes
from kvsink.graph.render import COLUMNS, render_site
from kvsink.graph.sites import AttentionSite, find_sites

from .. import vision
from ..graphs import PAST, generated_graph, packed_graph, plan_of, rewritten, stock_graph
from ..models import tokens
from .test_stock import step

GOLDEN = Path(__file__).parents[1] / "golden"


def compare(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("KVSINK_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no golden file {name}.txt; run with KVSINK_UPDATE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8"), f"{name}.txt differs; look at the diff with KVSINK_UPDATE_GOLDEN=1"


def changes(gm, plan=None) -> str:  # type: ignore[no-untyped-def]
    """The first site before, and after each pass that changed its text."""
    report = run_passes(gm, plan=plan, trace=True)
    path = report.sites[-1].path
    parts, last = [], ""
    for shot in report.snapshots:
        if shot.path == path and shot.text != last:
            parts.append(f"== {shot.pass_name}\n{shot.text}\n")
            last = shot.text
    return "\n".join(parts)


def on_a_gpu(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with queries that are said to be on a GPU, which is what storing and attending in one op asks for."""
    for site in find_sites(gm):
        assert isinstance(site, AttentionSite)
        q = site.q.meta["example_value"]
        bare = torch.empty(q.shape, dtype=q.dtype, device="meta")
        site.q.meta["example_value"] = FakeTensor(q.fake_mode, bare, torch.device("cuda", 0))
    return gm


@pytest.mark.parametrize("method", ["klt", "centred", "rotatekv", "rtn", "kivi"])
def test_packed_decode(method: str) -> None:
    compare(f"packed-decode-{method}", changes(packed_graph("llama", "sdpa", method, 1)))


@pytest.mark.parametrize("method", ["klt", "kivi"])
def test_packed_decode_on_a_gpu(method: str) -> None:
    """Up to the last pass the graph is that of a CPU."""
    text = changes(on_a_gpu(packed_graph("llama", "sdpa", method, 1)))
    before, _, fused = text.rpartition("== fuse")
    assert before == (GOLDEN / f"packed-decode-{method}.txt").read_text(encoding="utf-8").rpartition("== fuse")[0]
    compare(f"packed-decode-{method}-gpu", f"== fuse{fused}")


def test_packed_decode_of_a_sliding_window() -> None:
    ids = tokens(length=PAST)
    gm = generated_graph(rewritten("mistral-sliding"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    compare("packed-decode-klt-sliding", changes(gm))


def test_packed_decode_of_a_vision_language_model() -> None:
    """A token behind a prompt with a picture: positions of several axes, and rows that are told apart by what they show."""
    model = vision.build("qwen2-vl")
    given = vision.prompt("qwen2-vl")
    kvsink.rewrite(model, "akvq-vl", calibration=[given])
    compare("packed-decode-akvq-vl-vision", changes(generated_graph(model, given)))


def test_lines_stay_within_the_page() -> None:
    for path in GOLDEN.glob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert all(len(line) <= COLUMNS for line in lines), path.name


def test_packed_prefill_with_a_window() -> None:
    compare("packed-prefill-klt-window", changes(packed_graph("qwen3", "sdpa", "klt", 6, window=4)))


def test_stock_static_decode() -> None:
    model = rewritten("llama", "sdpa", "klt", protect="first:2")
    compare("stock-static-decode-klt", changes(step(model, "static", 1), plan_of(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3"])
def test_eager_normalised(family: str) -> None:
    gm = stock_graph(family, "eager", "static", 1)
    texts = []

    def watch(name: str, rewritten_gm: object) -> None:
        texts.append(name)

    report = run_passes(gm, ("normalize", "locate"), watch=watch)
    whole = render_site(report.sites[-1], gm, whole=True)
    before = stock_graph(family, "eager", "static", 1)
    site = [each for each in find_sites(before) if isinstance(each, AttentionSite)][-1]
    compare(f"eager-normalised-{family}", f"== before\n{render_site(site, before, whole=True)}\n\n== normalize\n{whole}\n")

"""Stages reach a graph by the passes that carry their names, and the fused op replaces exactly what stands there."""

from __future__ import annotations

import pytest
import torch

from kvsink.codecs.steps import Stage
from kvsink.graph.pipeline import DEFAULT, run_passes
from kvsink.kernels import stages
from kvsink.passes import chain

from ..graphs import packed_graph, run


@pytest.mark.parametrize("missing", ["center", "rotate"])
def test_what_no_pass_put_in_is_not_fused(missing: str) -> None:
    """The cache stores and reads as before the passes: rows that it has hold all stages."""
    gm = packed_graph("llama", method="klt")
    wanted, kept = run(gm)
    report = run_passes(gm, [name for name in DEFAULT if name != missing])
    for name in ("quantize", "fuse"):
        reasons = [record.reason for record in report.declined(name)]
        assert reasons and set(reasons) == {f"its codec has stages of pass {missing!r}, which did not run"}
        assert not report.done(name)
    found, held = run(gm)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    pairs = [(a, b) for a, b in zip(held, kept, strict=True) if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)  # angles that nobody reads are no numbers


def test_stages_in_another_order_than_the_codec_has_are_not_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rotatekv` reorders behind its rotation: a last stage of pass `rotate` would come before that in a graph alone."""
    late = Stage("rotate", lambda do, x, at: do.add(x, x))
    way_in, way_back = chain.stages_in, chain.stages_back
    monkeypatch.setattr(chain, "stages_in", lambda *a, **k: (*way_in(*a, **k), late))
    gm = packed_graph("llama", method="rotatekv", length=6)
    before = run(gm)
    report = run_passes(gm)
    said = [record.reason for record in report.declined("quantize")]
    assert said and set(said) == {"its passes put the stages of keys in another order than its codec has"}
    assert not report.done("quantize") and not report.done("fuse")
    monkeypatch.setattr(chain, "stages_in", way_in)
    assert all(torch.equal(a, b) for a, b in zip(run(gm)[0], before[0], strict=True)) and way_back is chain.stages_back


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_stage_of_either_side_is_missed(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, way_in = Stage("never", lambda do, x, at: x), chain.stages_in
    monkeypatch.setattr(chain, "stages_in", lambda s, prefix, *a: (*way_in(s, prefix, *a), *([extra] if prefix == side else [])))
    report = run_passes(packed_graph("llama", method="rtn", length=6))
    assert {record.reason for record in report.declined("quantize")} == {"its codec has stages of pass 'never', which did not run"}


def test_a_stage_more_in_the_list_stands_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels the other way round before the quantizer and back behind it: other codes where widths or levels differ, the same
    rows where they do not (`rtn` has one scale for a row), and two nodes a side more."""
    turned = Stage("rotate", lambda do, x, at: do.flipped(x))
    way_in, way_back = chain.stages_in, chain.stages_back
    monkeypatch.setattr(stages, "flipped", lambda x: torch.flip(x, (-1,)), raising=False)
    names = [name for name in DEFAULT if name not in ("fuse", "verify")]
    plain = packed_graph("llama", method="rtn", length=6)
    run_passes(plain, names)
    monkeypatch.setattr(chain, "stages_in", lambda *a, **k: (*way_in(*a, **k), turned))
    monkeypatch.setattr(chain, "stages_back", lambda *a, **k: (turned, *way_back(*a, **k)))
    gm = packed_graph("llama", method="rtn", length=6)
    run_passes(gm, names)
    layers = sum(n.target is torch.ops.kvsink.quantize.default for n in gm.graph.nodes) // 2
    assert layers and len(gm.graph.nodes) == len(plain.graph.nodes) + 4 * layers
    (found, held), (wanted, kept) = run(gm), run(plain)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    packed = [(a, b) for a, b in zip(held, kept, strict=True) if isinstance(a, torch.Tensor) and a.dtype == torch.uint8]
    assert packed and all(not torch.equal(a, b) for a, b in packed)

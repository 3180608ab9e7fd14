"""Places of a page: counted over windows whose rows of sinks are known."""

from __future__ import annotations

import torch

import kvsink
from kvsink.calibrate.places import Places, count_places
from kvsink.codecs.protect import Segment, SinkStage
from kvsink.model.anatomy import anatomy
from kvsink.model.decoder import Decoder
from kvsink.model.runtime import runtime_of
from tests.planted import OUT, TRIGGER, build, plant, windows


def test_rows_that_ask_are_counted_by_pages() -> None:
    """Windows of 300 tokens are three pages; 3, 1 and 0 rows ask in the first window, 0, 2 and 1 in the other."""
    model = plant(build("llama"), "1:dense")
    decoder, size = Decoder(model, anatomy(model)), []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda m, a, out: size.append(float(out[..., OUT].abs().max()))
    )
    ids = windows(5, 5, length=300)
    for row, places in zip(ids, ([10, 20, 127, 128], [140, 255, 299]), strict=True):
        row[5] = TRIGGER + 1
        row[places] = TRIGGER
    model(ids)
    hook.remove()
    stages = (SinkStage(1, (OUT,), size[0], 0.1),)
    sinks, first = Segment("sinks:1:0.25", 8), Segment("first", 1)
    found = count_places(decoder, ids, [(), (first,), (sinks, first)], stages)
    assert found == Places(4, (2 / 6, 1 / 6, 1 / 6, *[0.0] * 5), 6)
    assert found.note.startswith("a page of 128 tokens needs 4 places for exact rows: 33.3 % with 1, 16.7 % with 2, 16.7 % with 3")
    alone = count_places(decoder, ids, [(sinks,)], stages)
    assert alone.places == 3 and alone.overflow[:3] == (2 / 6, 1 / 6, 0.0)
    assert not model.model.layers[1].mlp.down_proj._forward_hooks


def test_a_rewrite_counts_where_rows_decide_for_themselves(tmp_path) -> None:
    ids = windows(3, 40, 70, 11)
    for protect, counted in (("sinks:0.25+first:1", True), ("kvsink:2", False)):
        model = plant(build("llama"), "1:dense")
        report = kvsink.rewrite(model, "rtn", protect=protect, calibration=ids, check=False)
        pages = runtime_of(model).extra.get("pages")
        assert (pages is not None) == counted == any("places for exact rows" in note for note in report.notes)
        assert not counted or pages["places"] == 2
        assert torch.isfinite(model(ids[:, :8]).logits).all()

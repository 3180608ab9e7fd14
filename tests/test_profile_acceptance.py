"""What a profile must say of SmolLM2, dense and written as a mixture of eight experts per layer."""

from __future__ import annotations

from typing import Any

import pytest

from kvsink.evaluate.texts import builtin_text
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.profiling import ProfileOptions, profile
from kvsink.profiling.record import windows_of
from kvsink.tools.to_mixtral import as_mixtral

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    return load_model(smollm2_dir, "cpu", "float32"), tokenizer, windows_of(builtin_text(), tokenizer, 8, 512)


def check_stages(record: dict[str, Any]) -> None:
    """Channel 507 twice: block 2 inside the text, block 11 at the start; the second is cancelled in block 28."""
    first, second = record["stages"]
    assert (first["block"], first["channels"][0]) == (2, 507) and first["carriers_total"] > 4 * first["carriers_first"]
    assert (second["block"], second["channels"][0]) == (11, 507) and second["carriers_first"] == record["windows"]
    assert second["end"] == 28 and second["ended_at_once"] and first["end"] in (9, 10)
    early, late = ({r["k"]: r for r in p["rows"]} for p in record["predictor"])
    assert early[5]["kvsink"]["recall"] > 0.8 > 0.5 > early[5]["first"]["recall"]
    assert late[1]["kvsink"]["precision"] == 1.0


def check_mixtral(record: dict[str, Any]) -> None:
    """11:6 and 11:7 make the second stage; 28:3 cancels it and is no Super Expert."""
    experts, causal = record["experts"], record["experts"]["causal"]
    assert experts["entries"] == 240 and experts["forming_layers"] == [11]
    assert experts["super_experts"] == ["11:6"] and experts["candidates"] == ["11:7"]
    assert experts["ranking"][1] == "28:3" and "28:3" in experts["outside"]
    assert sorted(experts["protected"]) == ["11:6", "11:7"]
    base, both, random = (causal[k] for k in ("base", "all", "random"))
    assert causal["layers"] == [12, 27] and both["skipped"] == ["11:6", "11:7"]
    assert both["perplexity"] > 2 * base["perplexity"] and both["d_sink_behind"] > 0.8
    assert abs(random["perplexity"] / base["perplexity"] - 1) < 0.05 and abs(random["d_sink_behind"]) < 0.1
    assert {x.partition(":")[0] for x in random["skipped"]} == {"11"} and len(random["skipped"]) == 2


def test_smollm2(smollm2) -> None:
    model, tokenizer, ids = smollm2
    check_stages(profile(model, ids, ProfileOptions(), tokenizer=tokenizer)[0])


def test_smollm2_as_a_mixture(smollm2) -> None:
    model, tokenizer, ids = smollm2
    record, _ = profile(as_mixtral(model, 8), ids, ProfileOptions(causal_windows=4), tokenizer=tokenizer)
    check_stages(record)
    check_mixtral(record)

"""What goes wrong in the middle: a forward pass that stops, memory that runs out while a cache grows, damage to saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.storage import BLOCK
from kvsink.errors import KvsinkError, SidecarError
from tests.close import largest_difference
from tests.graphs import rewritten
from tests.models import tokens

ERRORS = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("anything"))
METHODS = ("klt", "rtn", "kivi", "kvquant")


@pytest.fixture(scope="module", params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    return rewritten("llama", "sdpa", request.param, protect="first:2")


def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def stop(model: Any, cache: Any, ids: torch.Tensor, where: str, error: Exception) -> None:
    """A forward pass that ends in `error` before the named module runs."""

    def fail(*args: Any) -> None:
        raise error

    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        feed(model, cache, ids)
    hook.remove()


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm"])
@pytest.mark.parametrize("max_length", [None, 64])
def test_a_pass_that_stops_is_said_and_can_be_taken_back(model: Any, where: str, error: Exception, max_length: int | None) -> None:
    """Until crop or reset the cache refuses to go on; then it is what it was, or empty."""
    cache, other = (KVSinkCache.for_model(model, 1, max_length=max_length) for _ in range(2))
    head, tail = tokens(1, 9, seed=1), tokens(1, 5, seed=2)
    for c in (cache, other):
        feed(model, c, head)
    stop(model, cache, tail, where, error)
    for _ in range(2):
        with pytest.raises(KvsinkError, match=r"stopped half-way.* cache.crop\(9\) brings back"):
            feed(model, cache, tail)
    cache.crop(9)
    assert int(cache.get_seq_length()) == 9 and all(int(layer.length) == 9 for layer in cache.packed_layers())
    assert largest_difference(feed(model, cache, tail), feed(model, other, tail)) == 0
    stop(model, cache, tail, where, error)
    cache.reset()
    fresh = KVSinkCache.for_model(model, 1, max_length=max_length)
    assert largest_difference(feed(model, cache, head), feed(model, fresh, head)) == 0


def test_a_prefill_that_stops_asks_for_a_reset(model: Any) -> None:
    cache = KVSinkCache.for_model(model)
    stop(model, cache, tokens(1, 9), "model.layers.1.mlp", ERRORS[0])
    with pytest.raises(KvsinkError, match=r"stopped half-way.* call cache.reset\(\)"):
        feed(model, cache, tokens(1, 9))
    cache.reset()
    assert largest_difference(feed(model, cache, tokens(1, 9)), feed(model, KVSinkCache.for_model(model), tokens(1, 9))) == 0


def test_memory_that_runs_out_while_a_cache_grows_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = KVSinkCache.for_model(model), KVSinkCache.for_model(model)
    head, tail = tokens(1, BLOCK - 2, seed=1), tokens(1, 4, seed=2)
    for c in (cache, other):
        feed(model, c, head)
    full, calls = torch.full, []

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return full(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, cache, tail)
    assert len(calls) == 3
    assert largest_difference(feed(model, cache, tail), feed(model, other, tail)) == 0


# -- checksums ---------------------------------------------------------------------------------------------------------


def test_a_turned_bit_in_a_saved_cache_is_noticed(model: Any, tmp_path: Path) -> None:
    file, cache = tmp_path / "cache.safetensors", KVSinkCache.for_model(model)
    feed(model, cache, tokens(1, 9))
    cache.save(file)
    with safe_open(str(file), framework="pt") as opened:
        meta = opened.metadata()
    held = load_file(str(file))
    held["layers.1.k_codes"][0, 0, 3, 0] ^= 1
    save_file(held, str(file), metadata=meta)
    with pytest.raises(SidecarError, match=f"cache file {file} is damaged or was changed by hand"):
        KVSinkCache.load(file, model)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_cache_that_cannot_be_written_leaves_nothing(model: Any, tmp_path: Path) -> None:
    cache = KVSinkCache.for_model(model)
    feed(model, cache, tokens(1, 9))
    with pytest.raises((KvsinkError, OSError)):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_does_not_change_with_its_files(tiny_dir: Path, tmp_path: Path) -> None:
    """Its tables are its own: a file that is overwritten or cut short afterwards does not reach them."""
    from kvsink import RewriteOptions
    from kvsink.calibrate.calibration import calibrate
    from kvsink.calibrate.record import Calibration
    from kvsink.folder.loading import load_model
    from kvsink.model.runtime import runtime_of
    from kvsink.outdir import rewrite_dir

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8)
    rewrite_dir(tiny_dir, out, RewriteOptions("klt", calibration=str(text), calibration_tokens=512))
    tables = runtime_of(load_model(out)).tables
    calibrate(load_model(tiny_dir), tokens(4, 64), [()] * 2, {0: (64,)}).save(tmp_path / "record.safetensors")
    record = Calibration.load(tmp_path / "record.safetensors")
    held = [*tables.values(), record.keys[0, 64].second]
    before = [t.clone() for t in held]
    for file in (out / "kvsink_calibration.safetensors", tmp_path / "record.safetensors"):
        with open(file, "r+b") as handle:
            handle.seek(0)
            handle.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))

"""Layer by layer and shard by shard: the same folder as with the whole model, never more than one layer real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.memory import needs
from kvsink.calibrate.samples import SampleNeed
from kvsink.calibrate.skeleton import skeleton
from kvsink.calibrate.streaming import Job, Stream, stream_of
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError, KvsinkError, ModelError, UnsupportedError
from kvsink.folder.checkpoint import Checkpoint
from kvsink.folder.loading import load_model
from kvsink.model.digest import DIGEST
from kvsink.model.fingerprint import fingerprint
from kvsink.model.runtime import runtime_of
from kvsink.outdir import rewrite_dir
from kvsink.rewrite import RewriteOptions
from tests.models import build, tokens

CPU = torch.device("cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2")
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def in_shards(folder: Path) -> Path:
    """The same folder with its weights in three files and an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: held[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def stored(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    build(family, dtype=dtype).save_pretrained(folder)
    return folder


# -- the pass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    """Bit for bit: keys, values, samples with their weights, stages, fingerprint; with rows kept exact that blocks choose."""
    model, stream = build(family), stream_of(stored(tmp_path, family), CPU)
    ids = tokens(4, 48, seed=1)
    full = [i for i in range(2) if family != "gemma3" or i == 1]
    blocks, policies = dict.fromkeys(full, (64, 1)), [parse_policies("first:1+massive:2")] * 2
    need = {i: SampleNeed(rows=8, error=family not in ("gpt2", "gemma3")) for i in full}
    whole = calibrate(model, ids, policies, blocks, samples=need)
    layered = calibrate(stream.model, ids, policies, blocks, samples=need, stream=stream)
    assert torch.equal(whole.fingerprint, layered.fingerprint) and whole.tokens == layered.tokens == ids.numel()
    assert whole.stages == layered.stages and whole.largest == layered.largest and whole.medians == layered.medians
    assert set(whole.keys) == set(layered.keys) == {(i, n) for i in full for n in (64, 1)}
    for at, k in whole.keys.items():
        assert all(torch.equal(getattr(k, n), getattr(layered.keys[at], n)) for n in ("count", "first", "second"))
        assert 0 < int(k.count.sum()) < ids.numel()  # protected rows are left out
    for at, v in whole.values.items():
        assert all(torch.equal(getattr(v, n), getattr(layered.values[at], n)) for n in ("count", "total", "second"))
    for at, rows in whole.samples.items():
        mine, others = rows.tensors(), layered.samples[at].tensors()
        assert set(mine) == set(others) and all(torch.equal(t, others[n]) for n, t in mine.items())


def test_one_layer_is_real_at_a_time(tmp_path: Path) -> None:
    stream = stream_of(stored(tmp_path, "llama"), CPU)
    layer = sum(p.numel() for n, p in stream.model.named_parameters() if n.startswith("model.layers.0."))
    most: list[int] = []

    def look(*args: Any) -> None:
        most.append(sum(p.numel() for p in stream.model.parameters() if p.device.type != "meta"))

    for module in stream.model.modules():
        module.register_forward_pre_hook(look)
    stream.run([Job(row[None]) for row in tokens(3, 20)])
    assert max(most) == layer and all(p.device.type == "meta" for p in stream.model.parameters())


def test_the_fingerprint_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    stream = stream_of(stored(tmp_path, "qwen2", torch.bfloat16), CPU)
    assert torch.equal(stream.fingerprint(), fingerprint(build("qwen2", dtype=torch.bfloat16)))


def test_what_needs_the_whole_model_is_declined(tmp_path: Path, text: Path, tiny_dir: Path) -> None:
    stream = stream_of(stored(tmp_path / "model", "llama"), CPU)
    need = {0: SampleNeed(rows=8, fisher=True)}
    with pytest.raises(CalibrationError, match="gradient of the loss need the whole model"):
        calibrate(stream.model, tokens(4, 48), [()] * 2, {0: (64,)}, samples=need, stream=stream)
    options = RewriteOptions("klt", calibration=str(text), calibration_tokens=512, plan="auto")
    with pytest.raises(UnsupportedError, match="--plan auto runs the whole model again and again; use --whole"):
        rewrite_dir(tiny_dir, tmp_path / "out", options, by_layer=True)
    with pytest.raises(UnsupportedError, match="--onnx needs the whole model"):
        rewrite_dir(tiny_dir, tmp_path / "out", RewriteOptions("rtn"), by_layer=True, onnx="functions")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_other_names_is_declined(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.self_attn.key.weight"] = held.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"stores model.layers.1.self_attn.k_proj.weight under another name"):
        stream_of(folder, CPU)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_weights_are_found_by_layers_too(tiny_dir: Path, tmp_path: Path, text: Path, name: str) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    held = load_file(folder / "model.safetensors")
    held[name][3, 3] = float("nan")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"weight {name} holds NaN"):
        rewrite_dir(folder, tmp_path / "out", RewriteOptions("klt", calibration=str(text), calibration_tokens=512), by_layer=True)


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rotatekv", "klt", "klt"])
def test_both_ways_write_the_same_folder(
    tiny_dir: Path, tmp_path: Path, text: Path, method: str, dtype: torch.dtype, sharded: bool
) -> None:
    import shutil

    source = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    build("llama", dtype=dtype).save_pretrained(source)
    source = in_shards(source) if sharded else source
    options = RewriteOptions(method, calibration=str(text), calibration_tokens=512)
    for by_layer in (False, True):
        report = rewrite_dir(source, tmp_path / str(by_layer), options, by_layer=by_layer, device="cpu")
        assert ("read layer by layer" in report.notes) == by_layer
    one, two = tmp_path / "False", tmp_path / "True"
    weights = [p.name for p in sorted(source.glob("*.safetensors*"))]
    assert len(weights) == (4 if sharded else 1)
    for name in [*weights, "kvsink_calibration.safetensors", "config.json"]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    plans = [json.loads((folder / "kvsink.json").read_text()) for folder in (one, two)]
    checks = [plan.pop("check") for plan in plans]
    assert checks[0].pop("step") is not None and checks[0].pop("folded") is not None
    assert checks[1].pop("step") is None and checks[1].pop("folded") is None  # these need the whole model
    # By layers, weights are not yet folded when the cache is compared, so values of another basis are coded.
    assert all(found is not None for check in checks for name, found in check.items()), checks
    assert all(check["keys"] > 1e-4 and check["exact"] < 1e-3 for check in checks)
    assert all(plan.pop(DIGEST) for plan in plans)
    assert plans[0] == plans[1]
    model = load_model(two, "cpu")
    assert runtime_of(model).method == method
    folded = {
        n
        for n, t in Checkpoint.find(two).tensors(Checkpoint.find(two).entries).items()
        if not torch.equal(t, Checkpoint.find(source).tensors([n])[n])
    }
    turned = {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "vo"}
    assert folded == turned


def test_a_mixture_with_a_tensor_per_expert_is_rewritten_by_layers(tiny_dir: Path, tmp_path: Path, text: Path) -> None:
    """As with the whole model, and its experts stay the tensors that they are in the files."""
    import shutil

    source = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    build("qwen3-moe").save_pretrained(source)
    options = RewriteOptions("klt", calibration=str(text), calibration_tokens=512)
    for by_layer in (False, True):
        rewrite_dir(source, tmp_path / str(by_layer), options, by_layer=by_layer, device="cpu")
    one, two = (load_file(tmp_path / how / "model.safetensors") for how in ("False", "True"))
    assert one.keys() == two.keys() == load_file(source / "model.safetensors").keys()
    assert any(".experts.3." in n for n in two) and all(torch.allclose(t, two[n], atol=1e-5) for n, t in one.items())
    assert runtime_of(load_model(tmp_path / "True", "cpu")).method == "klt"


def test_values_under_another_name_are_not_written_by_layers(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsink.folder.conversion import Weights

    monkeypatch.setattr(Weights, "plain", lambda self, name: "v_proj" not in name)
    with pytest.raises(UnsupportedError, match=r"stores model.layers.0.self_attn.v_proj.weight under another name"):
        rewrite_dir(tiny_dir, tmp_path / "out", RewriteOptions("rtn"), by_layer=True)


def test_untouched_weights_are_copied_byte_for_byte(tiny_dir: Path, tmp_path: Path, text: Path) -> None:
    rewrite_dir(tiny_dir, tmp_path / "out", RewriteOptions("rtn", calibration=str(text), calibration_tokens=512), by_layer=True)
    copy, source = tmp_path / "out" / "model.safetensors", tiny_dir / "model.safetensors"
    assert copy.read_bytes() == source.read_bytes() and copy.stat().st_ino != source.stat().st_ino


def test_a_dry_run_says_what_is_needed(tiny_dir: Path, tmp_path: Path, text: Path) -> None:
    options = RewriteOptions("klt", calibration=str(text), calibration_tokens=512)
    report = rewrite_dir(tiny_dir, tmp_path / "out", options, dry_run=True)
    (note,) = (n for n in report.notes if n.startswith("needs"))
    assert "GiB of memory with the whole model" in note and "layer by layer" in note and "of disk" in note and "are free" in note
    assert not (tmp_path / "out").exists()


def test_a_model_that_would_fill_the_memory_is_read_by_layers(
    tiny_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsink import outdir

    bare, checkpoint = skeleton(tiny_dir), Checkpoint.find(tiny_dir)
    assert checkpoint is not None
    wanted = needs(bare, checkpoint, 512, 512)
    monkeypatch.setattr(outdir, "available_memory", lambda device: wanted.whole)
    options = RewriteOptions("klt", calibration=str(text), calibration_tokens=512)
    report = rewrite_dir(tiny_dir, tmp_path / "out", options, dry_run=True)
    assert "read layer by layer" in report.notes
    assert "read layer by layer" not in rewrite_dir(tiny_dir, tmp_path / "out", options, dry_run=True, by_layer=False).notes


def test_a_disk_that_is_too_small_is_said_before_anything_is_done(
    tiny_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsink import outdir

    usage = outdir.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(outdir.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(KvsinkError, match=r"takes 0.0 GiB, 0.0 GiB are free; free some"):
        rewrite_dir(tiny_dir, tmp_path / "out", RewriteOptions("rtn"))


def test_needs_grow_with_the_model() -> None:
    """A known size: 2 layers, hidden 64; float32 weights on the CPU."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        stored(Path(folder), "llama")
        stream = stream_of(folder, CPU)
        found = needs(stream.model, stream.checkpoint, 4096, 1024)
        weights = 4 * sum(p.numel() for p in stream.model.parameters())
        assert found.disk >= stream.checkpoint.nbytes >= weights
        assert (
            found.whole - found.by_layer < weights + 4 * 1024 * 97
            and needs(stream.model, stream.checkpoint, 8192, 1024).by_layer == found.by_layer + 4096 * 64 * 4
        )


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_a_replaced_tensor_goes_where_the_old_one_was(tmp_path: Path) -> None:
    folder, copy = stored(tmp_path / "a", "llama", torch.bfloat16), tmp_path / "b"
    copy.mkdir()
    checkpoint = Checkpoint.find(folder)
    assert checkpoint is not None
    name = "model.layers.1.mlp.down_proj.weight"
    new = torch.randn(checkpoint.entries[name].shape, generator=torch.Generator().manual_seed(0))
    checkpoint.copy(copy, {name: new})
    one, two = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    assert torch.equal(two.pop(name), new.bfloat16()) and one.pop(name) is not None
    assert one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())
    with pytest.raises(ModelError, match="has shape"):
        checkpoint.put(copy, name, new[:3])


@pytest.mark.parametrize("damage", ["truncated", "no-shard", "index", "outside", "escape"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    folder = in_shards(stored(tmp_path, "llama"))
    shard, index = folder / "model-00002-of-00003.safetensors", folder / "model.safetensors.index.json"
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "no-shard":
            shard.unlink()
        case "index":
            index.write_text('{"weight_map": 3}')
        case "outside":
            good = shard.read_bytes()
            n = int.from_bytes(good[:8], "little")
            header = json.loads(good[8 : 8 + n])
            next(iter(v for k, v in header.items() if k != "__metadata__"))["data_offsets"] = [0, 10**9]
            text = json.dumps(header).encode()
            shard.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + n :])
        case "escape":
            index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match=r"cannot be read|no file of this folder"):
        Checkpoint.find(folder)


def test_other_weight_files_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert Checkpoint.find(tmp_path) is None
    with pytest.raises(UnsupportedError, match="no safetensors files"):
        stream_of(tmp_path, CPU)
    assert Stream.__doc__

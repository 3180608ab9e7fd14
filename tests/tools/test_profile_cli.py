"""kvsink-profile and the converter to Mixtral on tiny folders: what they write, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from kvsink.calibrate import memory, streaming
from kvsink.calibrate.skeleton import skeleton
from kvsink.folder.checkpoint import Checkpoint
from kvsink.folder.loading import load_model
from kvsink.profiling import load_profile
from kvsink.profiling.passes import profile_needs
from kvsink.tools import profile as tool
from kvsink.tools import rewrite as rewrite_tool
from kvsink.tools import to_mixtral
from tests.planted import build, plant

SMALL = ["--windows", "2", "--window-tokens", "96", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The river rises in the hills and runs to the sea. " * 40)
    return str(path)


@pytest.fixture(scope="module")
def moe_dir(tiny_dir, tmp_path_factory):
    """A planted mixture beside the tiny model's tokenizer; the token that triggers it is in every text."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    model = plant(build("mixtral"), "1:3")
    embedding = model.get_input_embeddings().weight.data
    model.save_pretrained(folder)
    for file in tiny_dir.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder / file.name)
    from transformers import AutoTokenizer

    trigger = AutoTokenizer.from_pretrained(folder)("T", add_special_tokens=False)["input_ids"][0]
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if "embed_tokens" in n)
    swapped = embedding.clone()
    swapped[[5, trigger]] = embedding[[trigger, 5]]
    state[name] = swapped
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_dense_model(tiny_dir, text, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert tool.main([str(tiny_dir), str(out), "--text", text, *SMALL]) == 0
    record = json.loads((out / "profile.json").read_text())
    assert record["status"] == "complete" and record["experts"] is None and record["windows"] == 2
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "profile.json"]
    assert "No massive activations" in capsys.readouterr().out
    assert "No massive activations" in (out / "index.html").read_text()


def test_a_mixture_is_profiled_and_pruned(moe_dir, text, tmp_path, capsys) -> None:
    out, pruned = tmp_path / "out", tmp_path / "pruned"
    args = [str(moe_dir), str(out), "--text", text, *SMALL, "--no-page", "--prune", "found", "--prune-to", str(pruned)]
    assert tool.main(args) == 0, capsys.readouterr().err
    record = json.loads((out / "profile.json").read_text())
    assert record["experts"]["super_experts"] == ["1:3"] and record["entries"]["1:3"]["text"] == "T"
    ignore = json.loads((out / "ignore.json").read_text())
    assert ignore["llm-compressor"]["ignore"] == ["lm_head", "model.layers.1.mlp.experts.3.down_proj"]
    assert ignore["torchao"]["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.experts"]
    weights = load_model(pruned, "cpu", "float32").model.layers[1].mlp.experts.down_proj
    assert not weights[3].any() and weights[2].any()
    assert (pruned / "tokenizer.json").is_file()


def _fails(capsys, args: list[str], *says: str) -> None:
    capsys.readouterr()
    assert tool.main(args) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvsink-profile:")]
    assert len(error) == 1, error
    for word in says:
        assert word in error[0], error[0]


def test_bad_input_is_one_line(tiny_dir, text, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    base = [str(tiny_dir), str(out), *SMALL, "--text"]
    _fails(capsys, [*base, text, "--experts"], "dense", "no experts")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    _fails(capsys, [*base, str(short)], "9 tokens", "longer text")
    _fails(capsys, [*base, text, "--prune", "1:3"], "--prune-to")
    _fails(capsys, [*base, text, "--prune", "1:77", "--prune-to", str(tmp_path / "p")], "1:77")
    assert not out.exists()  # all of it was seen before anything was measured
    out.mkdir()
    (out / "mine").write_text("")
    _fails(capsys, [*base, text], "exists", "--force")
    assert not (out / "profile.json").exists()


def test_nan_keeps_what_was_measured(tiny_dir, text, tmp_path, capsys) -> None:
    folder, out = tmp_path / "nan", tmp_path / "out"
    shutil.copytree(tiny_dir, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _fails(capsys, [str(folder), str(out), *SMALL, "--text", text], "block 1", "NaN", str(out / "profile.partial.json"))
    partial = json.loads((out / "profile.partial.json").read_text())
    assert partial["status"] == "partial" and "NaN" in partial["stopped"] and len(partial["hidden"]["largest"]) == 1
    assert (
        rewrite_tool.main(
            [
                str(tiny_dir),
                str(tmp_path / "x"),
                "--profile",
                str(out / "profile.partial.json"),
                "--method",
                "rtn",
                "--protect",
                "kvsink:5",
                "--eval-windows",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "partial" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard(moe_dir, text, tmp_path, capsys, damage) -> None:
    folder = tmp_path / "sharded"
    build("mixtral").save_pretrained(folder, max_shard_size="300KB")
    for file in moe_dir.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder / file.name)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    _fails(capsys, [str(folder), str(tmp_path / "out"), *SMALL, "--text", text], str(folder))


def test_the_converter_writes_a_folder_with_the_same_logits(tiny_dir, tmp_path, capsys) -> None:
    out = tmp_path / "mixtral"
    assert to_mixtral.main([str(tiny_dir), str(out), "--experts", "4"]) == 0, capsys.readouterr().err
    ids = torch.arange(4, 44)[None]
    dense, moe = load_model(tiny_dir, "cpu", "float32"), load_model(out, "cpu", "float32")
    assert moe.config.model_type == "mixtral" and moe.config.num_local_experts == 4
    assert torch.allclose(dense(ids).logits, moe(ids).logits, atol=2e-5)
    assert (out / "tokenizer.json").is_file()
    assert to_mixtral.main([str(tiny_dir), str(out)]) == 2 and "exists" in capsys.readouterr().err
    assert to_mixtral.main([str(tiny_dir), str(tmp_path / "y"), "--experts", "7"]) == 2
    assert "7 equal runs" in capsys.readouterr().err


def test_a_model_that_is_no_llama_is_not_converted(moe_dir, tmp_path, capsys) -> None:
    assert to_mixtral.main([str(moe_dir), str(tmp_path / "z")]) == 2
    assert "not a Llama" in capsys.readouterr().err


# -- layer by layer ----------------------------------------------------------------------------------------------------


def _copy(source: Path, folder: Path, **changed: object) -> Path:
    """A copy of a model folder in which functions have changed some tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name, change in changed.items():
        state[name] = change(state[name])  # type: ignore[operator]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _sharded(moe_dir: Path, folder: Path) -> list[Path]:
    """A quiet mixture in several shards, with the tokenizer beside it: its shards."""
    build("mixtral").save_pretrained(folder, max_shard_size="300KB")
    for file in moe_dir.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder / file.name)
    return sorted(folder.glob("model-*.safetensors"))


def test_both_ways_write_the_same_record(moe_dir, text, tmp_path, capsys) -> None:
    for how in ("--whole", "--stream"):
        assert tool.main([str(moe_dir), str(tmp_path / how), "--text", text, *SMALL, "--no-page", how]) == 0
        said = capsys.readouterr()
        assert "GiB of memory with the whole model" in said.err and "are free: read" in said.err
        assert "Super Experts by the published criterion: 1:3" in said.out
    one, two = (json.loads((tmp_path / how / "profile.json").read_text()) for how in ("--whole", "--stream"))
    assert (one["read"], two["read"]) == ("whole", "layer by layer")
    assert one["fingerprint"] == two["fingerprint"] and one["hidden"]["channels"] == two["hidden"]["channels"]
    for key in ("super_experts", "ranking", "protected", "ignore", "forming_layers"):
        assert one["experts"][key] == two["experts"][key]
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-5)
    load_profile(tmp_path / "--stream" / "profile.json")


def test_a_model_that_would_fill_the_memory_is_read_by_layers(tiny_dir, text, tmp_path, capsys, monkeypatch) -> None:
    wanted = profile_needs(skeleton(tiny_dir), Checkpoint.find(tiny_dir), 2, 96).whole
    args = [str(tiny_dir), "--text", text, *SMALL, "--no-page", "--no-attention"]
    for share, how in ((0.79, "whole"), (0.81, "layer by layer")):
        monkeypatch.setattr(memory, "available_memory", lambda device, share=share: int(wanted / share))
        assert tool.main([*args[:1], str(tmp_path / how), *args[1:]]) == 0
        assert f"read {how}" in capsys.readouterr().err
        assert json.loads((tmp_path / how / "profile.json").read_text())["read"] == how
    monkeypatch.setattr(memory, "available_memory", lambda device: wanted)
    pruned = ["--prune", "1:dense", "--prune-to", str(tmp_path / "pruned")]  # needs the whole model
    assert tool.main([*args[:1], str(tmp_path / "out"), *args[1:], *pruned]) == 0
    assert "read whole" in capsys.readouterr().err


def test_options_that_do_not_go_with_layers(tiny_dir, text, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    base = [str(tiny_dir), str(out), *SMALL, "--text", text, "--stream"]
    _fails(capsys, [*base, "--prune", "1:dense", "--prune-to", str(tmp_path / "p")], "--prune", "--whole")
    _fails(capsys, [*base, "--dtype", "bfloat16"], "float32", "--whole")
    _fails(capsys, [*base, "--experts"], "dense", "no experts")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    _fails(capsys, [*base[:-2], str(short), "--stream"], "9 tokens", "longer text")
    bins = shutil.copytree(tiny_dir, tmp_path / "bins")
    torch.save(load_file(bins / "model.safetensors"), bins / "pytorch_model.bin")
    (bins / "model.safetensors").unlink()
    _fails(capsys, [str(bins), *base[1:]], "no safetensors files", "--whole")
    assert not out.exists()


def test_a_rewritten_folder_is_not_profiled(tiny_dir, text, tmp_path, capsys) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert (
        rewrite_tool.main(
            [str(tiny_dir), str(packed), "--method", "rtn", "--protect", "none", "--eval-windows", "0", "--device", "cpu"]
        )
        == 0
    )
    for how in ("--whole", "--stream"):
        _fails(capsys, [str(packed), str(out), *SMALL, "--text", text, how], "rewritten by kvsink already", "made from")
    assert not out.exists()


@pytest.mark.parametrize("how", ["--whole", "--stream"])
def test_an_unknown_layout_names_what_it_saw(moe_dir, text, tmp_path, capsys, how) -> None:
    folder = tmp_path / "jet"
    config = hf.JetMoeConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    hf.JetMoeForCausalLM(config).save_pretrained(folder)
    for file in moe_dir.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder / file.name)
    _fails(capsys, [str(folder), str(tmp_path / "out"), *SMALL, "--text", text, how], "declares 4 experts", "mlp (JetMoeMoE)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_is_damaged_from_the_start(moe_dir, text, tmp_path, capsys, damage) -> None:
    """It is seen in the headers, before anything is read: there is no partial result."""
    shard = _sharded(moe_dir, tmp_path / "sharded")[2]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    out = tmp_path / "out"
    _fails(capsys, [str(shard.parent), str(out), *SMALL, "--text", text, "--stream"], str(shard), "fetch the model again")
    assert not out.exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_turns_out_damaged_keeps_what_was_measured(moe_dir, text, tmp_path, capsys, monkeypatch, damage) -> None:
    """Something happens to the file of layer 2 while layer 1 runs, in the second look at the windows."""
    folder, out = tmp_path / "sharded", tmp_path / "out"
    _sharded(moe_dir, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {index[n] for n in index if "layers.2." in n} - {index[n] for n in index if "layers.1." in n}
    shard = folder / sorted(shards)[-1]
    plain, runs = streaming.Stream.run, []

    def run(self, jobs, tell, *args) -> None:
        def watched(done: int, total: int) -> None:
            tell(done, total)
            if len(runs) == 2 and done == 2:  # blocks 0 and 1 are through
                shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-1000])

        runs.append(1)
        plain(self, jobs, watched, *args)

    monkeypatch.setattr(streaming.Stream, "run", run)
    _fails(capsys, [str(folder), str(out), *SMALL, "--text", text, "--stream"], str(shard), str(out / "profile.partial.json"))
    assert [p.name for p in out.iterdir()] == ["profile.partial.json"]
    partial = json.loads((out / "profile.partial.json").read_text())
    assert partial["status"] == "partial" and shard.name in partial["stopped"] and len(partial["hidden"]["largest"]) == 4
    assert {label.partition(":")[0] for label in partial["entries"]} == {"0", "1"}


@pytest.mark.parametrize("place", ["weights", "activations"])
def test_nan_by_layers_keeps_what_was_measured(tiny_dir, text, tmp_path, capsys, place) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change = (lambda w: w.index_fill(0, torch.tensor([3]), float("nan"))) if place == "weights" else (lambda w: w.fill_(3e38))
    folder, out = _copy(tiny_dir, tmp_path / "nan", **{name: change}), tmp_path / "out"
    says = (name, "NaN") if place == "weights" else ("block 1", "infinite activations")
    _fails(capsys, [str(folder), str(out), *SMALL, "--text", text, "--stream"], *says, str(out / "profile.partial.json"))
    partial = json.loads((out / "profile.partial.json").read_text())
    assert partial["status"] == "partial" and len(partial["hidden"]["largest"]) == 1
    first = _copy(tiny_dir, tmp_path / "first", **{"model.layers.0.mlp.up_proj.weight": lambda w: w * float("inf")})
    _fails(capsys, [str(first), str(tmp_path / "none"), *SMALL, "--text", text, "--stream"], "model.layers.0.mlp.up_proj.weight")
    assert not (tmp_path / "none").exists()  # nothing had been measured

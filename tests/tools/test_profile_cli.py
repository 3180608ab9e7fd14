"""kvsink-profile and the converter to Mixtral on tiny folders: what they write, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsink.loading import load_model
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
    assert rewrite_tool.main([str(tiny_dir), str(tmp_path / "x"), "--profile", str(out / "profile.partial.json"), "--method", "rtn",
                              "--protect", "kvsink:5", "--eval-windows", "0", "--device", "cpu"]) == 2  # fmt: skip
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

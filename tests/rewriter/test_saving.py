"""A rewritten model is saved, copied, pickled and trained as any other, and what comes back has its packed cache."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from torch import Tensor

import kvsink
from kvsink.errors import KvsinkError
from kvsink.model.runtime import detach, runtime_of
from tests.graphs import rewritten
from tests.models import build, tokens

ROW = tokens(1, 9)
SIDECAR = {"kvsink.json", "kvsink_calibration.safetensors"}


def generate(model: Any, **more: Any) -> Any:
    return model.generate(ROW, max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True, **more)


def cache_of(out: Any) -> Any:
    return out["cache"] if "cache" in out else out["past_key_values"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROW).logits


def same_plan(one: Any, two: Any) -> bool:
    a, b = runtime_of(one), runtime_of(two)
    return (a.plans, a.stages, a.method) == (b.plans, b.stages, b.method) and all(
        torch.equal(t, b.tables[n]) for n, t in a.tables.items()
    )


@pytest.fixture
def model() -> Any:
    return rewritten("llama", "sdpa", "klt", key_bits=4, value_bits=4)


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder)


# -- save_pretrained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["klt", "antkv", "rtn"])
def test_a_saved_model_loads_with_its_plan_time_and_again(tmp_path: Path, method: str) -> None:
    first = rewritten("llama", "sdpa", method)
    second = saved(first, tmp_path / "one")
    third = saved(second, tmp_path / "two")
    assert same_plan(first, second) and same_plan(first, third)
    wanted = generate(first)
    for folder, again in (("one", second), ("two", third)):
        got = generate(again)
        assert isinstance(cache_of(got), kvsink.KVSinkCache) and torch.equal(got.sequences, wanted.sequences)
        assert (logits(again) - logits(build("llama"))).abs().max() <= 1e-5 * logits(build("llama")).abs().max()
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["method"] == method and "kvsink_observed" not in json.dumps(config)
        assert "keys" in json.loads((tmp_path / folder / "kvsink.json").read_text())["check"]
    for each in (first, second):  # what is on the model for the time of saving is gone
        assert not hasattr(each.config, "quantization_config") and "_upload_modified_files" not in vars(each)


def test_what_the_folder_says_beside_the_plan_is_kept(model: Any, tmp_path: Path) -> None:
    runtime_of(model).extra = {"options": {"method": "klt"}, "source": "mine"}
    again = saved(model, tmp_path)
    plan = json.loads((tmp_path / "kvsink.json").read_text())
    assert plan["source"] == "mine" and plan["options"] == {"method": "klt"} and plan["versions"]["torch"] == torch.__version__
    assert runtime_of(again).extra["source"] == "mine"


def test_weights_given_to_save_pretrained_are_the_ones_that_count(model: Any, tmp_path: Path) -> None:
    """As a Trainer does, which gathers them first."""
    given = {n: t.clone() + 0.125 for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight + 0.125) and same_plan(model, again)


def test_only_the_main_process_writes_the_plan(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not SIDECAR & {p.name for p in tmp_path.iterdir()}


def test_a_part_of_a_rewritten_model_is_saved_as_a_plain_one(model: Any, tmp_path: Path) -> None:
    again = saved(model, tmp_path / "whole")
    again.model.save_pretrained(tmp_path / "part")
    part = hf.AutoModel.from_pretrained(tmp_path / "part")
    assert not hasattr(part, "_kvsink_runtime")
    with torch.no_grad():
        assert torch.equal(part(input_ids=ROW)[0], model.model(input_ids=ROW)[0])


def test_a_folder_names_one_quantizer_only(model: Any, tmp_path: Path) -> None:
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.warns(UserWarning, match=r"saved without its packed cache: it names torchao as its quantizer, .*kvsink.rewrite"):
        model.save_pretrained(tmp_path)
    assert not SIDECAR & {p.name for p in tmp_path.iterdir()}
    assert model.config.quantization_config == {"quant_method": "torchao"}


class Hub:
    """Stands in for the hub: keeps what is uploaded."""

    def __init__(self) -> None:
        self.uploaded: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **more: Any) -> Any:
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, repo_id: str, operations: Any, **more: Any) -> None:
        for operation in operations:
            source = operation.path_or_fileobj
            self.uploaded[operation.path_in_repo] = Path(source).read_bytes() if isinstance(source, str | Path) else source


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_plan_is_uploaded_with_the_weights(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    import transformers.modeling_utils
    import transformers.utils.hub

    hub, card = Hub(), huggingface_hub.ModelCard("---\n---\n")
    for module in (transformers.modeling_utils, transformers.utils.hub):
        for name in ("create_repo", "create_commit"):
            monkeypatch.setattr(module, name, getattr(hub, name), raising=False)
        monkeypatch.setattr(module, "hf_api", lambda *a, **k: hub, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *a, **k: card, raising=False)
    if way == "push_to_hub":
        model.push_to_hub("mine")
    else:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert SIDECAR | {"config.json", "model.safetensors"} <= set(hub.uploaded)
    for name, data in hub.uploaded.items():
        (tmp_path / name).write_bytes(data)
    assert same_plan(model, hf.AutoModelForCausalLM.from_pretrained(tmp_path))


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["klt", "antkv"])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_hooks_of_its_own(make: Any, method: str) -> None:
    model = rewritten("llama", "sdpa", method)
    wanted = generate(model)
    other = make(model)
    detach(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    got = generate(other)
    assert torch.equal(got.sequences, wanted.sequences)
    assert cache_of(got).shared.runtime is runtime_of(other) and other._prepare_cache_for_generation.model is other
    with pytest.raises(KvsinkError, match="continuous batching"):
        other.init_continuous_batching()
    with pytest.raises(KvsinkError, match="made for another model"):
        generate(other, past_key_values=kvsink.KVSinkCache.for_model(rewritten("llama", "sdpa", "rtn")))


def test_a_longrope_model_keeps_its_hook_through_a_pickle() -> None:
    """transformers throws the cache away where the angles change, at 16 tokens here; the packed one takes the rows anew."""
    model = build("phi3")
    model.config.original_max_position_embeddings = 16
    kvsink.rewrite(model, "rtn", calibration=tokens(8, 64, seed=1))
    outs = [
        each.generate(tokens(1, 12), max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        for each in (model, pickle.loads(pickle.dumps(model)))
    ]
    assert all(isinstance(cache_of(out), kvsink.KVSinkCache) for out in outs)
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_a_copy_leaves_the_cache_behind_that_was_looking_on() -> None:
    """Methods with anchors let a cache layer watch the queries of its attention module."""
    model = rewritten("llama", "sdpa", "antkv")
    generate(model)
    mine, theirs = (m.model.layers[0].self_attn._kvsink_observer for m in (model, copy.deepcopy(model)))
    assert mine.see is not None and theirs.see is None


def test_a_model_unpickled_in_another_process_packs(model: Any, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.ops.kvsink.append_\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert getattr(ALL_ATTENTION_FUNCTIONS['sdpa'], '_kvsink', False)\n"
        "out = model.generate(torch.tensor(eval(sys.argv[2])), max_new_tokens=8, do_sample=False, eos_token_id=None,"
        " return_dict_in_generate=True)\n"
        "cache = out['cache'] if 'cache' in out else out['past_key_values']\n"
        "print(type(cache).__name__, out.sequences.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt"), str(ROW.tolist())],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"KVSinkCache {generate(model).sequences.tolist()}"


# -- a Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["in memory", "loaded"])
def test_a_trainer_evaluates_trains_and_leaves_checkpoints(model: Any, tmp_path: Path, way: str) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    model = model if way == "in memory" else saved(model, tmp_path / "saved")
    model.requires_grad_(True)
    rows: Any = [{"input_ids": r, "labels": r} for r in tokens(6, 20, seed=4)]
    options = hf.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=6,
    )
    trainer = hf.Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        ids = tokens(6, 20, seed=4)
        wanted = build("llama")(input_ids=ids, labels=ids).loss
    assert abs(trainer.evaluate()["eval_loss"] - float(wanted)) <= 1e-5 * float(wanted)
    trainer.train()
    assert {p.name for p in (tmp_path / "run" / "checkpoint-1").iterdir()} >= SIDECAR
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert same_plan(model, again) and torch.equal(logits(again), logits(model.eval()))


def test_a_loaded_model_is_no_quantized_one(model: Any, tmp_path: Path) -> None:
    again = saved(model, tmp_path)
    assert not again.is_quantized and not hasattr(again, "hf_quantizer") and again.half().dtype == torch.float16
    assert not hasattr(again.config, "quantization_config") and "_is_quantized" not in vars(again.config)

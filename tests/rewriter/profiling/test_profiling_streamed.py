"""A checkpoint profiled layer by layer gives the record of the whole model, and never more than one layer is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsink.calibrate.skeleton import skeleton
from kvsink.calibrate.streaming import Job, stream_of
from kvsink.errors import ModelError, UnsupportedError
from kvsink.folder.checkpoint import Checkpoint
from kvsink.folder.conversion import Weights
from kvsink.folder.loading import load_model
from kvsink.profiling import ProfileOptions, profile
from kvsink.profiling.passes import BY_LAYER, WHOLE, passes_of, profile_needs
from kvsink.tools.tiny_models import build_family
from tests import planted
from tests.planted import add_sinks, build, plant, windows

CPU = torch.device("cpu")
DENSE = (
    "llama",
    "llama-dynamic",
    "mistral-sliding",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt",
    "cohere",
    "granite",
)


def close(a: Any, b: Any, at: str = "") -> None:
    """Equal; numbers up to float32 rounding, since a weight that lies elsewhere in memory may be multiplied in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            close(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{at}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-5), at
    else:
        assert a == b, at


def both(folder: Path, ids: torch.Tensor, options: ProfileOptions | None = None) -> dict[str, Any]:
    """Profile a folder both ways, compare, and give the record of the layers."""
    record, arrays = profile(load_model(folder, "cpu", "float32"), ids, options)
    layered, others = profile(stream_of(folder, CPU), ids, options)
    assert (record.pop("read"), layered["read"]) == (WHOLE, BY_LAYER)
    apart = ("read", "seconds", "findings")  # the findings are the rest in sentences
    close({k: v for k, v in record.items() if k not in apart}, {k: v for k, v in layered.items() if k not in apart})
    assert arrays.keys() == others.keys() and len(record["findings"]) == len(layered["findings"])
    for name, x in arrays.items():
        assert torch.allclose(x.float(), others[name].float(), rtol=2e-4, atol=1e-4), name
    return layered


@pytest.mark.parametrize("family", DENSE)
def test_the_record_is_that_of_the_whole_model(tmp_path: Path, family: str) -> None:
    build_family(family).save_pretrained(tmp_path)
    record = both(tmp_path, windows(0, 12, 40))
    assert record["status"] == "complete" and record["attention"]["layers"]
    assert bool(record["kv"]) == (family != "mistral-sliding")  # whose cache lets rows go


def test_stages_of_a_dense_model_come_with_their_neuron(tmp_path: Path) -> None:
    add_sinks(plant(build("llama"), "1:dense"), range(2, 4)).save_pretrained(tmp_path)
    (stage,) = both(tmp_path, windows(0, 12))["stages"]
    assert stage["block"] == 1 and stage["neurons"][0]["weight_view"][0] == {"neuron": 0, "weight": 60.0}


@pytest.mark.sample(3)
@pytest.mark.parametrize("apart", [True, False], ids=["one-tensor-per-expert", "stacked"])
@pytest.mark.parametrize("family", planted.MIXTURES)
def test_mixtures_whatever_the_files_hold(tmp_path: Path, family: str, apart: bool) -> None:
    """With the causal check, which is run by layers as well."""
    model = plant(build(family), "1:3")
    if family == "mixtral":
        add_sinks(model, range(2, 4))
    if family == "deepseek-v3":  # a buffer that is stored: which experts are chosen depends on it
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path, save_original_format=apart)
    stored = Checkpoint.find(tmp_path)
    assert stored is not None
    assert any(".experts.3." in n for n in stored.entries) == (apart and family != "gpt-oss")
    ids = windows(0, 0) if family == "mixtral" else windows(0, 12)  # D_sink is of the first token
    experts = both(tmp_path, ids, ProfileOptions(causal_windows=2))["experts"]
    assert experts["super_experts"] == ["1:3"] and experts["causal"]["all"]["skipped"] == ["1:3"]
    if family == "mixtral":
        assert experts["causal"]["driven"] and experts["causal"]["all"]["d_sink_behind"] > 0.8


def test_no_more_than_one_layer_or_the_head_is_real(tmp_path: Path) -> None:
    model = plant(build("mixtral"), "1:3")
    model.save_pretrained(tmp_path)
    stream = stream_of(tmp_path, CPU)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = sum(p.numel() for p in (model.lm_head.weight, model.model.norm.weight))
    most: list[int] = []
    for module in stream.model.modules():
        module.register_forward_pre_hook(
            lambda *a: most.append(sum(p.numel() for p in stream.model.parameters() if p.device.type != "meta"))
        )
    profile(stream, windows(0, 12), ProfileOptions(causal_windows=1))
    assert max(most) == max(layer, head) and all(p.device.type == "meta" for p in stream.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere", "granite", "gemma2", "gpt2", "mixtral"])
def test_logits_are_those_of_the_whole_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Tied heads, scaled embeddings and capped logits included, also where the file is in 16 bit."""
    build_family(family, dtype).save_pretrained(tmp_path)
    whole, stream, ids = load_model(tmp_path, "cpu", "float32"), stream_of(tmp_path, CPU), windows(0, 5)
    got: dict[int, torch.Tensor] = {}
    stream.run([Job(row[None]) for row in ids], logits=got.__setitem__)
    for w, row in enumerate(ids):
        assert torch.allclose(got[w], whole(row[None]).logits, rtol=1e-5, atol=1e-5)


def test_converted_parameters_are_those_that_transformers_loads(tmp_path: Path) -> None:
    model = build("qwen2-moe")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.find(tmp_path)
    assert checkpoint is not None
    weights = Weights(skeleton(tmp_path), checkpoint)
    for name, p in model.named_parameters():
        assert torch.equal(weights.read(name), p) and weights.floating(name) and weights.shapes[name] == p.shape
        assert weights.plain(name) == ("experts.gate_up_proj" not in name and "experts.down_proj" not in name), name
        assert weights.nbytes(name) == 4 * p.numel()


def test_a_checkpoint_that_lacks_an_expert_is_declined(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    (gone,) = (n for n in held if "layers.2." in n and ".experts.3.w2" in n)
    held.pop(gone)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"stores model.layers.2.mlp.experts.down_proj under another name, shape"):
        stream_of(tmp_path, CPU)


def test_an_expert_of_another_size_is_named(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    stream = stream_of(tmp_path, CPU)
    name = "model.layers.2.mlp.experts.down_proj"
    held = load_file(tmp_path / "model.safetensors")
    (odd,) = (n for n in held if "layers.2." in n and ".experts.3.w2" in n)
    held[odd] = held[odd][:, :-1].contiguous()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} cannot be put together from .*experts.0.w2.* fetch the model again"):
        stream.read(name)


def test_needs_say_what_is_read_at_once(tmp_path: Path) -> None:
    """Known sizes: a head of 97 x 64 is nothing, so the layer counts; more windows cost their hidden states and sums."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.find(tmp_path)
    assert checkpoint is not None
    one, more = (profile_needs(skeleton(tmp_path), checkpoint, n, 96) for n in (1, 5))
    weights = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert one.by_layer - one.base > 4 * layer and one.whole - one.base > 4 * weights
    assert more.by_layer - one.by_layer == 4 * 96 * (4 * 64 + 8 * 4 * 4)
    assert profile_needs(skeleton(tmp_path), checkpoint, 1, 96, 2).whole == one.whole - 2 * weights


def test_a_stream_has_the_passes_of_layers(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    assert (passes_of(model).how, passes_of(stream_of(tmp_path, CPU)).how) == (WHOLE, BY_LAYER)

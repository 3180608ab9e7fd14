"""Adapters on a rewritten model compute what they compute on the original, whichever way they get on, and pack what they do."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import kvsink
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.model.runtime import runtime_of
from tests.models import HEADS, HIDDEN, build, tokens

peft = pytest.importorskip("peft", reason="adapters of PEFT need peft")

ROW, SETTINGS = tokens(2, 13), dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
LORA: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "o_proj"]),
    "lora on values": lambda: peft.LoraConfig(**LORA, target_modules=["v_proj"]),
    "lora on outputs": lambda: peft.LoraConfig(**LORA, target_modules=["o_proj"]),
    "all linear": lambda: peft.LoraConfig(**LORA, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True, target_modules=["v_proj", "o_proj"]),
    "pissa": lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa", target_modules=["v_proj"]),
    "parameters": lambda: peft.LoraConfig(**LORA, target_modules=[], target_parameters=["self_attn.v_proj.weight"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["v_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["o_proj"]),
    "whole modules": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["v_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
FOLDS_STAY = ("norms", "prompt")


def stir(model: nn.Module) -> Any:
    """Numbers into what an adapter would have learnt."""
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model.eval()


def rewritten(family: str = "llama", **options: Any) -> Any:
    model = build(family)
    kvsink.rewrite(model, "klt", **{"key_bits": 8, "value_bits": 8, "calibration": tokens(8, 64, seed=1), **options})
    assert all(p.codec.value.folded for p in runtime_of(model).plans) or options.get("fold") is False or family != "llama"
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROW).logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Within what float32 loses when weights are turned, and turned back."""
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.fixture
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An adapter on the model as it was, saved under tmp_path."""
    torch.manual_seed(1)
    model = stir(peft.get_peft_model(build("llama"), CONFIGS[request.param]()))
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize("original", CONFIGS, indirect=True)
def test_a_loaded_adapter_computes_what_it_does_on_the_original(original: Any, tmp_path: Path, request: Any) -> None:
    kind, base = request.node.callspec.params["original"], rewritten()
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    wanted = logits(original)
    assert (wanted - logits(build("llama")))[:, -13:].abs().max() > 0.05 * wanted.abs().max() if kind != "prompt" else True
    assert_close(logits(model), wanted)
    folded = [p.codec.value.folded for p in runtime_of(base).plans]
    assert folded == [kind in FOLDS_STAY] * 2
    out = model.generate(input_ids=ROW, return_dict_in_generate=True, **SETTINGS)
    assert isinstance(out["cache"] if "cache" in out else out["past_key_values"], kvsink.KVSinkCache)
    online = peft.PeftModel.from_pretrained(rewritten(fold=False), tmp_path).eval()
    assert torch.equal(out.sequences, online.generate(input_ids=ROW, **SETTINGS))


@pytest.mark.parametrize("original", ["lora", "dora", "whole modules"], indirect=True)
def test_a_merged_adapter_computes_and_is_saved_as_on_the_original(original: Any, tmp_path: Path) -> None:
    wanted = logits(original)
    merged = peft.PeftModel.from_pretrained(rewritten(), tmp_path).eval().merge_and_unload()
    assert_close(logits(merged), wanted)
    merged.save_pretrained(tmp_path / "merged")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert runtime_of(again).plans == runtime_of(merged).plans and torch.equal(logits(again), logits(merged))
    assert torch.equal(again.generate(ROW, **SETTINGS), merged.generate(ROW, **SETTINGS))


@pytest.mark.parametrize("original", ["lora"], indirect=True)
def test_an_adapter_taken_off_leaves_the_original(original: Any, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(rewritten(), tmp_path)
    with model.disable_adapter():
        assert_close(logits(model), logits(build("llama")))
    assert_close(logits(model.unload()), logits(build("llama")))


@pytest.mark.parametrize("original", ["lora"], indirect=True)
@pytest.mark.parametrize("way", ["load_adapter", "beside the weights"])
def test_adapters_that_transformers_loads(original: Any, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "folder"
    rewritten().save_pretrained(folder)
    if way == "load_adapter":
        model = hf.AutoModelForCausalLM.from_pretrained(folder)
        model.load_adapter(str(tmp_path))
    else:
        for file in tmp_path.glob("adapter_*"):
            shutil.copy(file, folder)
        model = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert_close(logits(model.eval()), logits(original))
    assert not any(p.codec.value.folded for p in runtime_of(model).plans)


@pytest.mark.parametrize("original", ["lora"], indirect=True)
def test_of_a_model_with_adapters_these_alone_are_saved(original: Any, tmp_path: Path) -> None:
    model = rewritten()
    model.load_adapter(str(tmp_path))
    try:
        model.active_adapters()
    except ValueError as error:
        pytest.skip(f"transformers saves no adapters with this peft: {error}")
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "kvsink.json").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_a_new_adapter_begins_as_the_original_and_is_right_on_it_when_trained(kind: str, tmp_path: Path) -> None:
    """What it is started from is the original's weights, not the turned ones, and so is what it learns."""
    torch.manual_seed(1)
    model = peft.get_peft_model(rewritten(), CONFIGS[kind]())
    assert_close(logits(model), logits(build("llama")))
    settings = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.SGD(settings, lr=0.5)
    for _ in range(2):
        model(input_ids=ROW, labels=ROW).loss.backward()
        step.step()
    assert (logits(model.eval()) - logits(build("llama"))).abs().max() > 1e-3
    if kind != "pissa":  # which changes the weights it starts from
        model.save_pretrained(tmp_path)
        other = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
        assert_close(logits(other), logits(model))


def test_a_second_adapter_may_be_the_first_on_values() -> None:
    base = rewritten()
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    assert all(p.codec.value.folded for p in runtime_of(base).plans)
    model.add_adapter("more", peft.LoraConfig(**LORA, target_modules=["v_proj"]))
    model.set_adapter("more")
    assert not any(p.codec.value.folded for p in runtime_of(base).plans)
    assert_close(logits(model.eval()), logits(build("llama")))


def test_an_adapter_on_one_layer_leaves_the_others_folded() -> None:
    base = rewritten()
    peft.get_peft_model(base, peft.LoraConfig(**LORA, target_modules=["v_proj"], layers_to_transform=[1]))
    assert [p.codec.value.folded for p in runtime_of(base).plans] == [True, False]
    assert_close(logits(base), logits(build("llama")))


def test_any_wrapper_of_a_projection_finds_the_original_weights() -> None:
    class Beside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    base, plain = rewritten(), build("llama")
    attention = base.model.layers[0].self_attn
    attention.o_proj = Beside(attention.o_proj)
    assert (attention.v_proj.weight - plain.model.layers[0].self_attn.v_proj.weight).abs().max() <= 1e-6
    nn.utils.parametrize.register_parametrization(base.model.layers[1].self_attn.v_proj, "weight", nn.Identity())
    assert not any(p.codec.value.folded for p in runtime_of(base).plans)
    assert_close(logits(base), logits(plain))


@pytest.mark.parametrize("kind", ["lora on outputs", "lora on values"])
def test_a_weight_written_in_another_way_stays_folded(kind: str) -> None:
    """Weight norm computes the same numbers from others; an adapter cannot be put on them any more."""
    base = rewritten()
    nn.utils.parametrizations.weight_norm(base.model.layers[0].self_attn.v_proj)
    assert all(p.codec.value.folded for p in runtime_of(base).plans)
    assert_close(logits(base), logits(build("llama")))
    with pytest.raises(UnsupportedError, match=r"computed from others, .* fold=False$"):
        peft.get_peft_model(base, CONFIGS[kind]())


def test_a_copy_gives_its_own_weights_back(tmp_path: Path) -> None:
    first = rewritten()
    second = copy.deepcopy(first)
    peft.get_peft_model(second, CONFIGS["lora"]())
    assert all(p.codec.value.folded for p in runtime_of(first).plans)
    assert not any(p.codec.value.folded for p in runtime_of(second).plans)
    for each in (first, second):
        assert_close(logits(each), logits(build("llama")))


@pytest.mark.parametrize("heads", [2, 4])
def test_rotations_that_are_not_their_own_inverse(heads: int) -> None:
    """Head width 24: the core of order 12 is not symmetric; values have a bias and a mean, and 16 bits do not hide a wrong one."""

    def make() -> Any:
        torch.manual_seed(3)
        config = hf.Qwen2Config(
            vocab_size=97,
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=heads,
            head_dim=24,
            max_position_embeddings=128,
            eos_token_id=None,
        )
        model = hf.Qwen2ForCausalLM(config)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        return model.double().eval()

    base, plain = make(), make()
    kvsink.rewrite(base, "klt", key_bits=8, value_bits=8, calibration=tokens(8, 64, seed=1))
    assert all(p.codec.value.folded and p.codec.value.order == 24 for p in runtime_of(base).plans)
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, target_modules=["v_proj"]))
    for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
        part, _, kind = name.partition(".")
        held = getattr(base.model.layers[0].self_attn, part)
        held = getattr(held, "base_layer", held)
        assert (getattr(held, kind) - plain.get_parameter(f"model.layers.0.self_attn.{name}")).abs().max() <= 1e-12
    online = make()
    kvsink.rewrite(online, "klt", key_bits=8, value_bits=8, calibration=tokens(8, 64, seed=1), fold=False)
    one, two = runtime_of(base).tables, runtime_of(online).tables
    assert all((one[n] - two[n]).abs().max() <= 1e-5 for n in one)
    assert torch.equal(model.generate(input_ids=ROW, **SETTINGS), online.generate(ROW, **SETTINGS))


def test_a_cache_from_before_the_adapter_is_refused() -> None:
    base = rewritten()
    cache = kvsink.KVSinkCache.for_model(base)
    with torch.no_grad():
        base(input_ids=ROW, past_key_values=cache, use_cache=True)
    peft.get_peft_model(base, CONFIGS["lora"]())
    with pytest.raises(KvsinkError, match=r"something was put on model.layers.\d.self_attn since this cache was made"):
        base(input_ids=ROW[:, :1], past_key_values=cache, use_cache=True)


def test_an_adapter_on_folded_weights_that_are_offloaded_is_refused() -> None:
    base = rewritten().to("meta")
    with pytest.raises(UnsupportedError, match=r"^model.layers.0.self_attn holds .* offloaded or .* fold=False$"):
        peft.get_peft_model(base, CONFIGS["lora"]())


# -- rewriting a wrapper -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "norms", "prompt", "ia3"])
def test_a_wrapper_is_rewritten_through(kind: str) -> None:
    """`generate()` of the wrapper then runs on the packed cache, as when the model inside is rewritten."""
    models = []
    for inside in (False, True):
        torch.manual_seed(1)
        model = stir(peft.get_peft_model(build("llama"), CONFIGS[kind]()))
        before = logits(model)
        target = model.get_base_model() if inside else model
        report = kvsink.rewrite(target, "klt", key_bits=4, value_bits=4, calibration=tokens(8, 64, seed=1))
        assert report.bits < 10
        assert_close(logits(model), before)
        models.append(model)
    outs = [m.generate(input_ids=ROW, return_dict_in_generate=True, **SETTINGS) for m in models]
    assert all(isinstance(o["cache"] if "cache" in o else o["past_key_values"], kvsink.KVSinkCache) for o in outs)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    given = kvsink.KVSinkCache.for_model(models[0], 2, 64)
    assert given.shared.runtime is runtime_of(models[0].get_base_model())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.Sequential], ids=["parallel", "compiled", "other"])
def test_a_wrapper_that_is_not_seen_through_is_named(wrap: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"^\w+ is a wrapper .*; rewrite the LlamaForCausalLM inside it \(\.\w+\)"):
        kvsink.rewrite(wrap(build("llama")), "klt", calibration=tokens(8, 64, seed=1))


def test_prefix_tuning_is_refused_wherever_it_meets_a_packed_cache(tmp_path: Path) -> None:
    """Its keys and values come in a cache of 16 bits, and its values are not turned as those of folded weights are."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"^PREFIX_TUNING hands the model"):
        peft.PeftModel.from_pretrained(rewritten(), tmp_path)
    with pytest.raises(UnsupportedError, match=r"^PREFIX_TUNING hands the model"):
        kvsink.rewrite(model, "klt", calibration=tokens(8, 64, seed=1))
    kvsink.rewrite(model.get_base_model(), "klt", calibration=tokens(8, 64, seed=1))
    with pytest.raises(UnsupportedError, match=r"^PREFIX_TUNING hands the model"):
        model.generate(input_ids=ROW, **SETTINGS)

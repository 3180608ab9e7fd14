"""AKVQ-VL on a tiny LLaVA: which rows are images, how they are coded, and how layers are told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.patterns import attention_patterns, classify
from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import SinkStage
from kvsink.errors import KvsinkError, UnknownName
from kvsink.kernels.packing import unpack_bits
from kvsink.model.frame import Frame
from kvsink.model.hooks import Pivots
from kvsink.model.runtime import runtime_of
from kvsink.tools.bench_model import Shape, llama
from tests.close import SOFTMAX_IN_FLOAT32, largest_difference
from tests.models import _DECODER, HEAD_DIM, KV_HEADS, build, tokens

IMAGE = 96


def llava() -> Any:
    """Two decoder layers and a vision tower of two; one image of 16 x 16 is 4 tokens."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**_DECODER),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = hf.LlavaForConditionalGeneration(config)
        for name, weight in model.model.language_model.named_parameters():
            if "proj" in name:
                weight.data.normal_(std=0.15)
    return model.eval().requires_grad_(False)


def prompt(length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Two rows whose image stands at different places."""
    ids = tokens(2, length, seed=seed).masked_fill(tokens(2, length, seed=seed) == IMAGE, 5)
    ids[0, 3:7] = ids[1, 8:12] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def salient() -> Any:
    model = llava()
    kvsink.rewrite(model, "akvq-vl", calibration=[prompt(seed=i) for i in range(4)], layers="0:pattern=tsa", window=4)
    return model


def levels(layer: Any, slot: int, row: int) -> set[int]:
    return set(unpack_bits(layer.k_codes, 4, HEAD_DIM)[row, :, slot].flatten().tolist())


@pytest.mark.parametrize("chunks", [(20,), (2, 3, 5, 10), (9, 11)])
def test_images_take_four_levels_and_text_sixteen(salient: Any, chunks: tuple[int, ...]) -> None:
    """Every batch row has its own mask; a prompt in chunks, fed as embeddings of its parts, gives the same codes."""
    given, model = prompt(), salient
    whole = KVSinkCache.for_model(model, 2, max_length=32)
    with torch.no_grad():
        model(**given, past_key_values=whole)
        cache, at = KVSinkCache.for_model(model, 2, max_length=32), 0
        for n in chunks:
            model(
                input_ids=given["input_ids"][:, at : at + n],
                past_key_values=cache,
                **({"pixel_values": given["pixel_values"]} if len(chunks) == 1 else {}),
            )
            at += n
    layer = cache.packed_layers()[0]
    for row in range(2):
        for slot in range(20):
            seen = levels(layer, slot, row)
            if given["input_ids"][row, slot] == IMAGE:
                assert seen <= {0, 1, 2, 3} and {0, 3} <= seen
            else:
                assert max(seen) == 15
    if len(chunks) == 1:
        assert torch.equal(layer.k_codes, whole.packed_layers()[0].k_codes)
    other = cache.packed_layers()[1]
    assert other.codec.key.kind == "uniform-int" and other.k_codes.shape[-1] == HEAD_DIM // 4  # 2 bits


def test_the_two_kinds_are_the_two_quantizers() -> None:
    """Modal rows decode to what a 4-bit and a clipped 2-bit codec give, row by row."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2, KV_HEADS, 9, HEAD_DIM, generator=g)
    visual = torch.rand(2, 9, generator=g) < 0.5
    sides = [
        SideSpec(bits=4, kind="modal", visual_bits=2, visual_clip=0.8),
        SideSpec(bits=4, kind="uniform-int"),
        SideSpec(bits=2, kind="uniform-int", clip=0.8),
    ]
    codecs = [Codec(SideSpec(), side.resolved(KV_HEADS, HEAD_DIM)) for side in sides]
    modal, fine, coarse = (c.decode_values(*c.encode_values(v, {"visual": visual}), {}) for c in codecs)
    wanted = torch.where(visual[:, None, :, None], coarse, fine)
    assert torch.equal(modal, wanted) and not torch.equal(fine, coarse)
    assert torch.equal(codecs[0].decode_values(*codecs[0].encode_values(v, {}), {}), fine)  # nothing known: text


def test_keys_turn_after_rope_and_values_are_folded(salient: Any) -> None:
    for plan in runtime_of(salient).plans:
        assert plan.codec.key.domain == "post" and plan.codec.key.transform == "hadamard" and not plan.codec.key.folded
        assert plan.codec.value.folded and plan.codec.window == 4
    given, plain = prompt(), llava()
    with torch.no_grad():
        one, two = (m(**given).logits for m in (salient, plain))
    assert largest_difference(one, two) <= SOFTMAX_IN_FLOAT32 * 10 * float(two.abs().max())


def test_generate_sees_the_images(salient: Any) -> None:
    given, cache = prompt(), KVSinkCache.for_model(salient)
    out = salient.generate(**given, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 26)
    layer = cache.packed_layers()[0]
    assert levels(layer, 4, 0) <= {0, 1, 2, 3} and levels(layer, 9, 1) <= {0, 1, 2, 3}
    assert max(levels(layer, 4, 1)) == max(levels(layer, 21, 0)) == 15  # generated tokens are text


# -- layer classes -----------------------------------------------------------------------------------------------------


def test_patterns_are_those_of_the_attention_matrix() -> None:
    model, given = llava(), prompt(24)
    given["attention_mask"] = torch.ones(2, 24, dtype=torch.int64)
    given["attention_mask"][1, :2] = 0
    found = attention_patterns(model, [given], (IMAGE,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions
    assert found is not None and len(found) == 2
    for (ratio, share), a in zip(found, weights, strict=True):
        ratios, shares = [], []
        for row, first in ((0, 0), (1, 2)):
            mass = a[row].mean(0)[first:].sum(0)[first:]
            mean = mass / torch.arange(24 - first, 0, -1)
            visual = (given["input_ids"][row] == IMAGE)[first:]
            text = ~visual
            text[:5] = False
            ratios.append(float(mean[text].mean() / mean[visual].mean()))
            shares.append(float(mass.topk(15).values.sum() / mass.sum()))
        assert ratio == pytest.approx(sum(ratios) / 2, rel=1e-4) and share == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert attention_patterns(llava(), [{"input_ids": torch.full((1, 9), 5)}], (IMAGE,)) is None


def test_a_layer_that_looks_at_text_is_salient() -> None:
    assert classify((2.1, 0.4), 2.0, 0.5) == "tsa"
    assert classify((2.1, 0.6), 2.0, 0.5) == classify((1.9, 0.4), 2.0, 0.5) == "psa"
    model = llava()
    attention = model.model.language_model.layers[0].self_attn
    slow, ids = HEAD_DIM // 2 - 1, prompt(60)

    def look(module: Any, args: Any, out: Tensor) -> Tensor:
        return torch.zeros_like(out).index_fill_(-1, torch.arange(slow, out.shape[-1], HEAD_DIM), 3.0)

    def hide(module: Any, args: Any, out: Tensor) -> Tensor:
        if out.shape[:2] == ids["input_ids"].shape:  # the prompt itself, not the windows that statistics are taken from
            out[..., slow::HEAD_DIM] = torch.where(ids["input_ids"] == IMAGE, -3.0, 0.0)[..., None]
        return out

    hooks = [attention.q_proj.register_forward_hook(look), attention.k_proj.register_forward_hook(hide)]
    found = attention_patterns(model, [ids], (IMAGE,))
    assert found is not None and found[0][0] > 4 > 2 > found[1][0]
    report = kvsink.rewrite(model, "akvq-vl", calibration=[ids] * 2)
    for hook in hooks:
        hook.remove()
    wanted = ["tsa" if r > 2 and c < 0.5 else "psa" for r, c in found]
    kinds = ["tsa" if "modal" in layer.key else "psa" for layer in report.layers]
    assert kinds == wanted and any("text-salient layers" in note for note in report.notes)


def test_text_models_have_no_salient_layers_unless_told() -> None:
    report = kvsink.rewrite(build("llama"), "akvq-vl", calibration=tokens(4, 64))
    assert all("2 bit" in layer.key and layer.protect == "first:1" for layer in report.layers)
    assert not any("image" in note for note in report.notes)
    told = kvsink.rewrite(build("llama"), "akvq-vl", calibration=tokens(4, 64), layers="1:pattern=tsa")
    assert ["4 bit" in layer.key for layer in told.layers] == [False, True]
    blind = llava()
    assert any("shows no image" in n for n in kvsink.rewrite(blind, "akvq-vl", calibration=torch.full((4, 64), 5)).notes)


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(UnknownName, match="unknown attention pattern 'tsb'; nearest known: tsa"):
        kvsink.rewrite(build("llama"), "akvq-vl", calibration=tokens(4, 64), layers="0:pattern=tsb")
    with pytest.raises(KvsinkError, match="method rtn treats all attention patterns alike"):
        kvsink.rewrite(build("llama"), "rtn", layers="0:pattern=tsa")


def test_compiled_equals_uncompiled(salient: Any) -> None:
    torch._dynamo.reset()
    run = torch.compile(salient.model.language_model, backend="kvsink", options={"kvsink.inner": "eager"})
    embed = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))
    caches = [KVSinkCache.for_model(salient, 1, max_length=32) for _ in range(2)]
    with torch.no_grad():
        got, wanted = (
            m(inputs_embeds=embed, past_key_values=c).last_hidden_state
            for m, c in zip((run, salient.model.language_model), caches, strict=True)
        )
    assert largest_difference(got, wanted) <= SOFTMAX_IN_FLOAT32 * 10 * float(wanted.abs().max())
    assert torch.equal(caches[0].packed_layers()[0].k_codes, caches[1].packed_layers()[0].k_codes)
    torch._dynamo.reset()


def behind_a_probe(dtype: torch.dtype, device: str = "cpu") -> Any:
    """Two layers with heads of 128 channels. Random weights have no sinks: a stage is named, so that layer 1 keeps pivots."""
    shape = Shape(vocabulary=96, inner=512, kv_heads=4, theta=10000.0, hidden=512, heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = llama(2, dtype, positions=4096, shape=shape, device=device)
    layers = model.config.num_hidden_layers
    ids = (torch.arange(8 * 64) * 7 % 90 + 3).reshape(8, 64).to(device)
    record = calibrate(model, ids, [()] * layers, dict.fromkeys(range(layers), (64,)))
    record = replace(record, stages=(SinkStage(0, (7,), 1e4, 1.0),))
    kvsink.rewrite(model, "akvq-vl:even", calibration=record, fold=False, layers="0:pattern=tsa")
    assert [s.source for p in runtime_of(model).plans for s in p.segments] == ["first", "pivots:0:100:1000"]
    return model


def steps_of(model: Any, run: Any, device: str = "cpu", **options: Any) -> tuple[list[Tensor], KVSinkCache]:
    """Logits of a prompt, which `model` itself reads, and of four steps by `run`."""
    ids = (torch.arange(2 * 13) * 5 % 90 + 3).reshape(2, 13).to(device)
    cache = KVSinkCache.for_model(model, 2, max_length=128, **options)
    with torch.no_grad():
        out = [model(ids[:, :9], past_key_values=cache).logits[:, -1]]
        for i in range(9, 13):
            at = torch.full((1, 1), i, device=device)
            out.append(run(ids[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True).logits[:, -1].clone())
    return out, cache


@pytest.mark.parametrize("tiles", [False, True])
def test_a_step_behind_pivots_compiles(tiles: bool) -> None:
    """What the probe hands to the layers is a plain pair: dynamo of torch 2.11 does not join torch's own kind to a list."""
    torch._dynamo.reset()
    model = behind_a_probe(torch.float32)
    run = torch.compile(model, backend="kvsink", fullgraph=True, options={"kvsink.inner": "eager"})
    (got, one), (wanted, two) = (steps_of(model, f, tiles=tiles) for f in (run, model))
    assert [layer.codec.tiles for layer in one.packed_layers()] == [tiles] * 2
    for a, b in zip(got, wanted, strict=True):
        assert largest_difference(a, b) <= SOFTMAX_IN_FLOAT32 * 10 * float(b.abs().max())
    for a, b in zip(one.packed_layers(), two.packed_layers(), strict=True):
        assert torch.equal(a.k_codes, b.k_codes) and torch.equal(a.exact_slot, b.exact_slot)
    hook = next(h for h in model.model.layers[0]._forward_hooks.values() if isinstance(h, Pivots))
    one.shared.frame = Frame()
    hook(model.model.layers[0], (), {"past_key_values": one}, torch.randn(2, 5, 512) * 1e3)
    assert [type(pair) for pair in one.shared.frame.candidates.values()] == [tuple]
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_step_behind_pivots_compiles_on_a_gpu(inner: str) -> None:
    """In float16; what dynamo or Inductor raises is shown with its whole chain of causes."""
    torch._dynamo.reset()
    model = behind_a_probe(torch.float16, "cuda")
    options: dict[str, Any] = {"kvsink.inner": inner, **({"triton.cudagraphs": True} if inner == "inductor" else {})}
    run = torch.compile(model, backend="kvsink", fullgraph=True, options=options)
    with torch._dynamo.config.patch(verbose=True):
        (got, one), (wanted, two) = (steps_of(model, f, "cuda") for f in (run, model))
    assert all(layer.codec.tiles for layer in one.packed_layers())
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 0.02  # float16 in another order, codes on ties
    assert all(torch.equal(a.exact_slot, b.exact_slot) for a, b in zip(one.packed_layers(), two.packed_layers(), strict=True))
    torch._dynamo.reset()

"""Every attention of every family is found, whole, under each spelling and cache; what is left alone says why."""

from __future__ import annotations

import pytest
import torch

from kvsink.graph.capture import capture, capture_all, capture_export
from kvsink.graph.sites import AttentionSite, Declined, find_sites
from kvsink.graph.targets import arg, kind, shape
from kvsink.kernels.rope import rope
from tests.close import SOFTMAX_IN_FLOAT32
from tests.graphs import inputs_of, stock_graph, values_of
from tests.models import FAMILIES, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, WINDOW, build, stock_cache, tokens

STEPS = (("none", 5), ("dynamic", 1), ("static", 1))
PREFILLS = (("dynamic", 5), ("static", 5), ("static", 12))


def sites_of(gm: torch.fx.GraphModule) -> list[AttentionSite]:
    found = find_sites(gm)
    assert all(isinstance(each, AttentionSite) for each in found), [str(each) for each in found]
    return found  # type: ignore[return-value]


def check_site(site: AttentionSite, family: str, attention: str, cache: str, length: int) -> None:
    kv_heads = HEADS if family == "gpt2" else KV_HEADS
    rows = (1, kv_heads, length, HEAD_DIM)
    assert shape(site.k_rope) == shape(site.k_pre) == shape(site.v_new) == rows
    assert shape(site.q) == (1, HEADS, length, HEAD_DIM)
    assert shape(site.hidden) == shape(site.hidden_in) == (1, length, HIDDEN)
    assert (site.scale, site.repeats, site.cache) == (HEAD_DIM**-0.5, HEADS // kv_heads, cache)
    assert (site.query_heads, site.kv_heads, site.head_dim) == (HEADS, kv_heads, HEAD_DIM)
    assert site.core == ("sdpa" if attention == "sdpa" else "eager_softmax")
    assert site.causal and (site.is_causal or site.mask is not None or length == 1)
    assert site.rope == {"gpt2": "none", "phi3": "partial_half"}.get(family, "half")
    assert (site.cos is None) == (site.k_pre is site.k_rope) == (family == "gpt2")
    assert (site.window == WINDOW) == (family == "mistral-sliding" or (family == "gemma3" and site.layer == 0))
    assert len(site.writes) in ((0,) if cache == "none" else (2, 4))  # a full static window rolls, puts and copies
    if site.cos is not None:
        assert shape(site.cos) == shape(site.sin) == (1, length, HEAD_DIM // 2 if family == "phi3" else HEAD_DIM)
        assert shape(site.positions) == (1, length)


@pytest.mark.sample(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("cache", "length"), STEPS)
def test_both_layers_are_found_whole(family: str, attention: str, cache: str, length: int) -> None:
    gm = stock_graph(family, attention, cache, length)
    first, second = sites_of(gm)
    for site in (first, second):
        check_site(site, family, attention, cache, length)
    assert (first.layer, second.layer) == (0, 1)
    assert first.path.endswith(("layers.0.self_attn", "h.0.attn"))
    assert first.hidden is second.hidden_in
    values = values_of(gm)
    for site in (first, second):
        if site.cos is not None and site.sin is not None:
            turned = rope(values[site.k_pre], values[site.cos][:, None], values[site.sin][:, None])
            assert (turned - values[site.k_rope]).abs().max() <= SOFTMAX_IN_FLOAT32


@pytest.mark.sample(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize(("cache", "length"), PREFILLS)
def test_a_prefill_is_found_in_an_empty_cache_and_past_its_window(family: str, attention: str, cache: str, length: int) -> None:
    for site in sites_of(stock_graph(family, attention, cache, length)):
        check_site(site, family, attention, cache, length)


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3"])
def test_a_full_sliding_window_is_a_static_cache(family: str) -> None:
    model = build(family)
    cache = stock_cache("static", model)
    with torch.no_grad():
        model(tokens(length=12), past_key_values=cache)
    for length in (1, 3):
        for site in sites_of(capture(model, tokens(length=length), cache)):
            check_site(site, family, "sdpa", "static", length)


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_block(family: str) -> None:
    model = build(family)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out)))
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens(length=5, seed=5))
    for hook in hooks:
        hook.remove()
    gm = stock_graph(family, "sdpa", "none", 5)
    values = values_of(gm)
    for site, (entered, left) in zip(sites_of(gm), seen, strict=True):
        assert (values[site.hidden_in] - entered).abs().max() <= SOFTMAX_IN_FLOAT32
        assert (values[site.hidden] - left).abs().max() <= SOFTMAX_IN_FLOAT32


def test_new_rows_are_what_the_cache_receives() -> None:
    gm = stock_graph("qwen3", "sdpa", "static", 1)
    values, inputs = values_of(gm), inputs_of(gm)
    with torch.no_grad():
        gm(*inputs)
    after = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for site in sites_of(gm):
        assert torch.equal(after[site.k_read][:, :, 13:14], values[site.k_rope])
        assert torch.equal(after[site.v_read][:, :, 13:14], values[site.v_new])
        assert values[site.positions].tolist() == [[13]]


@pytest.mark.sample(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3"])
def test_exported_graphs_hold_the_same_sites(family: str, attention: str) -> None:
    first, second = sites_of(capture_export(build(family, attention)))
    for site in (first, second):
        assert site.cache == "dynamic" and len(site.writes) == 2 and site.causal
        assert site.rope == {"gpt2": "none", "phi3": "partial_half"}.get(family, "half")
        positions = site.positions
        while positions is not None and kind(positions) == "slice":  # all of them: some versions leave it in
            positions = arg(positions, 0)
        assert positions is None or positions.op == "placeholder"
    assert first.hidden is second.hidden_in or family == "gemma3"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cross_and_encoder_attention_are_left_alone(attention: str) -> None:
    found = find_sites(
        capture(build("bart", attention), {"input_ids": tokens(), "decoder_input_ids": tokens(length=3), "use_cache": False})
    )
    reasons = {each.path: each.reason for each in found if isinstance(each, Declined)}
    assert "vision or encoder" in reasons["model.encoder.layers.0.self_attn"]
    assert "cross attention" in reasons["model.decoder.layers.1.encoder_attn"]
    assert [each.path for each in found if isinstance(each, AttentionSite)] == [
        f"model.decoder.layers.{i}.self_attn" for i in (0, 1)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_attention_is_left_alone(attention: str) -> None:
    (gm,) = capture_all(build("clip-vision", attention), {"pixel_values": torch.zeros(1, 3, 16, 16)})
    found = find_sites(gm)
    assert len(found) == 2 and all(isinstance(each, Declined) and "vision" in each.reason for each in found)


def test_softcap_is_left_alone() -> None:
    found = find_sites(stock_graph("gemma2", "eager", "dynamic", 5))
    assert len(found) == 2 and all(isinstance(each, Declined) and "softcap" in each.reason for each in found)


def test_returned_weights_are_left_alone() -> None:
    inputs = {"input_ids": tokens(), "output_attentions": True, "use_cache": False}
    found = [each for gm in capture_all(build("llama", "eager"), inputs) for each in find_sites(gm)]
    assert len(found) == 2 and all(isinstance(each, Declined) and "used elsewhere" in each.reason for each in found)


def test_interleaved_rope_is_left_alone() -> None:
    found = find_sites(stock_graph("cohere", "sdpa", "dynamic", 5))
    assert len(found) == 2 and all(isinstance(each, Declined) and "RoPE of an unknown spelling" in each.reason for each in found)


def test_a_reason_names_its_module() -> None:
    (first, _) = find_sites(stock_graph("gemma2", "eager", "none", 5))
    assert str(first) == "model.layers.0.self_attn: softcap: tanh between the scores and the softmax has no SDPA form"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_symbolic_sizes_and_scales(attention: str) -> None:
    model = build("llama", attention)
    sites = sites_of(capture(model, tokens(2, 6), stock_cache("dynamic", model), dynamic=True))
    for site in sites:
        assert isinstance(site.scale, torch.fx.Node) and site.cache == "dynamic" and site.rope == "half"
        assert not isinstance(shape(site.k_rope)[2], int)


def test_a_divided_score_is_a_scale() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = k = v = torch.nn.functional.linear(x, torch.eye(16)).view(1, 5, 2, 8).transpose(1, 2)
            hidden = torch.ones(5, 5).triu(1) * -1e9
            return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 4.0 + hidden, -1), v)

    (site,) = sites_of(capture_all(Plain(), {"x": torch.zeros(1, 5, 16)})[0])
    assert site.scale == 0.25 and site.core == "eager_softmax" and site.mask is not None

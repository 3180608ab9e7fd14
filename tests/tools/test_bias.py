"""The key-bias study, small: what it measures, and that centring makes a bias harmless."""

from __future__ import annotations

import pytest
import torch

from kvsink.tools.bias import attention_output, biased, markdown, random_qwen2, study


@pytest.fixture(scope="module")
def rows():
    return {
        r.method: r
        for r in study(["centred", "klt", "rotatekv", "rtn"], head_dim=32, tokens=192, windows=1, calibration_tokens=768, chunk=32)
    }


def test_centred_keys_do_not_notice_a_bias(rows):
    for name in ("klt", "centred"):
        assert rows[name].ratio <= 1.2, rows[name]


def test_a_range_per_token_does(rows):
    assert rows["rtn"].ratio > 1.5
    assert rows["rtn"].centred < 0.5 * rows["rtn"].biased


def test_the_bias_is_as_large_as_it_says():
    model = random_qwen2(32)
    ids = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    other = biased(model, ids, channels=4, deviations=50.0)
    bias = other.model.layers[0].self_attn.k_proj.bias
    seen = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    model(ids)
    handle.remove()
    spread = seen[0].flatten(0, 1).std(0)
    assert (bias != 0).unflatten(0, (2, 32)).sum(1).tolist() == [4, 4]
    assert torch.allclose((bias / spread).abs()[bias != 0], torch.tensor(50.0))
    assert not model.model.layers[0].self_attn.k_proj.bias.any()


def test_the_output_is_that_of_one_pass():
    from transformers import DynamicCache

    model = random_qwen2(32)
    ids = torch.randint(3, 512, (1, 48), generator=torch.Generator().manual_seed(0))
    whole, parts = (attention_output(model, DynamicCache(config=model.config), ids, chunk) for chunk in (48, 7))
    assert whole.shape == (1, 48, 128)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_the_page_has_a_line_per_method(rows):
    page = markdown(list(rows.values()))
    for name, found in rows.items():
        line = next(x for x in page.splitlines() if x.startswith(f"| {name} "))
        assert f"{found.ratio:.2f}" in line


def test_a_method_that_declines_says_why():
    (found,) = study(["rtn"], bits=2.5, head_dim=32, tokens=64, windows=1, calibration_tokens=256, chunk=32)
    assert found.ratio is None and "use 2 or 3" in markdown([found])

"""Whether the rows of a text spread as those of the calibration text did, which the tables of a rewritten model were made of.

Formula    of a row x in the basis of its quantizer, with deviations sigma: e = mean over channels of (x / sigma)^2;
           spread of a layer's side = (median of e over rows and heads)^1/2: 1 where rows are as at calibration
Source     ours; e is the squared Mahalanobis distance by the channel in the basis that calibration found
Shapes     ids int64 [N, T]; one pair (keys, values) per layer, None for a side without deviations of its channels
Exact      no: deviations of calibration leave exact rows out, the median here does not
Raises     nothing of its own
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.cache.sliding import WINDOWED
from kvsink.evaluate.evaluation import dynamic_cache, evaluating
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of

__all__ = ["FAR", "Spread", "spread", "spread_line"]

Spread = tuple[float | None, float | None]
"""Of keys and of values of one layer."""

FAR = 1.2
"""Told from here on: 1.04 in the worst layer of the demo model on text like that of its calibration, 1.33 on Python source."""


def spread(model: Any, ids: Tensor) -> tuple[Spread, ...]:
    """The spread of keys and values of every layer of a rewritten model over windows of a text, through its stock cache."""
    runtime, cache = runtime_of(model), dynamic_cache(model, *ids.shape)
    positions = torch.arange(ids.shape[1], device=place_of(model))[None]
    with evaluating(model), torch.no_grad():
        model(ids.to(place_of(model)), **given_cache(model, cache), use_cache=True, logits_to_keep=1)
        found: list[Spread] = []
        for i, plan in enumerate(runtime.plans):
            held, codec = cache.layers[i] if i < len(cache.layers) else None, plan.codec  # layers that share keys hold none
            keys = None if runtime.anatomy.layer_types[i] in WINDOWED else getattr(held, "keys", None)
            if codec is None or codec.modal or keys is None or keys.shape[2] != ids.shape[1]:
                found.append((None, None))
                continue
            assert held is not None
            here, given = positions.to(keys.device), runtime.params(i, codec, ids.shape[1], keys.device)
            p = dict(zip(codec.param_names(), given, strict=True))
            if (order := runtime.order(i, keys.device)) is not None:
                keys = keys.index_select(-1, order[0])
            keys = codec.transform_keys(keys, *runtime.angles(i, here), here, p, True)
            found.append((_spread(keys, p.get("k_sigma")), _spread(codec.transform_values(held.values, p), p.get("v_sigma"))))
    return tuple(found)


def _spread(x: Tensor, sigma: Tensor | None) -> float | None:
    """Of rows [B, H, S, D] with deviations [H, D]."""
    if sigma is None:
        return None
    return float((x.float() / sigma[:, None]).square().mean(-1).median().sqrt())


def spread_line(found: tuple[Spread, ...]) -> str:
    """One line for people, or none where no layer spreads far."""
    said = []
    for side, name in enumerate(("keys", "values")):
        far = {i: pair[side] for i, pair in enumerate(found) if (pair[side] or 0.0) >= FAR}
        if far:
            layer = max(far, key=lambda i: far[i] or 0.0)
            said.append(f"{name} of {len(far)} of {len(found)} layers, most in layer {layer} ({far[layer]:.2f} times)")
    if not said:
        return ""
    return (
        f"this text spreads farther than the one of calibration: {'; '.join(said)}; rewrite with --calibration and a text like it"
        " if it is what you use"
    )

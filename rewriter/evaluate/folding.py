"""Value rotations that go into the weights: which layers take one, tried on each alone, and the model with all of them in it.

Formula    every attention module puts out the same with its value rotation folded into its weights as without, and the whole
           model, without a cache, the same logits with all of them; |difference| / |stock| in the Euclidean norm
Source     ours
Raises     UnsupportedError naming what was found and the bound it had to keep
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.calibrate.probing import probe_ids
from kvsink.errors import UnsupportedError
from kvsink.evaluate.selfcheck import Check, Given, off, passes, rounding
from kvsink.model.decoder import Decoder
from kvsink.model.fold import FOLDED, fold_value_rotation, foldable, shared_weights
from kvsink.model.offload import number_of

__all__ = ["check_fold", "folded_in", "online_layers", "refused_folds", "unfoldable"]


def online_layers(
    decoder: Decoder, orders: Mapping[int, int], storage: torch.dtype | None, check: bool
) -> tuple[dict[int, str], Check, Tensor | None]:
    """Layers whose value rotation cannot go into the weights, each with the reason: by what their modules are, then by trial; and
    the logits of the model before any does."""
    shared = shared_weights(decoder.model.named_parameters(remove_duplicate=False))
    found: dict[int, str] = {}
    for i in orders:
        if reason := unfoldable(decoder.attention(i), shared, decoder.stream is not None):
            found[i] = reason
    left = {i: order for i, order in orders.items() if i not in found}
    if not left or not check:
        return found, Check(), None
    refused, worst, logits = refused_folds(decoder, left, storage)
    return {**found, **refused}, Check(fold=worst if len(refused) < len(left) else None), logits


def unfoldable(attention: nn.Module, shared: frozenset[int], streamed: bool) -> str | None:
    """Why a value rotation cannot go into the weights of an attention module, or None."""
    if reason := foldable(attention):
        return reason
    for name, p in attention.named_parameters():
        if name in FOLDED and id(p) in shared:
            return f"{name} is shared with another module"
        if name in FOLDED and p.is_meta and not streamed:
            return f"{name} is offloaded and cannot be written here"
    return None


@contextmanager
def folded_in(decoder: Decoder, orders: Mapping[int, int], storage: torch.dtype | None) -> Iterator[Callable[[], None]]:
    """Weights with the value rotations of layers in them; they are as before at the end unless the caller says to keep them."""
    attentions = [decoder.attention(i) for i in orders]
    before = [{n: p.detach().clone() for n, p in a.named_parameters() if n in FOLDED} for a in attentions]
    try:
        for attention, order in zip(attentions, orders.values(), strict=True):
            fold_value_rotation(attention, order, storage)
        yield before.clear
    finally:
        with torch.no_grad():
            for attention, held in zip(attentions, before, strict=False):
                for name, p in attention.named_parameters():
                    if name in held:
                        p.copy_(held[name])


@torch.no_grad()
def refused_folds(
    decoder: Decoder, orders: Mapping[int, int], storage: torch.dtype | None
) -> tuple[dict[int, str], float, Tensor | None]:
    """Layers whose value rotation of order `orders[layer]` cannot go into the weights, each with the reason, the largest
    difference of the others, and the logits [2, 12, V] of the model as it is (None by layers), for `check_fold`. Every layer is
    tried on its own: folded, run again on the same input, and put back."""
    refused: dict[int, str] = {i: "other layers read its values" for i in orders if i in decoder.where.apart}
    worst = 0.0

    def tried(layer: int) -> Callable[..., None]:
        def hook(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal worst
            found = _tried(attention, orders[layer], storage, args, kwargs, _first(output))
            bound = rounding(_coarser(number_of(attention).dtype, storage))
            if found is None or not found <= bound:
                what = "it cannot be run alone" if found is None else f"its output changes by {found:.2g} of its size"
                refused[layer] = f"{what}: something stands between its values and the projection behind them"
            else:
                worst = max(worst, found)

        return hook

    with ExitStack() as stack:
        for layer in orders.keys() - refused.keys():
            module = decoder.attention(layer)
            stack.callback(module.register_forward_hook(tried(layer), with_kwargs=True).remove)
        logits = passes(decoder, _probe(decoder), logits=decoder.stream is None)
    return refused, worst, logits[0] if logits else None


@torch.no_grad()
def check_fold(decoder: Decoder, before: Tensor, storage: torch.dtype | None) -> float:
    """The logits of `refused_folds` against those of the model with every rotation in its weights. Raises UnsupportedError."""
    after = passes(decoder, _probe(decoder))[0]
    bound = rounding(_coarser(decoder.dtype, storage)) * len(decoder.where.blocks) ** 0.5
    if torch.isfinite(before).all() and not (found := off(after, before)) <= bound:
        raise UnsupportedError(
            f"self-check: with value rotations in its weights the model's own logits, without a cache, change by {found:.2g} of "
            f"their size ({bound:.2g} would be rounding); rewrite with fold=False"
        )
    return off(after, before)


def _tried(
    attention: nn.Module, order: int, storage: torch.dtype | None, args: Any, kwargs: dict[str, Any], wanted: Tensor
) -> float | None:
    held = {n: p for n, p in attention.named_parameters() if n in FOLDED}
    kept = {n: p.detach().clone() for n, p in held.items()}
    try:
        fold_value_rotation(attention, order, storage)
        found = _first(attention.forward(*args, **kwargs))
    except Exception:  # a module that cannot be run twice proves nothing
        return None
    finally:
        for name, p in held.items():
            p.copy_(kept[name])
    return off(found, wanted)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def _coarser(kind: torch.dtype, storage: torch.dtype | None) -> torch.dtype:
    """The dtype of fewest bits among that of weights and the one they are stored in."""
    return max([kind, *([storage] if storage is not None else [])], key=lambda kind: torch.finfo(kind).eps)


def _probe(decoder: Decoder) -> list[Given]:
    return [(probe_ids(decoder.model.config, 2, 12, 1), None, None, None)]

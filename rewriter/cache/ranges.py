"""How large keys and values are, and the power of two that brings the codes of very large or very small ones into float16's range.

Formula    size = max over heads and channels of sqrt(mean x²);  e = 0 while 2^-10 <= size <= 2^10, else round(log2 size);
           up to 2^6 for values in steps, as kernels multiply a step by a weight of up to 2^8 in float16
           codes and tables are then of x·2^-e, and what is read back is multiplied by 2^e: both exact
Source     ours: v_proj·s with o_proj / s is the same model, and must cost the same
Differs    models of common sizes have e = 0 and nothing changes; others leave the faster kernels, which say so
Shapes     keys, values [B, H, S, D] → one number each
Raises     KvsinkError from `check_range` for rows of a prompt that the scales cannot hold all the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from kvsink.codecs import Codec, SideSpec
from kvsink.errors import KvsinkError
from kvsink.kernels.quantize import SIGMA_KINDS
from kvsink.model.rows import visual_tokens

if TYPE_CHECKING:
    from kvsink.calibrate.record import Calibration
    from kvsink.model.decoder import Decoder

__all__ = ["RowSizes", "check_range", "exponent", "layer_sizes", "ranged", "seen_sizes"]

LARGE, SMALL = 2.0**10, 2.0**-10
LARGE_STEPS = 2.0**6  # of values that one step and minimum hold
_MOST = 120  # of an exponent: 2^-e stays a normal float32
_TOKENS = 16
_HALF_MAX, _RESOLVED = 65504.0, 2.0**-17  # largest float16; rows below it are lost in steps of 2^-24

Sizes = tuple[float, float]  # of keys and of values


def exponent(size: float, most: float = LARGE) -> int:
    """The power of two that keys or values of this size are divided by; none up to `most`."""
    if size == 0 or SMALL <= size <= most or not math.isfinite(size):
        return 0
    return max(-_MOST, min(_MOST, round(math.log2(size))))


def ranged(spec: SideSpec, size: float, values: bool = False) -> SideSpec:
    """The declaration of a side, the values' or the keys', for rows of this size."""
    most = LARGE_STEPS if values and spec.kind == "uniform" else LARGE
    return replace(spec, exponent=exponent(size, most)) if spec.packed else spec


def seen_sizes(record: Calibration, layer: int) -> Sizes | None:
    """Sizes of a calibrated layer, or None."""
    keys = next((stats for (at, _), stats in record.keys.items() if at == layer), None)
    values = record.values.get(layer)
    if values is None:
        return None
    count = float(values.count)
    one = 0.0 if keys is None else _largest(keys.second, float(keys.count.sum()))
    return one, _largest(values.second, count)


def _largest(second: Tensor, count: float) -> float:
    return float((torch.diagonal(second, dim1=-2, dim2=-1).amax() / max(1.0, count)).sqrt())


def layer_sizes(decoder: Decoder, layers: Iterable[int]) -> dict[int, Sizes]:
    """Sizes in the given layers, of a few tokens that the model is run on; empty where it cannot be run on tokens alone."""
    wanted, model, config = list(layers), decoder.model, decoder.config
    if not wanted or next(model.parameters()).is_meta:
        return {}
    ids = torch.randint(0, config.vocab_size, (_TOKENS * 4,), generator=torch.Generator().manual_seed(0))
    ids = ids[~torch.isin(ids, torch.tensor(visual_tokens(model.config), dtype=ids.dtype))][:_TOKENS]
    cache = DynamicCache(config=config)
    try:
        with torch.no_grad():
            model(input_ids=ids[None].to(decoder.device), use_cache=True, **decoder.given(cache))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return {}  # it asks for more than tokens; `check_range` looks at what it is given
    out: dict[int, Sizes] = {}
    for i in wanted:
        pair = getattr(cache.layers[i], "keys", None), getattr(cache.layers[i], "values", None)
        if all(isinstance(t, Tensor) and t.numel() for t in pair):
            out[i] = tuple(float(t.float().square().mean((0, 2)).amax().sqrt()) for t in pair)  # type: ignore[assignment, union-attr]
    return out


class RowSizes(NamedTuple):
    """The largest |x| of every row of a prompt in one layer, [B, S] of keys and of values. exact: bool [B, S] of such sizes, rows
    that do not matter, asked for only where others would be refused."""

    layer: int
    codec: Codec
    keys: Tensor
    values: Tensor
    exact: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: int, codec: Codec, k: Tensor, v: Tensor, exact: Callable[[Tensor], Tensor]) -> RowSizes:
        """Of keys and values [B, H, S, D]; nothing is waited for."""
        keys, values = (torch.linalg.vector_norm(x.detach(), math.inf, dim=(1, 3)) for x in (k, v))
        return cls(layer, codec, keys, values, exact)


def check_range(prompt: Sequence[RowSizes]) -> None:
    """Raise KvsinkError when rows of a prompt are beyond what float16 scales hold. A GPU is waited for once."""
    sides = [(at, *side) for at in prompt for side in (("keys", at.codec.key, at.keys), ("values", at.codec.value, at.values))]
    sides = [side for side in sides if side[2].packed]
    rows = [sizes.to(sides[0][3].device) for *_, sizes in sides]
    found = torch.stack(rows).amax((1, 2)).tolist() if rows else []  # of one pass, so all [B, S]
    for (at, name, side, sizes), most in zip(sides, found, strict=True):
        if _holds(side, most):
            continue
        most = float(sizes.masked_fill(at.exact(sizes), 0.0).amax())
        if not _holds(side, most):
            above = most * 2.0**-side.exponent > 1
            bound = (_HALF_MAX if above else _RESOLVED) * 2.0**side.exponent
            raise KvsinkError(
                f"layer {at.layer}: {name} of this prompt reach {most:.3g}, {'above' if above else 'below'} the {bound:.3g} that "
                "the float16 scales of their codes hold; rewrite the model with calibration text like it, or with "
                f"{name[:-1]}_bits=16"
            )


def _holds(side: SideSpec, most: float) -> bool:
    size = most * 2.0**-side.exponent
    return not size > _HALF_MAX and (size == 0 or side.kind in SIGMA_KINDS or not size < _RESOLVED)

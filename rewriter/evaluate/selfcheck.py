"""A rewrite proves itself before anything is kept: against the stock model and its stock cache, in seconds.

Formula    fold    every attention module puts out the same with its value rotation folded into its weights as without, and the
                   whole model, without a cache, the same logits with all of them
           keys    the codec of each layer with 8-bit codes in place of its own, fed one prompt, reads back the stock cache's rows
           exact   the packed cache with nothing coded gives the stock cache's logits, for a prompt in chunks, one row left-padded
           coded   the same with 8-bit codes
           step    three compiled steps give the logits of the same steps uncompiled; each attends to what those before have coded
           all as |difference| / |stock| in the Euclidean norm; logits per token, a row counts by its median
Source     ours
Shapes     ids int64 [2, 27] and more, 5 tokens of padding before the first row; logits count behind the first chunk, whose
           rows are exact
Raises     UnsupportedError naming the layer or the stage, what was found and the bound it had to keep
Cost       some 200 tokens through the model; by layers (`Stream`), four passes over the checkpoint's weights
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvsink.cache.cache import KVSinkCache
from kvsink.calibrate.probing import probe_ids
from kvsink.calibrate.streaming import Job
from kvsink.codecs import Codec, SideSpec
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.kernels.read import read_ref
from kvsink.model.decoder import Decoder
from kvsink.model.runtime import Runtime

__all__ = ["Check", "at_eight_bits", "check_cache", "off", "passes", "rounding"]

CHUNKS = (20, 6, 1)  # the first grows with the rows that a codec keeps as they came
PADDING = 5
MOST_KEPT = 512  # protected rows that the prompt is made longer for, so that coded ones stand behind them
ROWS_OFF = 0.05  # of keys and values at 8 bits: the step of a range of 6 to 10 deviations gives 0.007 to 0.012
LOGITS_OFF = 0.15  # at 8 bits; a wrong turning, head or mask gives 0.3 and more


@dataclass
class Check:
    """What a rewrite showed of itself; differences relative to the stock model, None where a part did not run."""

    fold: float | None = None
    folded: float | None = None
    keys: float | None = None
    values: float | None = None
    exact: float | None = None
    coded: float | None = None
    step: float | None = None
    skipped: str = ""
    online: dict[int, str] = field(default_factory=dict)  # layers whose value rotation could not be folded, and why

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        if self.skipped:
            return f"NOT CHECKED ({self.skipped})"
        names = {
            "fold": "attention with folded values",
            "folded": "logits with all of them, without a cache",
            "keys": "keys at 8 bits",
            "values": "values at 8 bits",
            "exact": "logits with nothing coded",
            "coded": "logits at 8 bits",
            "step": "compiled step",
        }
        parts = [f"{text} {found:.2g}" for name, text in names.items() if (found := getattr(self, name)) is not None]
        return "checked, largest relative difference from the stock model: " + ", ".join(parts)


def rounding(dtype: torch.dtype) -> float:
    """The relative difference that two ways of computing one thing in a dtype may show."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps > 1e-5 else 256 * eps


def off(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where one is not finite."""
    apart = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
    return apart if apart == apart else float("inf")


# -- the cache ---------------------------------------------------------------------------------------------------------


def at_eight_bits(codec: Codec) -> Codec:
    """The codec with every stage but its quantizers, which are 8 bits with one range per token, or per channel of a block.

    Keys whose components are of very unequal size and weight have a number of 16 bits each: one range would drown the
    weak ones, which the inverse makes large again.
    """

    def side(s: SideSpec) -> SideSpec:
        if not s.packed:
            return s
        dim = 8 * len(s.widths) if s.widths else 0
        widths = (8,) * len(s.widths) if dim else ()
        return replace(
            s,
            kind="uniform",
            bits=8.0,
            widths=widths,
            clip=1.0,
            group_size=1 if s.own_inverse and s.spread == "none" else s.group_size,
            gain=False,
            unbiased=False,
            flat=False,
            visual_bits=0,
            visual_clip=1.0,
            couple=0,
            code_bits=0,
            shared=False,
            outliers=0.0,
            weights="none",
        )

    return replace(codec, key=side(codec.key), value=side(codec.value), strict=False, tiles=False)


def _exact(codec: Codec) -> Codec:
    return replace(codec, key=SideSpec(), value=SideSpec(), segments=(), window=0, strict=False, tiles=False, anchors=None)


def _like(runtime: Runtime, change: Callable[[Codec], Codec], segments: bool) -> Runtime:
    """The runtime with other codecs; its tables and modules are shared."""
    plans = []
    for plan, (_, kv, key_dim, value_dim) in zip(runtime.plans, runtime.anatomy.layers, strict=True):
        if plan.codec is None:
            plans.append(plan)
            continue
        codec = change(plan.codec)
        codec = replace(codec, key=codec.key.resolved(kv, key_dim), value=codec.value.resolved(kv, value_dim))
        plans.append(replace(plan, codec=codec, segments=plan.segments if segments else ()))
    other = copy.copy(runtime)
    other.plans, other._orders, other._tiles = tuple(plans), {}, {}
    return other


@torch.no_grad()
def check_cache(decoder: Decoder, runtime: Runtime) -> Check:
    """Compare the packed cache of a rewritten model with transformers' own. Raises UnsupportedError at the first fault."""
    where, check = runtime.anatomy, Check()
    ring = max((p.codec.ring for p in runtime.plans if p.codec is not None), default=0)
    kept = max((p.codec.exact_rows for p in runtime.plans if p.codec is not None), default=0)
    chunks = (CHUNKS[0] + 2 * ring + min(kept, MOST_KEPT), *CHUNKS[1:])
    limit = getattr(runtime.config.get_text_config(decoder=True), "max_position_embeddings", None) or sum(chunks)
    if where.rotary is None:  # positions may stand in a table that ends
        chunks = (min(chunks[0], max(1, limit - sum(CHUNKS[1:]))), *CHUNKS[1:])
    ids, device = probe_ids(runtime.config, 2, sum(chunks), 2), decoder.device
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    anchored = any(p.codec is not None and p.codec.anchors is not None for p in runtime.plans)
    caches: list[Any] = [
        DynamicCache(config=runtime.config.get_text_config(decoder=True)),
        KVSinkCache(_like(runtime, at_eight_bits, True)),
        *([] if anchored else [KVSinkCache(_like(runtime, _exact, False))]),
    ]
    rows: list[list[Tensor]] = [[] for _ in caches]
    at = 0
    for chunk in chunks:
        end = at + chunk
        given = [(ids[:, at:end].to(device), mask[:, :end].to(device), positions[:, at:end].to(device), c) for c in caches]
        for found, logits in zip(rows, passes(decoder, given), strict=True):
            found.append(logits)
        if any(int(layer.length) != end for layer in caches[1].packed_layers() if not layer.is_sliding):
            raise UnsupportedError(
                f"self-check: {type(decoder.model).__name__} stores other rows than those of its tokens, such as a prompt of "
                "its own; it is left as it is"
            )
        if not at:
            _check_rows(runtime, caches[0], caches[1], mask[:, :end].bool().to(device), check)
        at = end
    wanted = torch.cat(rows[0][1:], 1)
    dtype = decoder.dtype if decoder.stream is None else torch.float32
    check.coded = _check_logits("8-bit codes", torch.cat(rows[1][1:], 1), wanted, LOGITS_OFF)
    if not anchored:
        loose = max(rounding(dtype) * len(where.blocks) ** 0.5, 1e-3 if dtype == torch.float32 else 0.0)
        check.exact = _check_logits("nothing coded", torch.cat(rows[2][1:], 1), wanted, min(loose, LOGITS_OFF))
    return check


def _check_logits(what: str, found: Tensor, wanted: Tensor, bound: float) -> float | None:
    """The larger median of the two rows. A row that is no number on the stock cache either is no oracle; None where both are."""
    medians = []
    for name, mine, stock in zip(("left-padded", "full"), found.double(), wanted.double(), strict=True):
        if not torch.isfinite(stock).all():
            continue
        apart = (mine - stock).norm(dim=-1) / stock.norm(dim=-1).clamp_min(1e-30)
        medians.append(float(apart.nan_to_num(float("inf")).median()))
        if not medians[-1] <= bound:
            raise UnsupportedError(
                f"self-check: logits over the packed cache with {what} are {medians[-1]:.2g} of their size off the stock cache's "
                f"in the {name} row of a prompt in chunks ({bound:.2g} would be rounding); leave this model as it is"
            )
    return max(medians, default=None)


def _check_rows(runtime: Runtime, stock: Any, packed: KVSinkCache, real: Tensor, check: Check) -> None:
    """Keys and values of each layer, read back, against the stock cache's."""
    worst = {"keys": 0.0, "values": 0.0}
    for layer in packed.packed_layers():
        held = stock.layers[layer.layer]
        codec = replace(layer.codec, strict=True)
        none_k = layer.exact_k.new_zeros(layer.batch_size, layer.num_heads, 0, layer.head_dim)
        none_v = layer.exact_v.new_zeros(layer.batch_size, layer.num_heads, 0, layer.value_dim)
        keys, values = read_ref(none_k, none_v, layer.state(), layer.params, codec.text())
        if layer.order is not None:
            keys = keys.index_select(-1, layer.order[1])
        count = min(held.keys.shape[2], int(layer.length))
        end = int(layer.length)
        seen = real[:, end - count : end]
        for name, mine, theirs in (("keys", keys, held.keys), ("values", values, held.values)):
            mine, theirs = mine[:, :, end - count : end], theirs[:, :, -count:]
            seen = seen & torch.isfinite(theirs).all((1, 2, 3))[:, None]  # a row that is no number is no oracle
            found = off(mine.transpose(1, 2)[seen], theirs.transpose(1, 2)[seen])
            if not found <= ROWS_OFF:
                side = describe_side(layer.codec, name)
                raise UnsupportedError(
                    f"self-check: layer {layer.layer} ({runtime.anatomy.attentions[layer.layer]}): {name} read back at 8 bits are "
                    f"{found:.2g} of their size off the stock cache's ({ROWS_OFF:g} is the most that rounding gives; {side}); "
                    "use --method rtn, or leave the model as it is"
                )
            worst[name] = max(worst[name], found)
    check.keys, check.values = worst["keys"], worst["values"]


def describe_side(codec: Codec, name: str) -> str:
    """Stages of one side that can be wrong for a model, in words."""
    side = codec.key if name == "keys" else codec.value
    stages = [side.domain if side.domain == "post" else f"block {side.block}", side.transform]
    return ", ".join(["centred", *stages] if side.center else stages)


Given = tuple[Tensor, "Tensor | None", "Tensor | None", Any]  # ids, mask, positions, cache


def passes(decoder: Decoder, given: Sequence[Given], logits: bool = True) -> list[Tensor]:
    """One pass of a model over each of the inputs: their logits [B, S, V]. Raises UnsupportedError where it cannot be run."""
    model, stream = decoder.model, decoder.stream
    out: list[Tensor] = []
    if stream is not None:
        jobs = [Job(ids.to(stream.device), cache, positions=at, mask=mask) for ids, mask, at, cache in given]
        stream.run(jobs, logits=(lambda _, found: out.append(found)) if logits else None)
        return out
    takes = _names(model.forward)
    training = model.training
    model.eval()
    try:
        for ids, mask, at, cache in given:
            more: dict[str, Any] = {"use_cache": cache is not None}
            more |= {} if cache is None else decoder.given(cache)
            more |= {n: t for n, t in (("attention_mask", mask), ("position_ids", at)) if t is not None and n in takes}
            out.append(model(input_ids=ids.to(decoder.device), **more).logits)
    except KvsinkError:
        raise
    except Exception as error:  # whatever a model raises on a cache it cannot use
        raise UnsupportedError(
            f"self-check: {type(model).__name__} cannot be run on a padded prompt in chunks ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); it is left as it is"
        ) from error
    finally:
        model.train(training)
    return out


def _names(forward: Callable[..., Any]) -> set[str]:
    found = set(inspect.signature(forward).parameters)
    return found | {"attention_mask", "position_ids"} if "kwargs" in found else found

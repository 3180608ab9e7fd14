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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvsink.cache.cache import KVSinkCache
from kvsink.calibrate.probing import probe_ids
from kvsink.calibrate.streaming import Job, Stream
from kvsink.codecs import Codec, SideSpec
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.kernels.read import read_ref
from kvsink.model.fold import FOLDED, fold_value_rotation
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Anatomy, Runtime, number_of

__all__ = ["Check", "at_eight_bits", "check_cache", "check_fold", "check_step", "refused_folds", "rounding"]

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
            "fold": "attention with folded values", "folded": "logits with all of them, without a cache",
            "keys": "keys at 8 bits", "values": "values at 8 bits",
            "exact": "logits with nothing coded", "coded": "logits at 8 bits", "step": "compiled step",
        }  # fmt: skip
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


# -- folding -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refused_folds(
    model: nn.Module, where: Anatomy, orders: Mapping[int, int], storage: torch.dtype | None, stream: Stream | None = None
) -> tuple[dict[int, str], float, Tensor | None]:
    """Layers whose value rotation of order `orders[layer]` cannot go into the weights, each with the reason, the largest
    difference of the others, and the logits [2, 12, V] of the model as it is (None by layers), for `check_fold`. Every layer is
    tried on its own: folded, run again on the same input, and put back."""
    refused: dict[int, str] = {i: "other layers read its values" for i in orders if i in where.apart}
    worst = 0.0

    def tried(layer: int) -> Callable[..., None]:
        def hook(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal worst
            found = _tried(attention, orders[layer], storage, args, kwargs, _first(output))
            bound = rounding(_coarsest(attention, storage))
            if found is None or not found <= bound:
                what = "it cannot be run alone" if found is None else f"its output changes by {found:.2g} of its size"
                refused[layer] = f"{what}: something stands between its values and the projection behind them"
            else:
                worst = max(worst, found)

        return hook

    with ExitStack() as stack:
        for layer in orders.keys() - refused.keys():
            module = model.get_submodule(where.attentions[layer])
            stack.callback(module.register_forward_hook(tried(layer), with_kwargs=True).remove)
        logits = _run(model, where, stream, [(probe_ids(model, 2, 12, 1), None, None, None)], logits=stream is None)
    return refused, worst, logits[0] if logits else None


@torch.no_grad()
def check_fold(model: nn.Module, where: Anatomy, before: Tensor, storage: torch.dtype | None) -> float:
    """The logits of `refused_folds` against those of the model with every rotation in its weights. Raises UnsupportedError."""
    after = _run(model, where, None, [(probe_ids(model, 2, 12, 1), None, None, None)])[0]
    bound = rounding(_coarsest(model, storage)) * len(where.blocks) ** 0.5
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


def _coarsest(attention: nn.Module, storage: torch.dtype | None) -> torch.dtype:
    """The dtype of fewest bits among the weights and what they are stored in."""
    kinds = [number_of(attention).dtype, *([storage] if storage is not None else [])]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


# -- the cache ---------------------------------------------------------------------------------------------------------


def at_eight_bits(codec: Codec) -> Codec:
    """The codec with every stage but its quantizers, which are 8 bits with one range per token, or per channel of a block."""

    def side(s: SideSpec) -> SideSpec:
        if not s.packed:
            return s
        dim = 8 * len(s.widths) if s.widths else 0
        widths = (8,) * len(s.widths) if dim else ()
        return replace(
            s, kind="uniform", bits=8.0, widths=widths, clip=1.0, gain=False, visual_bits=0, visual_clip=1.0, couple=0, code_bits=0,
            shared=False, outliers=0.0, weights="none",
        )  # fmt: skip

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
def check_cache(model: nn.Module, runtime: Runtime, stream: Stream | None = None) -> Check:
    """Compare the packed cache of a rewritten model with transformers' own. Raises UnsupportedError at the first fault."""
    where, check = runtime.anatomy, Check()
    ring = max((p.codec.ring for p in runtime.plans if p.codec is not None), default=0)
    kept = max((p.codec.exact_rows for p in runtime.plans if p.codec is not None), default=0)
    chunks = (CHUNKS[0] + 2 * ring + min(kept, MOST_KEPT), *CHUNKS[1:])
    limit = getattr(runtime.config.get_text_config(decoder=True), "max_position_embeddings", None) or sum(chunks)
    if where.rotary is None:  # positions may stand in a table that ends
        chunks = (min(chunks[0], max(1, limit - sum(CHUNKS[1:]))), *CHUNKS[1:])
    ids, device = probe_ids(model, 2, sum(chunks), 2), _device(model, stream)
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
        for found, logits in zip(rows, _run(model, where, stream, given), strict=True):
            found.append(logits)
        if any(int(layer.length) != end for layer in caches[1].packed_layers() if not layer.is_sliding):
            raise UnsupportedError(
                f"self-check: {type(model).__name__} stores other rows than those of its tokens, such as a prompt of its own; "
                "it is left as it is"
            )
        if not at:
            _check_rows(runtime, caches[0], caches[1], mask[:, :end].bool().to(device), check)
        at = end
    wanted = torch.cat(rows[0][1:], 1)
    dtype = number_of(model).dtype if stream is None else torch.float32
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


def _device(model: nn.Module, stream: Stream | None) -> torch.device:
    return place_of(model) if stream is None else stream.device


Given = tuple[Tensor, "Tensor | None", "Tensor | None", Any]  # ids, mask, positions, cache


def _run(model: nn.Module, where: Anatomy, stream: Stream | None, given: Sequence[Given], logits: bool = True) -> list[Tensor]:
    """One pass over each of the inputs: their logits [B, S, V]."""
    out: list[Tensor] = []
    if stream is not None:
        jobs = [Job(ids.to(stream.device), cache, positions=at, mask=mask) for ids, mask, at, cache in given]
        stream.run(jobs, logits=(lambda _, found: out.append(found)) if logits else None)
        return out
    takes = _names(model)
    training = model.training
    model.eval()
    try:
        for ids, mask, at, cache in given:
            more: dict[str, Any] = {"use_cache": cache is not None}
            more |= {} if cache is None else given_cache(model, cache)
            more |= {n: t for n, t in (("attention_mask", mask), ("position_ids", at)) if t is not None and n in takes}
            out.append(model(input_ids=ids.to(_device(model, None)), **more).logits)
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


def _names(model: nn.Module) -> set[str]:
    import inspect

    found = set(inspect.signature(model.forward).parameters)
    return found | {"attention_mask", "position_ids"} if "kwargs" in found else found


# -- the compiled step ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_step(model: nn.Module, runtime: Runtime, notes: list[str]) -> float | None:
    """Steps of the compiled model against the same steps uncompiled, over two caches of a fixed length filled alike.

    The graph runs operator by operator: what is checked is what the passes made of it. It holds the first layers of the model, as
    many as it takes to have one of every kind. Where it cannot be run at all, a note is left. Raises UnsupportedError.
    """
    dtype = number_of(model).dtype
    with _first_layers(model, runtime.anatomy, _one_of_each(runtime)):
        try:
            plain, compiled = _steps(model)
        except KvsinkError:
            raise
        except Exception as error:  # a model that wants a mask of its own over a cache of a fixed length
            notes.append(
                f"a compiled step was not checked: {type(error).__name__}: {' '.join(str(error).split())[:160]}; leave "
                "compile_config and torch.compile out"
            )
            return None
    apart = off(compiled, plain)
    bound = max(rounding(dtype) * len(runtime.plans) ** 0.5, 1e-3 if dtype == torch.float32 else 0.0)
    if not apart <= bound:
        raise UnsupportedError(
            f"self-check: a compiled step gives logits {apart:.2g} of their size off the same step uncompiled ({bound:.2g} would "
            "be rounding); leave this model as it is, or rewrite it with --no-check and do not compile it"
        )
    return apart


def _steps(model: nn.Module) -> list[Tensor]:
    """Logits of the last of three steps behind a prompt of eight tokens, uncompiled and compiled."""
    ids = probe_ids(model, 1, 11, 3).to(place_of(model))
    found = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}, dynamic=False)
    for step in (model, compiled):
        cache = KVSinkCache.for_model(model, 1, 256)
        model(input_ids=ids[:, :8], use_cache=True, **given_cache(model, cache))
        for at in range(8, 11):
            logits = step(input_ids=ids[:, at : at + 1], use_cache=True, **given_cache(model, cache)).logits
        found.append(logits)
    torch._dynamo.reset()
    return found


def _one_of_each(runtime: Runtime) -> int:
    """Layers from the first on that show every kind: of layer, heads, turning, codec but for its widths, and sources of rows."""
    seen, last = set(), 0
    where = runtime.anatomy
    for i, plan in enumerate(runtime.plans):
        codec = None if plan.codec is None else at_eight_bits(plan.codec)
        sources = tuple(dict.fromkeys(s.source.partition(":")[0] for s in plan.segments))
        kinds = tuple(s.kind for s in (plan.codec.key, plan.codec.value)) if plan.codec is not None else ()
        kind = where.layer_types[i], where.layers[i], where.turnings[i], codec and replace(codec, segments=()), sources, kinds
        if kind not in seen:
            seen.add(kind)
            last = i
    return last + 1


@contextmanager
def _first_layers(model: nn.Module, where: Anatomy, count: int) -> Iterator[None]:
    """The model with its first layers alone, where they stand in one list and a pass over them goes through."""
    path = where.blocks[0].rpartition(".")[0]
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList) or count >= len(blocks) or len(blocks) != len(where.blocks):
        yield
        return
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, blocks[:count])
    try:
        try:
            model(input_ids=probe_ids(model, 1, 2), use_cache=False)
        except Exception:  # a model that counts its layers elsewhere runs whole
            setattr(model.get_submodule(owner), name, blocks)
        yield
    finally:
        setattr(model.get_submodule(owner), name, blocks)

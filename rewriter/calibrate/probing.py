"""What a model's layers store, found by running it: shapes of keys and values, who reads them, how keys turn with position.

Formula    sequences of one token, all at one position p: each attends to itself alone, so that nothing but RoPE depends on p in any
           layer, and the keys at p are those at 0, turned. `kvsink.model.turning` finds the turning that does it
Source     ours
Shapes     ids int64 [N, 1]; keys of a layer [N, H, 1, D]
Raises     UnsupportedError for a model that keeps its past in a cache of its own class, or cannot be run on tokens alone
Cost       four passes of 16 tokens; by layers (`Stream`), two passes over the checkpoint's weights
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvsink.calibrate.streaming import Job, Stream
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.model.anatomy import Anatomy, Heads
from kvsink.model.attention import NOTES, install_attention
from kvsink.model.decoder import Decoder
from kvsink.model.passing import cache_of, given_cache
from kvsink.model.rows import visual_tokens
from kvsink.model.turning import NONE, Turning, find_turning, rotary_tables

__all__ = ["check", "look", "probe_ids", "unknown_turnings"]

TOKENS = 16
_HYBRID = {"LinearAttentionAndFullAttentionLayer": "hybrid", "LinearAttentionAndSlidingWindowAttentionLayer": "hybrid_sliding"}
POSITIONS = (0, 1, 7, 43)


@dataclass
class _Seen:
    """Who attended to the keys and values that one layer handed out in a pass."""

    readers: list[nn.Module] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    as_given: bool = True


@dataclass
class _Layer:
    """One layer of transformers' cache after a pass: its keys and values [N, H, 1, D], or None where it holds none."""

    keys: Tensor | None
    values: Tensor | None
    kind: str
    indexed: bool


def check(decoder: Decoder, known: bool = False) -> list[str]:
    """Look at a model that is to be rewritten; what a report is to say of it. known: an earlier look has found its anatomy.

    Raises UnsupportedError where it cannot be rewritten.
    """
    earlier = decoder.runtime
    if earlier is not None and any(p.codec is not None and p.codec.value.folded for p in earlier.plans):
        raise UnsupportedError(
            f"this model has been rewritten by {earlier.method}, which turned its value weights; load the model again, or "
            "rewrite the first time with fold=False"
        )
    notes = [
        f"{name}: {count} attention layers are left alone, an encoder attends over its input at once and keeps no cache"
        for name, count in decoder.where.towers
    ]
    if not known:
        decoder.where = look(decoder)
    if unknown := unknown_turnings(decoder.where):
        kept = [NONE if t is None else t for t in decoder.where.turnings]
        decoder.where = replace(decoder.where, turnings=tuple(kept))
        notes.append(
            f"keys of layers {unknown} turn with position in a way that is not known here: they are coded as they are turned"
        )
    return notes


@torch.no_grad()
def look(decoder: Decoder) -> Anatomy:
    """The anatomy of a model with what a look at its keys adds: heads and widths, turnings, layers without keys of their own."""
    model, where, stream = decoder.model, decoder.where, decoder.stream
    install_attention()
    base = _taking_tokens(decoder)
    ids = probe_ids(model.config, TOKENS).to(decoder.device)
    limit = getattr(decoder.config, "max_position_embeddings", None) or POSITIONS[-1] + 1
    positions = [p for p in POSITIONS if p < limit] if where.rotary is not None else [0]
    seen: dict[int, _Seen] = {}
    if stream is None:
        _check_own_cache(decoder, base, ids[:1])
    training = model.training
    model.eval()
    try:
        found = [_pass(decoder.config, base, ids, p, seen if p == 0 else None, stream) for p in positions]
    except KvsinkError:
        raise
    except Exception as error:  # whatever a model raises that wants more than tokens
        raise UnsupportedError(
            f"{type(model).__name__} cannot be run on tokens alone ({' '.join(str(error).split())[:160]}), so nothing about its "
            "cache can be known; it is left as it is"
        ) from error
    finally:
        model.train(training)
    count = len(where.attentions)
    if any(layer.keys is not None for layer in found[0][count:]):
        raise UnsupportedError(
            f"{type(model).__name__} keeps rows of {len(found[0])} layers for its {count} attention modules, which packed layers "
            "cannot stand in for; it is left as it is"
        )
    found = [(layers + [_Layer(None, None, "", False)] * count)[:count] for layers in found]  # 5.17 leaves shared layers out
    at = {model.get_submodule(name): i for i, name in enumerate(where.attentions)}
    readers = {i: [next((at[m] for m in _around(decoder, r) if m in at), -1) for r in s.readers] for i, s in seen.items()}
    asking = bool(getattr(model, "_supports_attention_backend", False)) and decoder.config._attn_implementation == "sdpa"
    layers: list[Heads] = []
    turnings: list[Turning | None] = []
    absent: list[str] = []
    apart: set[int] = set()
    for i, usual in enumerate(where.layers):
        first = found[0][i]
        absent.append(_absent(first, i, readers, type(model.get_submodule(where.attentions[i])).__name__))
        if first.keys is None or first.values is None:
            layers.append(usual)
            turnings.append(NONE)
            continue
        query = next(iter(seen[i].queries), usual.query) if i in seen else usual.query
        layers.append(Heads(query, first.keys.shape[1], first.keys.shape[3], first.values.shape[3]))
        turnings.append(_turning(decoder, i, [p[i].keys for p in found], positions))
        asks = seen.get(i)
        silent = not asks.readers and asking if asks is not None else False
        odd = asks is not None and bool(readers[i]) and (not asks.as_given or readers[i] != [i])
        if silent or odd or first.keys.shape[3] != first.values.shape[3]:
            apart.add(i)
    kinds = tuple(_HYBRID.get(f.kind, kind) for f, kind in zip(found[0], where.layer_types, strict=True))
    return replace(
        where, layers=tuple(layers), turnings=tuple(turnings), absent=tuple(absent), apart=frozenset(apart), layer_types=kinds
    )


def unknown_turnings(where: Anatomy) -> list[int]:
    """Layers whose keys are turned in a way that was not recognised."""
    return [i for i, t in enumerate(where.turnings) if t is None]


def probe_ids(whole: Any, rows: int, length: int = 1, seed: int = 0) -> Tensor:
    """Token ids int64 [rows, length] from all over the vocabulary, none of which stands for a picture. whole: a model's config."""
    config, generator = whole.get_text_config(decoder=True), torch.Generator().manual_seed(seed)
    ids = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, (rows, length), generator=generator)
    taken = torch.tensor([*visual_tokens(whole), -1])
    special = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")]
    spare = next(t for t in range(config.vocab_size) if t not in taken.tolist() and t not in special)
    return torch.where(torch.isin(ids, taken), spare, ids)


def _check_own_cache(decoder: Decoder, base: nn.Module, ids: Tensor) -> None:
    """Refuse a model that makes itself a cache of another class than transformers' own."""
    made: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made.append(cache_of(output))

    handle = base.register_forward_hook(note)
    try:
        base(input_ids=ids, use_cache=True)
    except Exception:  # said below, where the model is run as it is to be run
        return
    finally:
        handle.remove()
    own = next((c for c in made if c is not None), None)
    if own is not None and not type(own).__module__.startswith("transformers.cache_utils"):
        raise UnsupportedError(
            f"{type(decoder.model).__name__} keeps its past in a {type(own).__name__} of its own, which packed layers cannot stand "
            "in for; it is left as it is"
        )


def _pass(
    config: Any, base: nn.Module, ids: Tensor, position: int, seen: dict[int, _Seen] | None, stream: Stream | None
) -> list[_Layer]:
    """One pass of single tokens at one position over transformers' own cache. config: of the decoder."""
    cache = DynamicCache(config=config)
    if seen is not None:
        for i, layer in enumerate(cache.layers):
            if hasattr(layer, "update"):
                layer.update = _noting(layer.update, seen.setdefault(i, _Seen()))
    at = torch.full_like(ids, position)
    if stream is not None:
        stream.run([Job(ids, cache, positions=at)])
    else:
        given: dict[str, Any] = {"use_cache": True, **given_cache(base, cache)}
        if position or _takes(base, "position_ids"):
            given["position_ids"] = at
        base(input_ids=ids, **given)
    return [_held(layer) for layer in cache.layers]


def _held(layer: Any) -> _Layer:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    full = isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4 and keys.numel() > 0
    return _Layer(keys if full else None, values if full else None, type(layer).__name__, hasattr(layer, "update_indexer"))


def _noting(update: Any, seen: _Seen) -> Any:
    """`update` of a layer whose keys tell when attention is asked for them."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        keys, values = update(*args, **kwargs)
        if keys is None:
            return keys, values
        keys = keys.view_as(keys)

        def note(module: nn.Module, query: Tensor, value: Tensor) -> None:
            seen.readers.append(module)
            seen.queries.append(query.shape[1])
            seen.as_given &= value is values

        NOTES.leave(keys, note)
        return keys, values

    return noted


def _taking_tokens(decoder: Decoder) -> nn.Module:
    """The innermost module around the decoder blocks that can be called with token ids."""
    model, name = decoder.model, decoder.where.base
    parts = name.split(".") if name else []
    around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), 0, -1)]
    return next((m for m in around if _takes(m, "input_ids")), model)


def _around(decoder: Decoder, module: nn.Module) -> list[nn.Module]:
    """A module and those that hold it, innermost first."""
    model = decoder.model
    name = next((n for n, m in model.named_modules() if m is module), "")
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), 0, -1)] if name else []


def _takes(base: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(base.forward).parameters


def _absent(layer: _Layer, index: int, readers: dict[int, list[int]], attention: str) -> str:
    """Why a layer has no keys and values that could be packed, or an empty string. attention: the name of its class."""
    if layer.keys is not None and _HYBRID.get(layer.kind) == "hybrid_sliding":
        return "hybrid: a sliding window beside a recurrent state, kept in 16 bit"
    if layer.keys is not None and layer.indexed:
        return "sparse attention: an index of its keys stands beside them, kept in 16 bit"
    if layer.keys is not None:
        return ""
    source = next((i for i, found in readers.items() if i != index and index in found), None)
    if source is not None:
        return f"shared: it reads the keys and values of layer {source}"
    if "Linear" in layer.kind or "Mamba" in layer.kind:
        return "linear attention: its state does not grow with the length, passed through"
    if "Cross" in attention:
        return "cross attention: its keys and values are those of another input, kept as they are"
    return "none: it stores no keys and values"


def _turning(decoder: Decoder, layer: int, keys: list[Tensor | None], positions: list[int]) -> Turning | None:
    where = decoder.where
    rows = [k[:, :, 0].double() for k in keys if k is not None]
    if where.rotary is None or len(rows) < 2:
        return NONE
    rotary = decoder.model.get_submodule(where.rotary)
    tables = []
    for p in positions[1:]:  # one at a time: angles may depend on the largest position asked for
        try:
            cos, sin = rotary_tables(rotary, torch.tensor([[p]], device=rows[0].device), where.layer_types[layer])
        except (KeyError, AttributeError):  # no angles for layers of this kind
            break
        tables.append((cos[0, 0], sin[0, 0]))
    coarse = max(torch.finfo(decoder.dtype).eps, torch.finfo(torch.float32).eps)
    return find_turning(rows[0], rows[1:], tables, min(0.1, 16 * coarse))

"""What a rewritten model carries: the plan of each layer, its tables, and the hooks that tell a cache what it cannot see.

A cache receives keys after RoPE and values, nothing else. The hooks add, for one forward pass: the true positions and
angles of the new rows, which of them are padding, and the candidates for exact rows that the emergence blocks reveal.
They do nothing for any other cache, and `torch.compile` traces through them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvsink.codecs import Codec
from kvsink.codecs.protect import Segment, SinkStage
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.kernels import select_sinks
from kvsink.kernels.layout import TileTables, key_rows
from kvsink.kernels.selection import top_rows
from kvsink.model.attention import causal_mask
from kvsink.model.observed import Observer, switch_attention
from kvsink.model.offload import place_of
from kvsink.model.turning import Turning, tables_of

__all__ = [
    "Anatomy", "Frame", "Heads", "LayerPlan", "Runtime", "anatomy", "attach", "check_kind", "detach", "number_of",
    "rotary_tables", "runtime_of", "turns_back",
]  # fmt: skip

_FIRST_SCORE = 1e30  # above any activation: rows of `first:N` always win
_HIDDEN = -1000.0  # an additive mask hides from here down: exp(-1000) is 0 in float64


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer stores: its codec and the sources of its exact rows. `reason` says why it is left alone."""

    codec: Codec | None
    segments: tuple[Segment, ...] = ()
    reason: str = ""


@dataclass
class Frame:
    """What one forward pass knows about its new rows; lives from the start of the base model to its end."""

    positions: Tensor | None = None  # [B or 1, S]
    cos: Tensor | None = None  # [B or 1, S, R]
    sin: Tensor | None = None
    valid: Tensor | None = None  # [B, S], False at padding
    visual: Tensor | None = None  # [B, S], True at image and video tokens
    candidates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    start: Any = None  # rows held before this pass, int or a tensor; None where nobody asks
    anchored: bool = False  # the anchors of codes in tiles have been seen to
    reach: tuple[Tensor, int, float] | None = None  # positions that were looked at, and what a cache found
    asks: bool | None = None  # `Runtime.asks`, looked up once
    before: int | None = None
    begun: set[int] = field(default_factory=set)  # layers that have asked whether they begin
    roomy: bool = False  # sliding layers have made room for the new rows
    sizes: list[Any] = field(default_factory=list)  # `ranges.RowSizes` that the end of the pass looks at
    order: Tensor | None = None  # [B or 1, S], the number of every row among the real ones of its sequence
    marked: dict[bool, bool] = field(default_factory=dict)  # caches, sliding or not, that have noted `valid`
    one_axis: bool = False  # positions and angles are those of one axis of several, and stay so

    def rows_before(self) -> int:
        """`start` as a number; a GPU is asked once."""
        if self.before is None:
            self.before = int(self.start)
        return self.before


class Heads(NamedTuple):
    """What one layer's attention works on: query heads, heads and widths of its keys and values."""

    query: int
    kv: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Entries of keys and values per token."""
        return self.kv * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Anatomy:
    """The modules of a decoder that the hooks stand on, by name, and what each layer stores.

    turnings: how each layer turns its keys; None as 0.1 assumed it, by all channels of its tables in halves. absent: why a layer
    keeps no keys and values that could be packed; empty where it does. apart: layers whose keys and values are not read by one
    call of their own attention alone, so that they have to be handed out whole.
    """

    base: str
    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    rotary: str | None
    layers: tuple[Heads, ...]
    layer_types: tuple[str, ...]
    turnings: tuple[Turning | None, ...]
    absent: tuple[str, ...]
    apart: frozenset[int] = frozenset()

    @property
    def heads(self) -> int:
        """Query heads of the first layer."""
        return self.layers[0].query

    @property
    def kv_heads(self) -> int:
        """Key and value heads of the first layer."""
        return self.layers[0].kv

    @property
    def head_dim(self) -> int:
        """Width of a key of the first layer."""
        return self.layers[0].key_dim

    @property
    def even(self) -> bool:
        """Whether all layers have the same heads, and values as wide as keys."""
        return len(set(self.layers)) == 1 and self.layers[0].key_dim == self.layers[0].value_dim


def anatomy(model: nn.Module) -> Anatomy:
    """Find the decoder blocks and attention modules of a causal language model.

    Raises UnsupportedError for models without them, naming the modules that were seen.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models have a cache kvsink can rewrite"
        )
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        kind = type(module).__name__
        if isinstance(index, int) and "ttention" in kind and not kind.endswith("Layer") and not is_tower(name) and "." in name:
            nested = any(name.startswith(other + ".") for other in found.values())
            if not nested:
                found.setdefault(index, name)
    attending = frozenset(found)
    for name, module in model.named_modules():  # hybrid models: the mixers of layers that have no attention
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "vision" not in name and "." in name and found:
            found.setdefault(index, name)
    if not found or sorted(found) != list(range(len(found))):
        kinds = sorted({type(m).__name__ for m in model.modules()})[:8]
        raise UnsupportedError(
            f"no decoder attention layers found in {type(model).__name__}; modules seen: {', '.join(kinds)}. "
            "kvsink needs a transformers decoder whose attention modules carry layer_idx"
        )
    attentions = tuple(found[i] for i in range(len(found)))
    blocks = tuple(name.rsplit(".", 1)[0] for name in attentions)
    base = blocks[0].rsplit(".", 2)[0] if blocks[0].count(".") >= 2 else ""
    rotary = _rotary_of(model, base)
    turned = not getattr(config, "alibi", False)  # Falcon makes angles that its attention does not use with ALiBi
    heads = _global(config, "num_attention_heads") or 1
    dim = _global(config, "head_dim") or (_global(config, "hidden_size") or 0) // heads
    if not dim:
        raise UnsupportedError(
            f"{type(model).__name__}: its {type(config).__name__} gives neither head_dim nor hidden_size, so nothing is known of "
            "its attention; it is left as it is"
        )
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    shared = 1 if one else _global(config, "num_key_value_heads") or _global(config, "num_kv_heads") or heads
    kinds_ = tuple(getattr(config, "layer_types", None) or ())
    if len(kinds_) != len(blocks):
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds_ = ("sliding_attention" if window else "full_attention",) * len(blocks)
    kinds_ = tuple(
        kind if i in attending or kind not in ("full_attention", "sliding_attention") else "linear_attention"
        for i, kind in enumerate(kinds_)
    )
    return Anatomy(
        base=base,
        blocks=blocks,
        attentions=attentions,
        rotary=rotary if turned else None,
        layers=tuple(_heads_of(model.get_submodule(name), Heads(heads, shared, dim, dim)) for name in attentions),
        layer_types=kinds_,
        turnings=(None,) * len(blocks),
        absent=("",) * len(blocks),
    )


def _rotary_of(model: nn.Module, base: str) -> str | None:
    """The module beside the decoder blocks that gives the angles of RoPE, or None."""
    held = model.get_submodule(base) if base else model
    named = [n for n, m in held.named_children() if n == "rotary_emb" or type(m).__name__.endswith("RotaryEmbedding")]
    name = "rotary_emb" if "rotary_emb" in named else next((n for n in named if not is_tower(n)), None)
    return None if name is None else f"{base}.{name}" if base else name


def _global(config: Any, name: str) -> Any:
    """An attribute of a config, or None where there is none that holds for all layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers says so where layers differ
        return None


def _of_layers(config: Any, name: str) -> Any:
    """The first value of an attribute that differs from layer to layer, or None."""
    layers = getattr(config, "per_layer_config", ()) if hasattr(config, "num_hidden_layers") else ()
    return next((v for c in layers if (v := getattr(c, name, None))), None)


def _heads_of(attention: nn.Module, usual: Heads) -> Heads:
    """The heads of one attention module as its projections have them, where it has some; else the usual ones of its model."""
    dim = getattr(attention, "head_dim", None)
    key = getattr(getattr(attention, "k_proj", None), "out_features", None)
    if not isinstance(dim, int) or not isinstance(key, int) or key % dim:
        return usual
    kv = key // dim
    value = getattr(getattr(attention, "v_proj", None), "out_features", None)
    wide = value // kv if isinstance(value, int) and value % kv == 0 else dim
    return Heads(usual.query, kv, dim, wide)


def is_tower(name: str) -> bool:
    """Whether a module belongs to an encoder of pictures, video or sound, by its name."""
    return any(part.startswith(("vision", "visual", "audio", "image_encoder")) for part in name.split("."))


def towers(model: nn.Module) -> dict[str, int]:
    """Encoders beside the decoder and how many attention modules each has; they keep no cache between calls."""
    out: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_tower(name) and type(module).__name__.endswith(("Attention", "AttentionBlock")):
            parts = name.split(".")
            root = ".".join(parts[: next(i for i in range(len(parts)) if is_tower(parts[i])) + 1])
            out[root] = out.get(root, 0) + 1
    return out


def rope_types(config: Any) -> frozenset[str]:
    """Kinds of RoPE scaling in a text config, as transformers names them; a model may have one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope] if "rope_type" in rope or "type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    return frozenset(str(r.get("rope_type", r.get("type"))) for r in kinds)


def check_kind(model: nn.Module) -> None:
    """Raise UnsupportedError for a model whose cache holds something else than keys and values."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if rank := _global(config, "kv_lora_rank") or _of_layers(config, "kv_lora_rank"):
        raise UnsupportedError(
            f"{type(model).__name__} has multi-head latent attention: its cache holds a latent of {rank} channels, "
            "not the keys and values that the codecs are made for; use its own cache"
        )


def turns_back(codec: Codec) -> bool:
    """Whether a codec takes the rotation of keys by their positions back."""
    return codec.key.packed and (codec.key.domain == "block" or codec.key.center)


def turned_by(rotary: nn.Module, like: Tensor, positions: Tensor, kind: str = "") -> tuple[Tensor, Tensor] | None:
    """What a rotary module gives for positions [N, P], in the dtype of `like`; None where it gives no cosines and sines."""
    more = (kind,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    with torch.no_grad():
        try:
            return tables_of(rotary(like, positions, *more))
        except IndexError:  # one that asks for an axis of positions in front
            return tables_of(rotary(like, positions[None].expand(3, -1, -1), *more))


def rotary_tables(rotary: nn.Module, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [N, P, ..] of a rotary module at positions [N, P] in a layer of one kind."""
    found = turned_by(rotary, torch.empty(1, 1, device=positions.device), positions, kind)
    if found is None:
        raise UnsupportedError(
            f"{type(rotary).__name__} gives no cosines and sines; use a method that leaves keys as they are turned, such as rtn"
        )
    return found


class Runtime:
    """Plan, calibrated tables and rotary angles of one model; shared by all its caches.

    plans: one LayerPlan per layer; tables: tensors named `layers.{i}.{param}` (float32, or int64 permutations); stages: the
    emergence stages; method: the name reports show; where: what is known of the model, None to look at its modules alone.
    """

    def __init__(
        self, model: nn.Module, plans: tuple[LayerPlan, ...], tables: Mapping[str, Tensor], stages: tuple[SinkStage, ...],
        method: str, where: Anatomy | None = None,
    ) -> None:  # fmt: skip
        self.anatomy = anatomy(model) if where is None else where
        self.config: Any = model.config
        self._through_functions = bool(getattr(model, "_supports_attention_backend", False))
        self.plans, self.stages, self.method = plans, stages, method
        self.tables = dict(tables)
        self._named = [f"layers.{i}." for i in range(len(plans))]  # in a graph with dynamic sizes no number becomes text
        self.extra: dict[str, Any] = {}  # what a folder's plan says beside it, written again with it
        self.replaced = ""  # why caches made from this one are refused, once the model has another
        rotary = model.get_submodule(self.anatomy.rotary) if self.anatomy.rotary else None
        self.rotary = copy.deepcopy(rotary).float() if rotary is not None else None
        self._tiles: dict[str, Tensor] = {}
        self._beyond_half: dict[int, bool] = {}
        self._rotary_channels: dict[int, int] = {}
        self._orders: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}
        self._starts: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}

    @property
    def asks(self) -> bool:
        """Whether attention goes through transformers' "sdpa" function, where a layer can answer it."""
        return self._through_functions and self.config.get_text_config(decoder=True)._attn_implementation == "sdpa"

    @property
    def turns(self) -> bool:
        """Whether a layer takes the rotation of its keys back, or its statistics are being taken: positions then have one axis.

        With positions in several axes (M-RoPE) a row's key is taken as turned by its first axis alone; what the others turn it
        further stays in the key, so that storing and reading agree for every row.
        """
        return any(p.codec is None or turns_back(p.codec) for p in self.plans)

    def angles(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [N, P, R] of positions [N, P], attention scaling included; R = 0 without RoPE. Canonical, see
        `kvsink.model.turning`."""
        turning = self.anatomy.turnings[layer]
        if self.rotary is None or (turning is not None and not turning.channels):
            empty = torch.empty(1, positions.shape[-1], 0, device=positions.device)
            return empty, empty
        cos, sin = rotary_tables(self.rotary.to(positions.device), positions, self._kind(layer))
        return self.canonical(layer, cos.float(), sin.float())

    def frequencies(self) -> dict[str, list[float]]:
        """Radians per token of every pair of channels, and the scaling of angles, by kind of layer whose codec takes them back."""
        out: dict[str, list[float]] = {}
        for layer, plan in enumerate(self.plans):
            kind = self._kind(layer)
            if plan.codec is None or kind in out or not turns_back(plan.codec):
                continue
            cos, sin = (t[0, 0, : t.shape[-1] // 2].double() for t in self.angles(layer, torch.ones(1, 1, dtype=torch.int64)))
            if len(cos):
                out[kind] = [round(float(f), 12) for f in torch.cat((torch.atan2(sin, cos), torch.hypot(sin, cos)))]
        return out

    def canonical(self, layer: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own tables for a layer as canonical ones."""
        turning = self.anatomy.turnings[layer]
        return (cos, sin) if turning is None else turning.canonical(cos, sin)

    def order(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Channels of a key in canonical order, and of the canonical key in the model's: int64 [D] each. None where both are the
        same, or where the codec of the layer does not turn its keys back."""
        key = layer, str(device)
        if key not in self._orders:
            turning, plan = self.anatomy.turnings[layer], self.plans[layer]
            wanted = turning is not None and (plan.codec is None or turns_back(plan.codec))
            order = turning.order(self.anatomy.layers[layer].key_dim) if wanted and turning is not None else None
            index = None if order is None else torch.tensor(order, device=device)
            self._orders[key] = None if index is None else (index, index.argsort())
        return self._orders[key]

    def _kind(self, layer: int) -> str:
        return self.anatomy.layer_types[layer] if self.anatomy.layer_types else ""

    def start_angles(self, layer: int, block: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of the block starts 0, n, 2n, … for at least `rows` blocks: cos, sin [P, R]. Cached and shared."""
        turning = self.anatomy.turnings[layer]
        key = (f"{self._kind(layer)} {turning}", block, str(device))
        held = self._starts.get(key)
        if held is None or held[0].shape[0] < rows:
            rows = max(rows, 16)
            positions = torch.arange(rows, device=device)[None] * block
            cos, sin = self.angles(layer, positions)
            held = self._starts[key] = (cos[0].contiguous(), sin[0].contiguous())
        return held

    def offset_angles(self, layer: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of the offsets 0 … block - 1 without attention scaling: cos, sin [block, R]."""
        cos, sin = self.angles(layer, torch.arange(block, device=device)[None])
        norm = (cos * cos + sin * sin).sqrt().clamp_min(1e-12)
        return (cos / norm)[0], (sin / norm)[0]

    def params(
        self, layer: int, codec: Codec, tokens: int, device: torch.device, given: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """The constant tables of one layer in the order its codec names them, for positions below `tokens`.

        given: tables that belong to the cache and not to the model, such as the anchors of its rows.
        """
        out = []
        for name in codec.param_names():
            if given and name in given:
                out.append(given[name])
            elif name.startswith("tile_"):
                out.append(self._tile_table(name, layer, codec, tokens, device))
            elif name in ("start_cos", "start_sin"):
                n = codec.table_tokens
                start = self.start_angles(layer, n, -(-tokens // n), device)
                out.append(start[name == "start_sin"])
            else:
                key = self._named[layer] + name
                table = self.tables[key]
                if table.device != device:
                    table = self.tables[key] = table.to(device)
                out.append(table)
        return out

    def beyond_half(self, layer: int, codec: Codec) -> bool:
        """Whether the basis of a layer's keys, in units of codes as the tile kernels take it, leaves float16's range."""
        if layer not in self._beyond_half:
            basis, sigma = (self.tables.get(f"layers.{layer}.{n}") for n in ("k_basis", "k_sigma"))
            self._beyond_half[layer] = False
            if basis is not None and sigma is not None and codec.key.kind == "lloyd-even":
                self._beyond_half[layer] = not bool(key_rows(basis, sigma, codec.key.widths).half().isfinite().all())
        return self._beyond_half[layer]

    def _tile_table(self, name: str, layer: int, codec: Codec, tokens: int, device: torch.device) -> Tensor:
        """A table in the order in which the GPU kernel reads it, made once from the plain ones."""
        if name == "tile_turn":
            n = codec.table_tokens
            cos, sin = self.start_angles(layer, n, -(-tokens // n), device)
            key = f"turn.{self._kind(layer)}.{self.anatomy.turnings[layer]}.{n}.{cos.shape[0]}@{device}"
            if key not in self._tiles:
                self._tiles[key] = TileTables.rotation(cos, sin)
            return self._tiles[key]
        key = f"layers.{layer}.{name}@{device}"
        if key not in self._tiles:
            basis, sigma, mean = (
                t.to(device) if (t := self.tables.get(f"layers.{layer}.{n}")) is not None else None
                for n in ("k_basis", "k_sigma", "k_table")
            )
            if name == "tile_mean":
                assert mean is not None
                made = TileTables.mean(mean)
            elif name == "tile_rows":
                assert basis is not None
                made = basis.mT.contiguous()
            else:
                assert basis is not None and sigma is not None
                made = TileTables.basis(key_rows(basis, sigma, codec.key.widths))
            self._tiles[key] = made
        return self._tiles[key]

    def rotary_channels(self, layer: int) -> int:
        """Channels of a head that carry RoPE; 0 without it."""
        if layer not in self._rotary_channels:
            self._rotary_channels[layer] = self.angles(layer, torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
        return self._rotary_channels[layer]

    def table_nbytes(self) -> int:
        """Bytes of the calibrated tables: weights of the method, not part of the cache."""
        return sum(t.numel() * t.element_size() for t in self.tables.values())


# -- hooks -------------------------------------------------------------------------------------------------------------


class _Hook:
    """A hook of one module that finds the module's arguments by name, however they are passed."""

    def __init__(self, module: nn.Module) -> None:
        names = [n for n in inspect.signature(module.forward).parameters if n not in ("self", "args", "kwargs")]
        self.place = {name: i for i, name in enumerate(names)}

    def given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument `name` of a call, or None."""
        if name in kwargs:
            return kwargs[name]
        at = self.place.get(name, len(args))
        return args[at] if at < len(args) else None

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The kvsink cache of a call, or None. Its frame is written through `shared`: dynamo of torch 2.11 does not trace
        the setter of a property."""
        for name in ("cache", "past_key_values", "layer_past"):  # transformers 5.24 and later, before, and older families
            found = self.given(name, args, kwargs)
            if getattr(found, "is_kvsink", False):
                return found
        return None


class _NewFrame(_Hook):
    """Pre-hook of the base model: a fresh frame, with what the attention mask says of padding."""

    def __init__(self, module: nn.Module, turns: bool = False, rotary: nn.Module | None = None) -> None:
        super().__init__(module)
        self.turns, self.rotary = turns, rotary

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = self.cache(args, kwargs)
        if cache is None:
            return None
        rows = self.given("input_ids", args, kwargs)
        rows = self.given("inputs_embeds", args, kwargs) if rows is None else rows
        frame = Frame()
        if rows is not None:
            mask = self.given("attention_mask", args, kwargs)
            frame.valid = real_rows(mask, rows.shape[0], rows.shape[1], cache)
            visual = getattr(cache, "visual", None)
            if visual is not None:
                check_mask(visual, rows.shape)
                frame.visual = visual
            axes = self.given("position_ids", args, kwargs)
            axes = axes.long() if isinstance(axes, Tensor) and axes.is_floating_point() else axes
            if isinstance(axes, Tensor) and axes.dim() == 2:  # not every model hands them on to its attention
                frame.positions = axes
            elif self.turns and isinstance(axes, Tensor) and axes.dim() == 3:
                first = axes[-3] if axes.shape[0] >= 3 else axes[0]
                like = rows if rows.is_floating_point() else number_of(module)
                frame.positions, frame.one_axis = first, True
                found = turned_by(self.rotary, like, first) if self.rotary is not None else None
                frame.cos, frame.sin = found if found is not None else (None, None)
        if hasattr(cache, "begin"):
            batch = rows.shape[0] if rows is not None else None
            if not torch.compiler.is_compiling():
                cache.begin(frame, batch)
            elif batch is not None:
                cache.fit_batch(batch)
        cache.shared.frame = frame
        asks = rows is not None and rows.shape[1] > 1 and not torch.compiler.is_compiling()
        if asks and getattr(cache, "attends_itself", bool)():
            mask = self.given("attention_mask", args, kwargs)
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
                named = {n: args[i] for n, i in self.place.items() if i < len(args)}
                return (), {**named, **kwargs, "attention_mask": causal_mask(rows.shape[1], cache.get_max_length(), rows.device)}
        return None


class _Modality(_Hook):
    """Pre-hook of every module around the decoder that is given token ids: which of them stand for images and video.

    The processor's own mask (mm_token_type_ids, or token_type_ids of Gemma) decides where it is given, else the model's image
    and video tokens. The language model of a vision-language model receives embeddings, so ids are read where they still are.
    """

    def __init__(self, module: nn.Module, tokens: tuple[int, ...]) -> None:
        super().__init__(module)
        self.tokens = tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, ids = self.cache(args, kwargs), self.given("input_ids", args, kwargs)
        if cache is None or ids is None or cache.visual is not None:
            return
        for name in MODALITY_MASKS:
            kinds = self.given(name, args, kwargs)
            if isinstance(kinds, Tensor):
                cache.visual = mask_of(kinds, ids, cache.get_seq_length())
                return
        cache.visual = visual_rows(ids, self.tokens)


def visual_tokens(config: Any) -> tuple[int, ...]:
    """Token ids that stand for image and video patches in a model's input; empty for a text model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int) and token >= 0))


def visual_rows(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """bool [B, S]: True at the given token ids."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        out = out | (ids == token)
    return out


MODALITY_MASKS = ("mm_token_type_ids", "token_type_ids")
"""What processors call their modality mask: 0 text, 1 image, 2 video."""


def check_mask(visual: Tensor, rows: Any) -> None:
    """Raise KvsinkError when a modality mask is not that of the rows it goes with."""
    if tuple(visual.shape) != tuple(rows[:2]):
        raise KvsinkError(
            f"the modality mask is {tuple(visual.shape)} for {tuple(rows[:2])} tokens; pass the processor's mask with the ids it "
            "came with"
        )


def mask_of(kinds: Tensor, ids: Tensor, held: Any) -> Tensor:
    """bool [B, S]: where a processor's mask of the new ids, or of everything held and the new ids, says image or video."""
    new = ids.shape[1]
    if kinds.shape[1] > new and not torch.compiler.is_compiling() and kinds.shape[1] == int(held) + new:
        kinds = kinds[:, -new:]
    check_mask(kinds, ids.shape)
    return kinds != 0


def real_rows(mask: Any, batch: int, new: int, cache: Any) -> Tensor | None:
    """bool [B, S]: False where a new row is padding, by what the attention mask says; None without a mask.

    2-D, 0 at padding: a column stands for a token. 4-D, bool or additive: a row that some new row looks at is real. A mask of
    flex attention: a row that looks at itself. Documents packed in one sequence, which do not see each other, are real.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if callable(look := getattr(mask, "mask_mod", None)):
        row = torch.arange(new, device=mask.kv_num_blocks.device)[None]
        sequence = torch.arange(mask.shape[0], device=row.device)[:, None]
        return look(sequence, torch.zeros_like(sequence), row, row + _first_slot(cache)).expand(batch, new)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        held = _first_slot(cache, True)
        if isinstance(held, Tensor):  # a fixed length: the mask may have a column for every slot
            columns = torch.arange(new, device=mask.device) + held
            part = mask.index_select(1, columns.clamp_max(mask.shape[1] - 1)).to(torch.bool)
            return part if mask.shape[1] == cache.get_max_length() else part & (columns < mask.shape[1])
        ahead = isinstance(held, int) and hasattr(cache, "first_slot") and mask.shape[1] > held + new
        return (mask[:, held : held + new] if ahead else mask[:, -new:]).to(torch.bool)
    seen = mask[:, 0]  # [B or 1, S or 1, slots]
    if seen.shape[-1] > new:
        first = _first_slot(cache)
        slots = torch.arange(new, device=mask.device) + first
        seen = seen.index_select(2, slots.clamp_max(seen.shape[2] - 1))  # rows that do not fit are refused where they are stored
    if seen.dtype != torch.bool:
        seen = seen > _HIDDEN
    if seen.shape[1] > 1:  # a row that sees everything, though the last one does not, stands for one that sees nothing
        whole = seen.all(2, keepdim=True)
        seen = seen & (~whole | whole[:, -1:])
    return seen.any(1).expand(batch, -1)


def _first_slot(cache: Any, moved: bool = False) -> Any:
    """See `KVSinkCache.first_slot`; other caches of a rewritten model know their length."""
    return cache.first_slot(moved) if hasattr(cache, "first_slot") else cache.get_seq_length()


class _EndFrame(_Hook):
    """Forward hook of the base model: the frame is over."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is not None:
            if not torch.compiler.is_compiling():
                getattr(cache, "check_sizes", bool)()
            cache.shared.frame = None
            cache.visual = None
            if not torch.compiler.is_compiling():
                for layer in cache.layers:
                    getattr(layer, "check_asked", bool)()


class _Observe(_Hook):
    """Pre-hook of an attention module whose layer keeps anchors: its cache layer is the one to look at the queries."""

    def __init__(self, module: nn.Module, layer: int) -> None:
        super().__init__(module)
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        layer = cache.layers[self.layer] if cache is not None else None
        module._kvsink_observer.see = getattr(layer, "observe", None)  # type: ignore[union-attr]


class _Positions(_Hook):
    """Pre-hook of an attention module: the positions it is about to use, and the angles where it turns by them."""

    def __init__(self, module: nn.Module, turned: bool) -> None:
        super().__init__(module)
        self.turned = turned

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        if cache.shared.frame.one_axis:
            return
        found = tables_of(self.given("position_embeddings", args, kwargs)) if self.turned else None
        if found is not None:
            cache.shared.frame.cos, cache.shared.frame.sin = found
        positions = self.given("position_ids", args, kwargs)
        if positions is not None and positions.dim() in (2, 3):  # axes that the model makes itself are equal
            found = positions if positions.dim() == 2 else positions[-1]
            cache.shared.frame.positions = found.long() if found.is_floating_point() else found


def number_of(module: nn.Module) -> Tensor:
    """A weight of the dtype a module computes in: the first of at least 16-bit floating point, whatever quantized ones stand by."""
    plain = (p for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)
    return next(plain, next(module.parameters()))


class _Stage(_Hook):
    """Forward hook of an emergence block: its output ranks the new rows."""

    def __init__(self, module: nn.Module, key: str, channels: tuple[int, ...], count: int) -> None:
        super().__init__(module)
        self.key, self.count = key, count
        device = place_of(module)  # where the rows will be: a copy per step would break CUDA graphs
        self.channels, self.weights = torch.tensor(channels[:1], device=device), torch.ones(1, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        cache.shared.frame.candidates[self.key] = _rank(hidden, cache.shared.frame, self.channels, self.weights, self.count, False)


class _Massive(_Hook):
    """Pre-hook of a block: the largest entries of its input name rows for this layer alone."""

    def __init__(self, module: nn.Module, key: str, count: int) -> None:
        super().__init__(module)
        self.key, self.count = key, count
        device = place_of(module)
        self.channels = torch.zeros(1, dtype=torch.int64, device=device)
        self.weights = torch.ones(1, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = self.given("hidden_states", args, kwargs)
        cache.shared.frame.candidates[self.key] = _rank(hidden, cache.shared.frame, self.channels, self.weights, self.count, True)


class _Pivots(_Hook):
    """Forward hook of the probe block: rows of a prompt whose largest |h| stands out; a step of one token adds none."""

    def __init__(self, module: nn.Module, key: str, count: int, least: float, ratio: float) -> None:
        super().__init__(module)
        self.key, self.count, self.least, self.ratio = key, count, least, ratio

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:
            score = torch.full(hidden.shape[:2], float("-inf"), device=hidden.device)
        else:
            score = pivot_scores(hidden, cache.shared.frame.valid, self.least, self.ratio)
        cache.shared.frame.candidates[self.key] = top_rows(score, self.count)


def pivot_scores(hidden: Tensor, valid: Tensor | None, least: float, ratio: float) -> Tensor:
    """max_c |h_tc| of hidden [B, S, E] where it is above `least` and above `ratio` times the median |h| of its batch row,
    float32 [B, S]; -inf elsewhere and at padding."""
    size = hidden.detach().abs().float()
    counted = size if valid is None else size.masked_fill(~valid[..., None], float("nan"))
    median = counted.flatten(1).nanmedian(dim=1, keepdim=True).values
    score = size.amax(-1)
    passed = (score > least) & (score > ratio * median)
    passed = passed if valid is None else passed & valid
    return score.masked_fill(~passed, float("-inf"))


def _rank(
    hidden: Tensor, frame: Frame, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    valid = frame.valid
    if valid is None:
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if channels.device != hidden.device:
        channels, weights = channels.to(hidden.device), weights.to(hidden.device)
    return select_sinks(hidden, valid, channels, weights, count, entries)


def order_candidates(frame: Frame, order: Tensor, batch: int, segment: Segment) -> tuple[Tensor, Tensor]:
    """Candidates known by their number among the real rows of their sequence, `order` [B or 1, S]: `first:N` the rows below N,
    `random:N` the N largest hashes. Documents packed in one sequence share its places: those of the first come first."""
    inside = order >= 0
    if segment.source == "first":
        inside = inside & (order < segment.count)
        score = _FIRST_SCORE * (1.0 - order * 1e-6)
    else:
        score = position_hash(order)
    inside = inside.expand(batch, -1)
    if frame.valid is not None:
        inside = inside & frame.valid
    if score.is_cuda and score.shape[1] == 1 and torch.compiler.is_dynamo_compiling():
        # The op's result is one buffer that every layer reads; plain operators would be computed anew for each.
        first = torch.zeros(1, dtype=torch.int64, device=score.device)
        ones = torch.ones(1, device=score.device)
        return select_sinks(score.float().expand(batch, -1)[..., None], inside, first, ones, 1, False)
    score = score.expand(batch, -1).masked_fill(~inside, float("-inf"))
    if score.shape[1] == 1:
        return score.float(), torch.zeros_like(score, dtype=torch.int64)  # nothing to choose from
    return top_rows(score, segment.count)


def position_hash(positions: Tensor) -> Tensor:
    """A fixed pseudo-random number in (0, 1], float32, for every position: the same in every run, layer and batch row."""
    x = (positions.to(torch.int64) + 1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (((x ^ (x >> 16)) & 0xFFFFFF) + 1).float() / float(1 << 24)


def attach(model: nn.Module, runtime: Runtime) -> None:
    """Give a model its runtime and hooks; an earlier runtime is detached first."""
    detach(model)
    a = runtime.anatomy
    handles = []
    base = model.get_submodule(a.base) if a.base else model
    handles.append(base.register_forward_pre_hook(_NewFrame(base, runtime.turns, _one_kind(model, a)), with_kwargs=True))
    handles.append(base.register_forward_hook(_EndFrame(base), with_kwargs=True))
    for name in a.attentions:
        attention = model.get_submodule(name)
        handles.append(attention.register_forward_pre_hook(_Positions(attention, runtime.rotary is not None), with_kwargs=True))
    stages = {f"stage:{s.block}": s for s in runtime.stages}
    done = set()
    for layer, plan in enumerate(runtime.plans):
        for segment in plan.segments:
            if segment.source in stages and segment.key not in done:
                done.add(segment.key)
                stage = stages[segment.source]
                block = model.get_submodule(a.blocks[stage.block])
                hook = _Stage(block, segment.key, stage.channels, segment.count)
                handles.append(block.register_forward_hook(hook, with_kwargs=True))
            elif segment.source.startswith("pivots:") and segment.key not in done:
                done.add(segment.key)
                _, at, least, ratio = segment.source.split(":")
                block = model.get_submodule(a.blocks[int(at)])
                pivots = _Pivots(block, segment.key, segment.count, float(least), float(ratio))
                handles.append(block.register_forward_hook(pivots, with_kwargs=True))
            elif segment.source == "massive":
                block = model.get_submodule(a.blocks[layer])
                entries = _Massive(block, f"{segment.key}@{layer}", segment.count)
                handles.append(block.register_forward_pre_hook(entries, with_kwargs=True))
    if any(p.codec is not None and p.codec.modal for p in runtime.plans):
        tokens = visual_tokens(model.config)
        around = [".".join(a.base.split(".")[:i]) for i in range(a.base.count(".") + 2)] if a.base else [""]
        for name in around:  # the model itself first, then inwards to the decoder
            outer = model.get_submodule(name)
            handles.insert(0, outer.register_forward_pre_hook(_Modality(outer, tokens), with_kwargs=True, prepend=True))
    anchored = [i for i, p in enumerate(runtime.plans) if p.codec is not None and p.codec.anchors is not None]
    for layer in anchored:
        attention = model.get_submodule(a.attentions[layer])
        attention._kvsink_observer = Observer()  # type: ignore[assignment]
        handles.append(attention.register_forward_pre_hook(_Observe(attention, layer), with_kwargs=True))
    switch_attention(model, bool(anchored))
    model._kvsink_runtime = runtime  # type: ignore[assignment]
    model._kvsink_handles = handles  # type: ignore[assignment]


def _one_kind(model: nn.Module, where: Anatomy) -> nn.Module | None:
    """The rotary module of a model whose layers all turn by the same angles, or None."""
    rotary = model.get_submodule(where.rotary) if where.rotary else None
    return None if rotary is None or "layer_type" in inspect.signature(rotary.forward).parameters else rotary


def detach(model: nn.Module) -> None:
    """Remove the hooks and the runtime, if there are any."""
    for handle in model.__dict__.pop("_kvsink_handles", ()):
        handle.remove()
    earlier = model.__dict__.pop("_kvsink_runtime", None)
    for name in earlier.anatomy.attentions if earlier is not None else ():
        model.get_submodule(name).__dict__.pop("_kvsink_observer", None)
    if earlier is not None:
        switch_attention(model, False)


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a rewritten model; raises UnsupportedError when there is none."""
    runtime = getattr(model, "_kvsink_runtime", None)
    if runtime is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not rewritten; call kvsink.rewrite(model, …) or load a folder made by kvsink-rewrite"
        )
    return runtime

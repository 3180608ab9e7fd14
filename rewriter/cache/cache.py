"""`KVSinkCache`: a transformers cache whose attention layers hold packed codes, and their sinks exact.

Shapes     see kvsink.codecs.STATE_NAMES: per layer codes uint8 [B, H, L, bytes] and float16 scales, exact rows [B, H, E, D] with
           their slots, an optional window of recent rows, the length, and what all layers share: positions [B, L], and real
           bool [B, L], False where a slot holds padding
Exact      protected, recent and just-appended rows are returned as they came; the rest as its codes say
Raises     KvsinkError when a row does not fit, a crop asks for more than is held, or a saved cache is of another model
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from kvsink.cache.files import load_cache, save_cache
from kvsink.cache.hybrid import KVSinkHybridLayer
from kvsink.cache.joining import joined_shared, joined_state, pads_of
from kvsink.cache.layer import KVSinkLayer
from kvsink.cache.ranges import check_range
from kvsink.cache.served import in_tiles, tiles_serve
from kvsink.cache.sliding import WINDOWED, KVSinkSlidingLayer, SlidingWindow, window_of
from kvsink.cache.storage import HELD, Shared
from kvsink.codecs import SHARED_NAMES
from kvsink.errors import KvsinkError
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.model.frame import Frame
from kvsink.model.offload import number_of, place_of
from kvsink.model.runtime import Runtime, runtime_of

__all__ = ["KVSinkCache"]


class KVSinkCache(Cache):
    """The cache of a rewritten model. Make it with `KVSinkCache.for_model`, or let `generate()` make it.

    Layers that the plan leaves alone (sliding windows, layers without attention) are transformers' own.
    """

    is_kvsink = True

    def __init__(self, runtime: Runtime, max_length: int | None = None, tiles: bool = False) -> None:
        self.shared = Shared(runtime)
        self.visual: Tensor | None = None  # bool [B, S] of the forward pass that begins, where a layer asks for it
        if tiles and max_length is not None:
            max_length = -(-max_length // TILE_SLOTS) * TILE_SLOTS
        config = runtime.config.get_text_config(decoder=True)
        self.max_length = max_length
        stock = self._stock_cache()
        layers: list[Any] = []
        kinds = runtime.anatomy.layer_types
        self.sliding: SlidingWindow | None = None
        for i, plan in enumerate(runtime.plans):
            if plan.codec is None:
                layers.append(stock.layers[i])
            elif kinds[i] in WINDOWED:
                if self.sliding is None:
                    self.sliding = SlidingWindow(self.shared, runtime, window_of(config, kinds[i]), max_length)
                layers.append(KVSinkSlidingLayer(self.sliding, i, plan.codec, plan.segments, max_length))
            else:
                codec = plan.codec.in_tiles() if tiles and not in_tiles(runtime, i) else plan.codec
                kind = KVSinkHybridLayer if kinds[i] == "hybrid" else KVSinkLayer
                layers.append(kind(self.shared, i, codec, plan.segments, max_length))
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls, model: nn.Module, batch_size: int = 1, max_length: int | None = None, strict: bool = False, tiles: bool | None = None
    ) -> KVSinkCache:
        """A cache for a rewritten model. With `max_length` (tokens) every tensor is allocated now, for `batch_size` rows.

        strict: read new rows back from their codes too, as an evaluation may want. tiles: store codes as the GPU kernel reads
        them; None does so where the kernel serves the model. `max_length` is then rounded up to a multiple of 128.
        """
        for name, number in (("batch_size", batch_size), ("max_length", max_length)):
            if number is not None and number < 1:
                raise KvsinkError(f"{name}={number} is not positive")
        runtime = runtime_of(model)
        weight = number_of(model)
        if tiles is None:
            tiles = tiles_serve(runtime, weight.dtype, weight.device)
        cache = cls(runtime, max_length, tiles)
        if strict:
            cache._make_strict()
        if max_length is not None:
            place = place_of(model)
            cache._check_memory(batch_size, weight.dtype, place)
            cache._allocate(batch_size, weight.dtype, place)
        return cache

    def _allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Every layer's tensors, for keys and values of the widths that it stores."""
        for layer, heads in zip(self.layers, self.shared.runtime.anatomy.layers, strict=True):
            if isinstance(layer, CacheLayerMixin) and not layer.is_initialized and getattr(layer, "supports_early_init", True):
                none = torch.zeros((batch, heads.kv, 0, heads.key_dim), dtype=dtype, device=device)
                layer.lazy_initialization(none, none.new_zeros(batch, heads.kv, 0, heads.value_dim))

    def _check_memory(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Say before anything is allocated when a cache cannot fit on its GPU."""
        if device.type != "cuda":
            return
        wanted = 0
        for layer in self.packed_layers():
            assert layer.max_length is not None
            held = layer.codec.layout(batch, *self.shared.runtime.anatomy.layers[layer.layer][1:], layer.max_length, dtype)
            wanted += sum(math.prod(shape) * t.itemsize for shape, t, _ in held.values())
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if wanted > free:
            raise KvsinkError(
                f"a cache of {batch} x {self.packed_layers()[0].max_length} tokens takes {wanted / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free on {device}; make batch or length smaller, or choose fewer bits"
            )

    def _make_strict(self) -> None:
        for layer in self.packed_layers():
            layer._recode(replace(layer.codec, strict=True))

    @property
    def frame(self) -> Frame | None:
        """What the hooks know about the running forward pass."""
        return self.shared.frame

    @frame.setter
    def frame(self, frame: Frame | None) -> None:
        self.shared.frame = frame

    def begin(self, frame: Frame, batch: int | None = None) -> None:
        """A forward pass over `batch` sequences begins. Raises KvsinkError when the last one stopped half-way and left layers of
        different lengths, or when others are held."""
        if self.shared.runtime.replaced:
            raise KvsinkError(self.shared.runtime.replaced)
        layers = [layer for layer in self.packed_layers() if layer.is_initialized]
        last = self.shared.frame
        if last is not None and last.start is not None:
            start = int(last.start)
            if any(int(layer.length) != start or not layer._asked for layer in layers):
                raise KvsinkError(
                    f"the last forward pass over this cache stopped half-way, as when memory runs out; cache.crop({start}) "
                    "brings back the state before it, cache.reset() an empty cache"
                    if start
                    else "the last forward pass over this cache stopped half-way, as when memory runs out; call cache.reset()"
                )
        if batch is not None:
            self.fit_batch(batch)
        if layers:
            frame.start = layers[0]._held if layers[0].max_length is None else layers[0].length.clone()
        else:
            frame.start = 0
        self.shared.frame = frame

    def check_sizes(self) -> None:
        """Before a forward pass is over: raise KvsinkError when it brought rows that codes do not hold. The pass then counts as one
        that stopped half-way."""
        if self.shared.frame is not None:
            check_range(self.shared.frame.sizes)

    def _stock_cache(self) -> Cache:
        """An empty cache of transformers' own, whose layers stand where the plan leaves a layer alone."""
        config = self.shared.runtime.config.get_text_config(decoder=True)
        return DynamicCache(config=config) if self.max_length is None else StaticCache(config, max_cache_len=self.max_length)

    def fit_batch(self, batch: int) -> None:
        """Hold `batch` sequences from now on, where nothing is held yet. Raises KvsinkError where others are."""
        layers = [layer for layer in self.packed_layers() if layer.is_initialized]
        if not layers or layers[0].batch_size == batch:
            return
        self._take_batch(layers, batch)

    @torch.compiler.disable
    def _take_batch(self, layers: list[KVSinkLayer], batch: int) -> None:
        """The same outside graphs, where storage can be made anew."""
        if any(int(layer.length) for layer in layers):
            raise KvsinkError(
                f"the cache holds {layers[0].batch_size} sequences and is given {batch}; call cache.reset() first, or make another "
                "with kvsink.KVSinkCache.for_model"
            )
        for layer in layers:
            empty = torch.empty(batch, layer.num_heads, 0, layer.head_dim, dtype=layer.dtype, device=layer.device)
            layer.lazy_initialization(empty, empty.new_empty(batch, layer.num_heads, 0, layer.value_dim))
        stock = self._stock_cache()
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, KVSinkLayer):
                if getattr(layer, "record_past", False):
                    stock.layers[i].activate_past_recording()
                self.layers[i] = stock.layers[i]

    def reset(self) -> None:
        super().reset()
        self.shared.frame = self.visual = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens of every layer (a negative count; a positive one is the length to keep)."""
        super().crop(tokens_to_remove)
        self.shared.frame = self.visual = None

    def attends_itself(self) -> bool:
        """Whether every layer attends over its codes itself outside compiled graphs; masks may then stay unbuilt."""
        layers = self.layers
        return self.shared.runtime.asks and all(
            isinstance(i, KVSinkLayer) and i.codec.tiles and i.is_initialized and i.device.type == "cuda" for i in layers
        )

    def first_slot(self, moved: bool = False) -> Any:
        """Slot of the next row in the layers whose mask the decoder is given: an int for a growing cache, else a tensor.

        moved: count the tokens that a sliding window has left behind too, as a 2-D mask does.
        """
        packed = [layer for layer in self.packed_layers() if layer.is_initialized]
        layer = next((i for i in packed if not i.is_sliding), packed[0] if packed and all(self.is_sliding) else None)
        if layer is None or moved:
            return self.get_seq_length() if layer is None else layer.get_seq_length()
        return layer.length if layer.max_length is not None else layer._held

    def packed_layers(self) -> list[KVSinkLayer]:
        """The layers kvsink packs."""
        return [layer for layer in self.layers if isinstance(layer, KVSinkLayer)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the cache holds, by name; what layers share once."""
        out: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KVSinkLayer):
                if layer.is_initialized:
                    out.update({f"layers.{i}.{n}": getattr(layer, n) for n in HELD})
            elif getattr(layer, "is_initialized", False):
                out.update({f"layers.{i}.{n}": t for n, t in vars(layer).items() if isinstance(t, Tensor)})
        out |= {n: t for n in SHARED_NAMES if (t := getattr(self.shared, n)) is not None}
        out.update(self.shared.tables())
        if self.sliding is not None:
            out |= {f"sliding.{n}": t for n in (*SHARED_NAMES, "dropped") if (t := getattr(self.sliding, n)) is not None}
        return out

    def nbytes(self) -> int:
        """Bytes of every tensor the cache holds, allocated slots included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def held_nbytes(self) -> int:
        """Bytes of what is held at the present length, as a report counts them: codes, scales, exact rows, windows, positions."""
        return self._held()[0]

    def spare_nbytes(self) -> int:
        """Bytes allocated for tokens to come: `nbytes()` without `held_nbytes()`."""
        return self.nbytes() - self.held_nbytes()

    def bits_per_element(self) -> float:
        """Bits held per stored element of keys and values at the present length, spare slots left out; layers of transformers' own
        count like packed ones, and exact rows in the dtype of the model."""
        nbytes, elements = self._held()
        return 8.0 * nbytes / elements if elements else 0.0

    def _held(self) -> tuple[int, int]:
        """(bytes, elements of keys and values) held."""
        nbytes = elements = 0
        positions: dict[int, int] = {}  # once for all layers that share them
        for layer in self.layers:
            if not getattr(layer, "is_initialized", False):
                continue
            if isinstance(layer, KVSinkLayer):
                rows = int(layer.length)
                held = layer._layout(rows).values()
                nbytes += sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in held)
                elements += layer.batch_size * layer.num_heads * (layer.head_dim + layer.value_dim) * rows
                positions[id(layer.shared)] = 5 * layer.batch_size * rows  # a number, and whether the slot is real
            else:
                pair = layer.keys, layer.values
                slots = max(1, pair[0].shape[-2])
                rows = min(int(layer.get_seq_length()), slots)
                nbytes += sum(t.numel() // slots * rows * t.element_size() for t in pair)
                elements += sum(t.numel() // slots * rows for t in pair)
        return nbytes + sum(positions.values()) + sum(t.nbytes for t in self.shared.tables().values()), elements

    def _map_shared(self, pick: Any) -> None:
        self.shared.map(pick)
        if self.sliding is not None:
            self.sliding.map(pick)
        for layer in self.packed_layers():
            if layer.is_initialized:
                layer._set_params(layer.k_codes.shape[2])
                layer._mark_static()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for shared in (self.shared, self.sliding):
            if shared is not None:
                shared.map(lambda t: t.index_select(0, beam_idx.to(t.device)), in_place=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_shared(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_shared(lambda t: t[indices])

    def batch_join(self, other: KVSinkCache) -> tuple[int, int]:
        """Put the sequences of `other` behind those of this cache, which then end together. `other` is not changed.

        Returns the slots of padding that now stand before the rows of this cache and before those of `other`: the attention mask
        of the next pass has so many zeros more in front. Raises KvsinkError, and changes nothing, where caches do not fit.
        """
        pads = pads_of(self, other)
        pairs = list(zip(self.packed_layers(), other.packed_layers(), strict=True))
        slots = max(layer.k_codes.shape[2] for pair in pairs for layer in pair)
        states = [joined_state(a, b, pads, slots) for a, b in pairs]
        shared = joined_shared(self.shared, other.shared, pads, slots, pairs[0][0])
        for name, joined in shared.items():
            setattr(self.shared, name, joined)
        for (layer, second), state in zip(pairs, states, strict=True):
            layer._take(state, slots)
            layer._note_positions(math.nan if layer._ahead or second._ahead else 0)
        self.shared.frame = self.visual = None
        return pads

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the packed state to one safetensors file, to be loaded by `KVSinkCache.load` with the same model."""
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, max_length: int | None = None) -> KVSinkCache:
        """Read a cache saved by `save`. Raises SidecarError when it was made by another plan or cannot be read."""
        cache: KVSinkCache = load_cache(cls, path, model, max_length)
        return cache

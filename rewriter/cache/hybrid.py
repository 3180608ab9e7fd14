"""Layers that hold a recurrent state beside their keys and values: the rows are packed, the state is transformers' own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from kvsink.cache.layer import KVSinkLayer
from kvsink.cache.storage import Shared
from kvsink.codecs import Codec
from kvsink.codecs.protect import Segment
from kvsink.errors import KvsinkError

__all__ = ["KVSinkHybridLayer", "states_of"]


def states_of(config: Any, layer: int) -> dict[str, int]:
    """How many recurrent states a layer holds, as an argument of transformers' own layer; empty where it holds one."""
    count = getattr(DynamicCache(config=config.get_text_config(decoder=True)).layers[layer], "number_of_states", 1)
    return {} if count == 1 else {"number_of_states": count}


class KVSinkHybridLayer(LinearAttentionLayer, KVSinkLayer):
    """The packed rows of a layer that holds a recurrent state beside its keys and values; the state is transformers' own."""

    def __init__(self, shared: Shared, layer: int, codec: Codec, segments: tuple[Segment, ...], max_length: int | None) -> None:
        KVSinkLayer.__init__(self, shared, layer, codec, segments, max_length)
        LinearAttentionLayer.__init__(self, **states_of(shared.runtime.config, layer))

    supports_early_init = True
    is_compileable = property(lambda self: self.max_length is not None, lambda self, value: None)
    get_max_length = KVSinkLayer.get_max_length
    is_croppable = property(LinearAttentionLayer.is_croppable.fget)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """By position: keys and values; by name: a part of the recurrent state."""
        (KVSinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        KVSinkLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError, as transformers' own layer, where the recurrent state cannot go back."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVSinkLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        KVSinkLayer.reorder_cache(self, beam_idx)

    def _refuse(self, what: str) -> KvsinkError:
        return KvsinkError(f"layer {self.layer} holds a recurrent state, which transformers does not {what}; prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise self._refuse("repeat")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise self._refuse("select rows of")

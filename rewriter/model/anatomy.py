"""Which modules of a model are its decoder: blocks, attention, rotary angles, and what each layer stores.

Source     transformers' names and config fields; ours where they differ between families
Raises     UnsupportedError for a model without decoder attention layers, or whose cache holds something else than keys and values;
           for a wrapper that is not seen through
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from kvsink.errors import ModelError, UnsupportedError
from kvsink.model.adapters import check_prompts
from kvsink.model.turning import Turning

__all__ = ["LAST", "Anatomy", "Heads", "anatomy", "is_tower", "last_projection", "rewritable", "rope_types", "towers"]

LAST = ("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h", "wo", "fc_out")
"""Names of the projection through which a feed-forward layer writes into the residual stream."""


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
    call of their own attention alone, so that they have to be handed out whole. towers: encoders beside the decoder, see `towers`.
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
    towers: tuple[tuple[str, int], ...] = ()

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


def rewritable(model: nn.Module, where: Anatomy | None = None) -> tuple[nn.Module, Anatomy]:
    """The model to rewrite, which may stand in a wrapper, and its anatomy. where: what an earlier look has found."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"kvsink.rewrite takes a model, not {model!r}; load it by AutoModelForCausalLM.from_pretrained, or run kvsink-rewrite"
            " on its folder"
        )
    model = _inner(model)
    _check_kind(model)
    return model, anatomy(model) if where is None else where


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model that `generate()` of a PEFT wrapper runs; any other model is given back as it is."""
    if isinstance(model, PreTrainedModel):
        return model
    found = next(((name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        return model
    name, inner = found
    adapters: Any = getattr(model, "peft_config", None)
    if adapters is None or not hasattr(model, "get_base_model"):
        raise UnsupportedError(
            f"{type(model).__name__} is a wrapper that cannot be rewritten; rewrite the {type(inner).__name__} inside it "
            f"(.{name}), best before it is wrapped"
        )
    check_prompts(model)
    return inner


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
        towers=tuple(towers(model).items()),
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


def last_projection(model: nn.Module, where: Anatomy, layer: int) -> str:
    """The projection through which the feed-forward layer of a block writes into the residual stream.

    Raises UnsupportedError where there is none or several, or something else has a part in what is written.
    """
    block, attention = where.blocks[layer], where.attentions[layer]
    names = [n for n, _ in model.get_submodule(block).named_modules() if not f"{block}.{n}".startswith(attention + ".")]
    found = [n for n in names if n.rpartition(".")[2] in LAST]
    other = [n for n in names if n.startswith(("post_feedforward", "post_mlp")) or "expert" in n]
    if len(found) != 1 or other:
        why = f"{other[0]} as well" if other else f"{len(found)} last projections of a feed-forward layer"
        raise UnsupportedError(
            f"block {layer} ({block}), which writes the massive activations, has {why}, and sinks:T looks at what one projection "
            "writes; protect by kvsink:5"
        )
    return f"{block}.{found[0]}"


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


def _check_kind(model: nn.Module) -> None:
    """Raise UnsupportedError for a model whose cache holds something else than keys and values."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if rank := _global(config, "kv_lora_rank") or _of_layers(config, "kv_lora_rank"):
        raise UnsupportedError(
            f"{type(model).__name__} has multi-head latent attention: its cache holds a latent of {rank} channels, "
            "not the keys and values that the codecs are made for; use its own cache"
        )

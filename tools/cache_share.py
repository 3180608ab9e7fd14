"""The share of a cache that stays in 16 bit for the published layer patterns of twenty models.

Source     config.json of each model on the hub, as published: layers, their kinds, windows, heads and widths
Formula    elements of a layer: rows * heads * (key width + value width), rows = tokens, or at most the window; a recurrent layer
           has its state, whatever the length; a layer that shares another's keys has none
Rule       that of `kvsink.rewrite`: full attention is packed, recurrent states never; sliding windows and chunks on request, and
           where a model has nothing else
Units      elements; MiB at 2 bytes each
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MODELS", "Layer", "Model", "share", "table"]

TOKENS = 32768


@dataclass(frozen=True)
class Layer:
    """What one layer holds: kv heads and their widths, a window or none, or the elements of a recurrent state."""

    heads: int = 0
    key: int = 0
    value: int = 0
    window: int = 0
    state: int = 0

    def elements(self, tokens: int) -> int:
        """Elements held after so many tokens of one sequence."""
        return self.state + (min(tokens, self.window) if self.window else tokens) * self.heads * (self.key + self.value)


@dataclass(frozen=True)
class Model:
    """The layers of a model that hold anything, in words of how often each stands in the whole."""

    name: str
    layers: tuple[tuple[int, Layer], ...]

    def packed(self, layer: Layer, sliding: bool) -> bool:
        """Whether a layer is packed; sliding: with `--sliding`."""
        only = not any(each.heads and not each.window for _, each in self.layers)
        return layer.heads > 0 and (not layer.window or sliding or only)


def _model(name: str, *layers: tuple[int, Layer]) -> Model:
    return Model(name, layers)


def _full(heads: int, width: int, value: int = 0) -> Layer:
    return Layer(heads, width, value or width)


def _slide(window: int, heads: int, width: int, value: int = 0) -> Layer:
    return Layer(heads, width, value or width, window)


def _delta(value_heads: int, key_heads: int, width: int, kernel: int = 4) -> Layer:
    """Gated delta rule: a matrix per value head, and the newest inputs of a convolution over queries, keys and values."""
    return Layer(state=value_heads * width * width + (2 * key_heads + value_heads) * width * kernel)


MODELS = (
    _model("meta-llama/Llama-3.1-8B", (32, _full(8, 128))),
    _model("Qwen/Qwen3-30B-A3B", (48, _full(4, 128))),
    _model("HuggingFaceTB/SmolLM3-3B", (36, _full(4, 128))),
    _model("zai-org/GLM-4.5-Air", (46, _full(8, 128))),
    _model("MiniMaxAI/MiniMax-M2", (62, _full(8, 128))),
    _model("mistralai/Mistral-7B-v0.1", (32, _slide(4096, 8, 128))),
    _model("google/gemma-2-9b", (21, _slide(4096, 8, 256)), (21, _full(8, 256))),
    _model("google/gemma-3-27b-it", (52, _slide(1024, 16, 128)), (10, _full(16, 128))),
    _model("google/gemma-3n-E4B-it", (16, _slide(512, 2, 256)), (4, _full(2, 256)), (15, Layer())),
    _model("google/gemma-4-31B-it", (50, _slide(1024, 16, 256)), (10, _full(4, 512))),
    _model("openai/gpt-oss-20b", (12, _slide(128, 8, 64)), (12, _full(8, 64))),
    _model("CohereLabs/c4ai-command-r7b-12-2024", (24, _slide(4096, 8, 128)), (8, _full(8, 128))),
    _model("LGAI-EXAONE/EXAONE-4.0-32B", (48, _slide(4096, 8, 128)), (16, _full(8, 128))),
    _model("allenai/Olmo-3-7B-Instruct", (24, _slide(4096, 32, 128)), (8, _full(32, 128))),
    _model("meta-llama/Llama-4-Scout-17B-16E", (36, _slide(8192, 8, 128)), (12, _full(8, 128))),
    _model("XiaomiMiMo/MiMo-V2-Flash", (39, _slide(128, 8, 192, 128)), (9, _full(4, 192, 128))),
    _model("Qwen/Qwen3-Next-80B-A3B-Instruct", (36, _delta(32, 16, 128)), (12, _full(2, 256))),
    _model("Qwen/Qwen3.5-35B-A3B", (30, _delta(32, 16, 128)), (10, _full(2, 256))),
    _model("ai21labs/Jamba-v0.1", (28, Layer(state=8192 * (16 + 4))), (4, _full(8, 128))),
    _model("LiquidAI/LFM2-1.2B", (10, Layer(state=2048 * 3)), (6, _full(8, 64))),
)


def share(model: Model, tokens: int = TOKENS, sliding: bool = False) -> float:
    """The part of the elements of a model's cache, 0 to 1, that `kvsink.rewrite` leaves in 16 bit."""
    held = [(count * layer.elements(tokens), model.packed(layer, sliding)) for count, layer in model.layers]
    return sum(n for n, packed in held if not packed) / sum(n for n, _ in held)


def table(tokens: int = TOKENS) -> Iterator[str]:
    """Lines of Markdown, one per model."""
    yield "| model | layers | 16-bit cache, MiB | stays 16 bit | with `--sliding` |"
    yield "|---|---|---:|---:|---:|"
    for m in MODELS:
        size = sum(count * layer.elements(tokens) for count, layer in m.layers) * 2 / 2**20
        words = ", ".join(f"{count} {_words(layer)}" for count, layer in m.layers)
        yield f"| {m.name} | {words} | {size:,.0f} | {share(m, tokens):.1%} | {share(m, tokens, True):.1%} |"


def _words(layer: Layer) -> str:
    if layer.state:
        return f"recurrent of {layer.state:,}"
    if not layer.heads:
        return "sharing"
    width = f"{layer.key}" if layer.key == layer.value else f"{layer.key} and {layer.value}"
    return (f"sliding over {layer.window}" if layer.window else "full") + f" ({layer.heads} x {width})"

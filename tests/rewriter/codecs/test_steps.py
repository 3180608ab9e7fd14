"""Stages, fields and words that no kernel was written for: every backend and ONNX flavour says so, and the numbers stay right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

import kvsink
from kvsink.codecs import Codec, SideSpec, codec, spec, steps
from kvsink.codecs.steps import Stage, asked_by, asks_positions, functions_of
from kvsink.errors import UnsupportedError
from kvsink.export.flavours import codec_refusal, gqa_refusal
from kvsink.export.nodes import Steps
from kvsink.export.past import takes_packed
from kvsink.kernels import attend, stages
from kvsink.kernels.backends import KNOWN_STAGES, Shape, choose, plan, table
from kvsink.methods import methods
from kvsink.passes import attach
from tests.close import FUSED_FLOAT32
from tests.states import CPU, GPU, filled

SHAPE = Shape(4, 2, 128, 128, 128, torch.float16)
SIDE = SideSpec(bits=4, kind="uniform", widths=(4,) * 16)
STATIC = replace(SIDE, kind="static")
PLAIN = Codec(SIDE, SIDE).format


@dataclass(frozen=True)
class Wider(SideSpec):
    """A declaration with one field more."""

    flip: bool = False


@pytest.fixture
def flipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Channels the other way round, as the last stage before the quantizer of either side and the first behind it."""
    way_in, way_back, one = steps.stages_in, steps.stages_back, Stage("rotate", lambda do, x, at: do.flipped(x))
    monkeypatch.setattr(stages, "flipped", lambda x: torch.flip(x, (-1,)), raising=False)
    for module in (steps, codec):
        monkeypatch.setattr(module, "stages_in", lambda *a, **k: (*way_in(*a, **k), one))
        monkeypatch.setattr(module, "stages_back", lambda *a, **k: (one, *way_back(*a, **k)))
    for held in (asked_by, Codec.parse):  # codecs remember what their stages ask for
        held.cache_clear()
    yield
    for held in (asked_by, Codec.parse):
        held.cache_clear()


def every_kernel_says(name: str, made: Codec) -> None:
    """made has something new in its keys, which are otherwise those of `SIDE`."""
    line, said = f"keys with {name!r}, which these kernels do not know", 0
    for what in ("attend", "append", "step"):
        *kernels, definition = [(b.name, part) for b in table() if (part := getattr(b, what))]
        for device in (CPU, GPU):
            shape = SHAPE._replace(dtype=torch.float32) if device is CPU else SHAPE
            for backend, part in kernels:
                reason = part.refuses(made.format, shape, device)
                assert reason, backend
                said += reason == line and part.refuses(PLAIN, shape, device) == ""
            assert plan(what, made.format, shape, device).name == definition[0]
    assert said >= 4  # C and Triton, both of which serve the same without it
    assert f"{name!r} of keys has no node" in codec_refusal(made)
    assert not takes_packed(made)
    still = gqa_refusal(replace(made, key=replace(made.key, kind="static"), value=STATIC))
    assert still == f"{name!r} is nothing that stands around GroupQueryAttention"


SERVED = (
    "akvq-vl",
    "antkv",
    "centred",
    "centred:even",
    "cq",
    "kivi",
    "klt",
    "klt:even",
    "kvquant",
    "oscar",
    "rotatekv",
    "rtn",
    "static",
)


def test_methods_are_made_of_stages_that_kernels_know() -> None:
    for name in SERVED:
        method = methods()[name]
        made = (s.resolved(2, 64) for s in (method.side("key", method.key_bits), method.side("value", method.value_bits)))
        c = Codec(*made)
        assert c.format.key.beyond == c.format.value.beyond == (), name
        for prefix, side in (("k", c.key), ("v", c.value)):
            assert set(functions_of(side, prefix)) <= set(KNOWN_STAGES)
    both = functions_of(methods()["klt"].key, "k"), functions_of(methods()["rotatekv"].key, "k")
    assert {"project", "unproject", "rope_offset", "rope_start"} <= set(both[0]) and "reorder_heads" in both[1]
    assert not codec_refusal(Codec(SIDE, SIDE)) and not gqa_refusal(Codec(STATIC, STATIC)) and takes_packed(Codec(SIDE, SIDE))


def test_nobody_but_the_definition_takes_a_new_stage(flipped: None) -> None:
    every_kernel_says("flipped", Codec(replace(SIDE, clip=0.875), replace(SIDE, clip=0.875)))


def test_nobody_but_the_definition_takes_a_new_field() -> None:
    wide = Wider(bits=4, kind="uniform", widths=(4,) * 16)
    assert Codec(wide, SIDE).format is Codec(SIDE, SIDE).format
    every_kernel_says("flip", Codec(replace(wide, flip=True), SIDE))
    assert "'flip' of values has no node" in codec_refusal(Codec(SIDE, replace(wide, flip=True)))


def test_nobody_but_the_definition_takes_a_new_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "TRANSFORMS", (*spec.TRANSFORMS, "wavelet"))
    every_kernel_says("wavelet", Codec(replace(SIDE, transform="wavelet"), SIDE))


def test_a_backend_that_knows_a_name_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Codec(Wider(bits=4, kind="uniform", widths=(4,) * 16, flip=True), SIDE).format
    part = next(b for b in table() if b.name == "cpu (C)").attend
    assert part is not None
    assert part.refuses(f, SHAPE, GPU) and part._replace(knows=("flip",)).refuses(f, SHAPE._replace(dtype=torch.float32), CPU) == ""


def test_onnx_takes_a_stage_that_it_has_a_function_for(flipped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "flipped", staticmethod(lambda x: torch.flip(x, (-1,))), raising=False)
    assert codec_refusal(Codec(replace(SIDE, clip=0.75), replace(SIDE, clip=0.75))) == ""


def test_a_step_over_a_new_stage_attends_to_what_was_stored(flipped: None) -> None:
    """Softmax of torch over the rows themselves, which 8 bits hold to a 255th of their range."""
    layer, k, v = filled("rtn", (("key_bits", 8), ("value_bits", 8), ("window", 3)), batch=1, lengths=(20, 1))
    q = torch.randn(1, 4, 1, k.shape[3], generator=torch.Generator().manual_seed(9))
    out = attend(q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, None, 0.25, True, layer.codec_text)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
    moved = torch.nn.functional.scaled_dot_product_attention(q, k.flip(-1), v, scale=0.25, enable_gqa=True)
    step = max(float((x.amax(-1) - x.amin(-1)).max()) / 255 for x in (k, v))
    bound = step * (1 + 0.25 * float(q.abs().sum(-1).max()) * float(v.abs().max())) + FUSED_FLOAT32
    assert (out - wanted).abs().max() <= bound < (moved - wanted).abs().max()
    made = Codec.parse(layer.codec_text)
    assert choose("attend", made.format, SHAPE._replace(dtype=torch.float32), CPU).name == "torch"


def test_a_stage_says_whether_it_depends_on_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do: block keys, which are turned back to their block, and centred ones, whose mean turns with the token."""
    placed = {name for name in SERVED if asks_positions(methods()[name].key, "k")}
    assert placed == {"antkv", "centred", "centred:even", "cq", "klt", "klt:even", "kvquant", "rotatekv", "static"}
    assert not any(asks_positions(methods()[name].value, "v") for name in SERVED)
    monkeypatch.setattr(steps, "stages_in", lambda *a, **k: (Stage("rotate", lambda do, x, at: do.shifted(x, by=at.positions)),))
    made = Codec(SideSpec(), replace(SIDE, clip=0.625))
    assert asks_positions(made.value, "v") and attach._needs_positions(made)
    asked_by.cache_clear()


def test_what_a_kind_does_not_take_is_refused_where_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    gauss = spec.QUANTIZERS["gauss"]
    monkeypatch.setitem(spec.QUANTIZERS, "gauss", replace(gauss, check=lambda s: "gain" if s.gain else ""))
    assert SideSpec(bits=2, kind="gauss").kind == "gauss"
    with pytest.raises(UnsupportedError, match="^gain in SideSpec"):
        SideSpec(bits=2, kind="gauss", gain=True)
    assert kvsink.methods()["klt"].value.kind == "gauss"

"""Padding of every form under every codec: a row of a batch is what it is alone.

The oracle of a codec whose codes do not depend on a row's neighbours is the same row alone, fed with the same positions and no
mask. Codecs by blocks of tokens code other blocks there, so theirs is the model on its stock cache, at 8 bits. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.kernels import append_
from tests.models import build, tokens
from tests.states import append_arguments, layer_of, method_named, rows

STEPS = 3
ALONE = 1e-9  # float64 sums in another order; codes and exact rows are the same
EIGHT_BITS = 0.02  # of the largest logit, or twice what the row alone is off: other blocks have other ranges, not wider ones

CODECS: dict[str, dict[str, Any]] = {
    "rtn": {"protect": "first:1", "key_bits": 4, "value_bits": 4},
    "klt": {"protect": "first:2", "key_bits": 4, "value_bits": 4},
    "kivi/8": {"protect": "first:1", "key_bits": 8, "value_bits": 8},
    "centred": {"protect": "first:1"},
    "klt:even": {"protect": "first:1+random:2"},
    "rotatekv": {"protect": "first:3"},
    "kvquant": {"protect": "first:1"},
    "kvquant-10%/8": {"protect": "first:1", "key_bits": 8, "value_bits": 8},
    "cq": {"protect": "first:1", "windows": 18},
    "antkv": {"protect": "anchors:4+first:1", "window": 0, "windows": 18},
    "oscar/8": {"protect": "first:1", "key_bits": 8, "value_bits": 8},
    "kivi": {"protect": "first:1", "key_bits": 8, "value_bits": 8},
    "oscar": {"protect": "first:1", "key_bits": 8, "value_bits": 8},
}
BY_BLOCK = ("kivi/8", "oscar/8", "kivi", "oscar", "kvquant-10%/8")
QUICK = ("rtn", "klt", "kivi/8")
SOME = [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CODECS if c not in ("kivi", "oscar")]


@cache
def model_of(codec: str, exact: bool = True, attention: str = "sdpa") -> Any:
    """A tiny Llama in float64 with that codec. exact: rows are kept exact as `CODECS` says, else none are."""
    options = CODECS[codec] | ({} if exact else {"protect": "none"})
    model = build("llama", attention, torch.float64)
    kvsink.rewrite(model, method_named(codec), calibration=tokens(options.pop("windows", 8), 64, seed=1), **options)
    return model


# -- forms of padding: what a batch is fed, and what each of its rows is fed alone ---------------------------------------


@dataclass
class Form:
    """Calls of a model for a batch, and for each row that is looked at the same rows alone; the last STEPS are compared."""

    batch: list[dict[str, Tensor]] = field(default_factory=list)
    alone: list[list[dict[str, Tensor]]] = field(default_factory=list)
    repeat: int = 1  # the first call is of a prefix, whose rows are repeated so often


def _padded(left: bool, told: bool = True, four: str = "", short: int = 19, long: int = 30) -> Form:
    """Two rows. told: positions are those of the real rows, else slots; four: a 4-D mask of that kind."""
    pad = long - short
    ids = torch.cat([F.pad(tokens(1, short, seed=40), (pad, 0) if left else (0, pad)), tokens(1, long, seed=41)])
    mask = torch.ones(2, long, dtype=torch.int64)
    mask[0, : pad if left else 0] = 0
    mask[0, long if left else short :] = 0
    form, feed = Form(alone=[[], []]), tokens(2, STEPS, seed=42)
    for step in range(1 + STEPS):
        if step:
            ids, mask = feed[:, step - 1 : step], F.pad(mask, (0, 1), value=1)
        n = ids.shape[1]
        places = ((mask.cumsum(1) - 1).clamp_min(0) if told else torch.arange(mask.shape[1]).expand(2, -1))[:, -n:]
        call = {"input_ids": ids, "attention_mask": in_four(mask, n, four) if four else mask}
        form.batch.append(call | ({"position_ids": places} if told else {}))
        for i in range(2):
            real = mask[i, -n:] == 1
            form.alone[i].append({"input_ids": ids[i : i + 1, real], "position_ids": places[i : i + 1, real]})
    return form


def in_four(mask: Tensor, new: int, kind: str) -> Tensor:
    """A 2-D mask as a causal 4-D one: "bool", "additive", or "unmasked", where rows that would see nothing see everything."""
    slots = torch.arange(mask.shape[1])
    seen = (slots <= slots[-new:, None]) & (mask[:, None] == 1)
    if kind == "unmasked":
        seen = seen | ~seen.any(-1, keepdim=True)
    return seen[:, None] if kind == "bool" else _additive(seen[:, None], torch.finfo(torch.float64).min)


def _additive(seen: Tensor, hidden: float) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, hidden)


def _packed(kind: str, look: int, n: int = 21) -> Form:
    """Two documents in one row, of which steps go on with one."""
    documents = [tokens(1, n, seed=30), tokens(1, n + 4, seed=31)]
    which = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])
    places = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    form, feed = Form(alone=[[]]), tokens(1, STEPS, seed=32)
    form.alone[0].append({"input_ids": documents[look], "position_ids": torch.arange(documents[look].shape[1])[None]})
    ids, new = torch.cat(documents, 1), len(which)
    for step in range(1 + STEPS):
        if step:
            ids, new, which = feed[:, step - 1 : step], 1, F.pad(which, (0, 1), value=look)
            places = torch.tensor([[documents[look].shape[1] + step - 1]])
            form.alone[0].append({"input_ids": ids, "position_ids": places})
        slots = torch.arange(len(which))
        seen = ((which == which[-new:, None]) & (slots <= slots[-new:, None]))[None, None]
        mask = seen if kind == "bool" else _additive(seen, -1e9)
        form.batch.append({"input_ids": ids, "attention_mask": mask, "position_ids": places})
    return form


def _prefix(left: bool) -> Form:
    """A prefix shared by two rows, then suffixes of different lengths padded on either side."""
    prefix, suffixes = tokens(1, 13, seed=50), [tokens(1, 6, seed=51), tokens(1, 11, seed=52)]
    pad, feed = 5, tokens(2, STEPS, seed=53)
    form = Form([{"input_ids": prefix}], [[{"input_ids": prefix}] for _ in range(2)], repeat=2)
    ids = torch.cat([F.pad(suffixes[0], (pad, 0) if left else (0, pad)), suffixes[1]])
    mask = torch.ones(2, 13 + 11, dtype=torch.int64)
    mask[0, 13 : 13 + pad if left else 13] = 0
    mask[0, 13 + 11 if left else 13 + 6 :] = 0
    for step in range(1 + STEPS):
        if step:
            ids, mask = feed[:, step - 1 : step], F.pad(mask, (0, 1), value=1)
        n = ids.shape[1]
        places = (mask.cumsum(1) - 1)[:, -n:]
        form.batch.append({"input_ids": ids, "attention_mask": mask, "position_ids": places})
        for i in range(2):
            real = mask[i, -n:] == 1
            form.alone[i].append({"input_ids": ids[i : i + 1, real], "position_ids": places[i : i + 1, real]})
    return form


FORMS: dict[str, Callable[[], Form]] = {
    "left": lambda: _padded(True),
    "right": lambda: _padded(False),
    "left, positions not told": lambda: _padded(True, told=False),
    "right, positions not told": lambda: _padded(False, told=False),
    "mostly padding on the right": lambda: _padded(False, short=3),
    "left, 4-D bool": lambda: _padded(True, four="bool"),
    "right, 4-D additive": lambda: _padded(False, four="additive"),
    "left, 4-D additive without empty rows": lambda: _padded(True, four="unmasked"),
    "prefix, suffixes right": lambda: _prefix(False),
    "prefix, suffixes left": lambda: _prefix(True),
}
PACKED: dict[str, Callable[[], Form]] = {
    "first document, bool": lambda: _packed("bool", 0),
    "second document, additive": lambda: _packed("additive", 1),
}


@torch.no_grad()
def fed(run: Any, held: Any, calls: list[dict[str, Tensor]], repeat: int = 1) -> Tensor:
    """Logits [B, STEPS, V] of the last calls, one token each."""
    out = []
    for i, call in enumerate(calls):
        out.append(run(**call, past_key_values=held, use_cache=True).logits[:, -1])
        if i == 0 and repeat > 1:
            held.batch_repeat_interleave(repeat)
    return torch.stack(out[-STEPS:], 1)


def off(one: Tensor, two: Tensor) -> float:
    return float(((one - two).abs().amax(-1) / two.abs().amax(-1)).max())


def check(model: Any, form: Form, by_block: bool, max_length: int | None = None, run: Any = None) -> None:
    """Every row of a form against its oracle. run: the model as it is called, where that is not the model itself."""
    held = KVSinkCache.for_model(model, len(form.batch[0]["input_ids"]), max_length)
    for call in form.batch if max_length else ():
        mask = call["attention_mask"]
        if mask.dim() == 4:  # of a fixed cache they have a column for every slot
            hidden = 0.0 if mask.dtype == torch.bool else -1e9
            call["attention_mask"] = F.pad(mask, (0, (max_length or 0) - mask.shape[3]), value=hidden)
    found = fed(run or model, held, form.batch, form.repeat)
    if held.packed_layers()[0].codec.anchors is not None:
        real = held.shared.real
        assert real is not None and bool(real.gather(1, held.packed_layers()[0].exact_slot.long().clamp_min(0)).all())
    for i, calls in enumerate(form.alone):
        wanted = fed(model, KVSinkCache.for_model(model), calls)
        if by_block:
            stock = fed(model, hf.DynamicCache(config=model.config), calls)
            assert off(found[i : i + 1], stock) <= max(EIGHT_BITS, 2 * off(wanted, stock)), f"row {i}"
        else:
            assert off(found[i : i + 1], wanted) <= ALONE, f"row {i}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("codec", SOME)
def test_a_padded_row_is_what_it_is_alone(codec: str, form: str) -> None:
    check(model_of(codec), FORMS[form](), codec in BY_BLOCK)


@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("prefix")])
@pytest.mark.parametrize("codec", [c if c == "klt" else pytest.param(c, marks=pytest.mark.slow) for c in CODECS])
def test_a_padded_row_of_a_fixed_cache(codec: str, form: str) -> None:
    check(model_of(codec), FORMS[form](), codec in BY_BLOCK, max_length=48)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("codec", SOME)
def test_a_packed_document_is_what_it_is_alone(codec: str, form: str) -> None:
    check(model_of(codec, exact=False), PACKED[form](), codec in BY_BLOCK)


@pytest.mark.parametrize("codec", ["kivi", "oscar"])
def test_more_padding_than_tokens_in_whole_blocks(codec: str) -> None:
    """Blocks of 128 slots, most of one of them padding: the 40 tokens before it were taken for padding too."""
    check(model_of(codec), _padded(False, short=40, long=140), by_block=True)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_compiled_steps_of_a_padded_batch(codec: str, left: bool) -> None:
    if codec == "antkv":
        pytest.skip("anchors are chosen by its queries and keys, which a compiled step never holds")
    torch._dynamo.reset()
    model = model_of(codec)
    step = torch.compile(model, backend="kvsink", dynamic=False, options={"kvsink.inner": "eager"})

    def run(**call: Any) -> Any:
        many = call["input_ids"].shape[1] > 1
        call["attention_mask"] = F.pad(call["attention_mask"], (0, 48 - call["attention_mask"].shape[1]))  # one graph for all
        return (model if many else step)(**call)

    check(model, _padded(left), codec in BY_BLOCK, max_length=48, run=run)


# -- flex attention ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_flex() -> Iterator[None]:
    """Flex attention by its definition: compiling it takes half a minute, and on a CPU it then knows no float64."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("plain_flex")
def test_flex_attention_over_a_fixed_cache() -> None:
    """At 16 bits the tokens of the model on transformers' own fixed cache."""
    row, new = tokens(1, 17, seed=4), {"max_new_tokens": 6, "do_sample": False}
    plain, model = build("llama"), build("llama")
    kvsink.rewrite(model, "rtn", key_bits=16, value_bits=16, protect="none", calibration=tokens(8, 64, seed=1))
    for each in (plain, model):
        each.set_attn_implementation("flex_attention")
    wanted = plain.generate(row, past_key_values=hf.StaticCache(config=plain.config, max_cache_len=64), **new)
    assert torch.equal(model.generate(row, past_key_values=KVSinkCache.for_model(model, 1, 64), **new), wanted)


@pytest.mark.usefixtures("plain_flex")
@pytest.mark.parametrize("look", [0, 1])
@pytest.mark.parametrize("codec", ["klt", "kivi/8"])
def test_packed_documents_by_a_mask_of_flex_attention(codec: str, look: int) -> None:
    model, form = model_of(codec, exact=False, attention="flex_attention"), _packed("bool", look)
    for call in form.batch:
        seen = call["attention_mask"]
        call["attention_mask"] = create_block_mask(
            lambda b, h, q, kv, seen=seen: seen[b, 0, q, kv], 1, None, seen.shape[2], seen.shape[3], device="cpu"
        )
    check(model, form, codec in BY_BLOCK)


# -- which rows are real -------------------------------------------------------------------------------------------------


def test_padding_does_not_widen_the_ranges_of_a_block() -> None:
    """|x^ - x| <= step / 2, with the step of the real rows alone, whatever stands in the slots between them."""
    layer = layer_of("kivi/8", (("protect", "none"),), batch=2)
    k, v = rows(2, 16)
    real = torch.tensor([[True] * 16, [False, True, True, False, False, True, True, True] * 2])
    k = torch.where(real[:, None, :, None], k, 100.0)
    assert layer.shared.real is not None
    layer.shared.real[:, :16] = real
    append_(**append_arguments(layer, k, v))
    c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
    error = (c.read_keys(c.named(layer.state()), p, 0, 16) - k).abs()
    groups, seen = k.unflatten(2, (4, 4)), real.unflatten(1, (4, 4))[:, None, :, :, None]
    span = groups.masked_fill(~seen, -1e9).amax(3, keepdim=True) - groups.masked_fill(~seen, 1e9).amin(3, keepdim=True)
    step = span / (2 ** c.key.widths[0] - 1)
    wide = (step * 0.51 + 2.0**-10 * groups.abs()).flatten(2, 3)  # steps and minima are rounded to float16
    assert bool((error <= wide)[real[:, None, :, None].expand_as(error)].all())


@torch.no_grad()
def test_first_rows_of_packed_documents_are_those_of_the_sequence() -> None:
    model, form = model_of("rtn"), _packed("bool", 1)
    held = KVSinkCache.for_model(model)
    fed(model, held, form.batch)
    assert held.packed_layers()[0].exact_slot.tolist() == [[0]]


@torch.no_grad()
def test_the_first_real_row_stays_exact_without_positions() -> None:
    """Attention of this family is given no positions, and its rows have none."""
    torch.manual_seed(0)
    config = hf.GraniteMoeHybridConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        shared_intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["mamba", "attention"],
        position_embedding_type="nope",
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        initializer_range=0.15,
        pad_token_id=0,
    )
    model: Any = hf.GraniteMoeHybridForCausalLM(config).double().eval()
    kvsink.rewrite(model, "rtn", key_bits=4, value_bits=4, protect="first:2", calibration=tokens(8, 64, seed=1))
    row = tokens(1, 9, seed=3)
    alone, padded = KVSinkCache.for_model(model), KVSinkCache.for_model(model)
    model(row, past_key_values=alone, use_cache=True)
    mask = F.pad(torch.ones_like(row), (5, 0))
    model(F.pad(row, (5, 0)), attention_mask=mask, past_key_values=padded, use_cache=True)
    assert alone.packed_layers()[0].exact_slot.tolist() == [[0, 1]]
    assert padded.packed_layers()[0].exact_slot.tolist() == [[5, 6]]


@torch.no_grad()
def test_padding_is_forgotten_with_its_rows() -> None:
    """A slot that held padding holds a token after a crop or a reset, and a file keeps what is padding."""
    model, form = model_of("kivi/8"), _padded(False)
    for max_length in (None, 48):
        held = KVSinkCache.for_model(model, 2, max_length)
        model(**form.batch[0], past_key_values=held, use_cache=True)
        real = held.shared.real
        assert real is not None and real[0, :30].tolist() == [True] * 19 + [False] * 11 and bool(real[1].all())
        held.crop(-6)
        assert held.shared.real[0].tolist() == [True] * 19 + [False] * 5 + [True] * (real.shape[1] - 24)
        held.reset()
        assert bool(held.shared.real.all())


@torch.no_grad()
def test_the_length_handed_out_stays_what_it_was() -> None:
    model = model_of("rtn")
    held = KVSinkCache.for_model(model, 1, 48)
    model(tokens(1, 7), past_key_values=held, use_cache=True)
    before = held.get_seq_length()
    model(tokens(1, 2), past_key_values=held, use_cache=True)
    assert int(before) == 7 and int(held.get_seq_length()) == 9

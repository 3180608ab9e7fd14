"""What every op promises: it follows the formula of its docstring, its fake says the truth, and the dispatcher agrees.

Runs over `kvsink.kernels.op_specs()` with the examples the ops declare, and over append, read and attend with the state of
every method.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import kvsink
from kvsink.kernels.base import nbytes
from tests.contracts.formulas import FORMULAS
from tests.states import CODECS, append_arguments, filled, layer_of, rows

SPECS = kvsink.kernels.op_specs()
EXAMPLES = [(name, i) for name, spec in SPECS.items() for i in range(len(spec.examples))]
SAMPLED = [c if i % 3 == 0 else pytest.param(*c, marks=pytest.mark.slow) for i, c in enumerate(CODECS)]
"""What torch asks of an op depends on the tensors that a codec has alone: a third of them, the others among the slow tests."""
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in CODECS]


def arguments(name: str, i: int) -> dict[str, Any]:
    return dict(SPECS[name].examples[i](torch.Generator().manual_seed(i)))


def equal(left: Any, right: Any) -> bool:
    pairs = list(zip(tree_leaves(left), tree_leaves(right), strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def strided(x: Any) -> Any:
    """The same numbers in every second element of a wider tensor."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def declared(name: str) -> Any:
    return getattr(torch.ops.kvsink, name).default


def test_every_op_is_here() -> None:
    ops = {n.removeprefix("kvsink::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("kvsink::")}
    ops.discard("note_written")  # of kvsink.export.vllm, where that has been imported
    # The cache ops take the state of a layer; they are tested below, over the codecs of all methods.
    assert {n.split(".")[0] for n in ops} == set(SPECS) | {"append_", "read", "attend", "append_attend_", "release_", "settle_"}
    assert set(FORMULAS) == set(SPECS)
    for name, spec in SPECS.items():
        assert spec.name == name and len(spec.examples) >= 2
        assert spec.op is getattr(kvsink.kernels, name) and spec.ref.__name__ == f"{name}_ref"


def arrays(x: Any) -> Any:
    """The same nest with arrays in place of tensors."""
    return tree_map(lambda t: t.numpy() if isinstance(t, Tensor) else t, x)


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_the_op_follows_its_formula(name: str, i: int) -> None:
    """In float64 numpy, written out in formulas.py."""
    a = arguments(name, i)
    assert FORMULAS[name](arrays(SPECS[name].op(**a)), **arrays(a))


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_a_formula_notices_another_result(name: str, i: int) -> None:
    a = arguments(name, i)
    out = arrays(SPECS[name].op(**a))
    for at in range(len(out)) if isinstance(out, tuple) else [None]:
        each = [t.copy() for t in out] if isinstance(out, tuple) else [out.copy()]
        wrong = each[at or 0].reshape(-1)
        if not wrong.size:
            continue
        with np.errstate(over="ignore"):
            wrong[0] = wrong[0] ^ 1 if wrong.dtype == np.uint8 else wrong[0] + np.abs(wrong[0]) + 1
        assert not FORMULAS[name](tuple(each) if isinstance(out, tuple) else wrong.reshape(out.shape), **arrays(a))


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_the_op_is_its_reference_and_leaves_its_arguments(name: str, i: int) -> None:
    """The reference is what kernels are compared with; where it is what runs here, the formula above is its oracle."""
    a = arguments(name, i)
    before = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, a)
    out = SPECS[name].op(**a)
    assert equal(out, SPECS[name].ref(**a))
    assert equal([x for x in a.values() if isinstance(x, Tensor)], [x for x in before.values() if isinstance(x, Tensor)])
    inputs = {x.untyped_storage().data_ptr() for x in a.values() if isinstance(x, Tensor)}
    assert not inputs & {x.untyped_storage().data_ptr() for x in tree_leaves(out) if x.numel()}


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_strides_do_not_matter(name: str, i: int) -> None:
    a = arguments(name, i)
    spread = {k: strided(x) for k, x in a.items()}
    assert any(isinstance(x, Tensor) and not x.is_contiguous() for x in spread.values())
    assert equal(SPECS[name].op(**spread), SPECS[name].op(**a))


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_the_fake_says_the_truth(name: str, i: int) -> None:
    a = arguments(name, i)
    real = tree_leaves(SPECS[name].op(**a))
    with FakeTensorMode() as mode:
        fake = tree_leaves(SPECS[name].op(**tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, a)))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_the_dispatcher_agrees(name: str, i: int) -> None:
    results = torch.library.opcheck(declared(name), (), arguments(name, i))
    assert set(results.values()) == {"SUCCESS"} and len(results) >= 3


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_the_cost_counts_what_is_written(name: str, i: int) -> None:
    a = arguments(name, i)
    cost = SPECS[name].cost(**a)
    assert cost.written == nbytes(*tree_leaves(SPECS[name].op(**a)))
    assert cost.flops > 0 and 0 < cost.read <= nbytes(*(x for x in a.values() if isinstance(x, Tensor)))


# -- the ops on the state of a layer -----------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize(("method", "options"), SAMPLED, ids=IDS)
def test_append_passes_opcheck(method: str, options: tuple) -> None:
    layer = layer_of(method, options, 2)
    assert set(torch.library.opcheck(declared("append_"), (), append_arguments(layer, *rows(2, 5))).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("method", "options"), CODECS, ids=IDS)
def test_append_takes_any_strides(method: str, options: tuple) -> None:
    """Keys come as a transposed view of a projection."""
    k, v = rows(2, 6)
    states = []
    for change in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), strided):
        layer = layer_of(method, options, 2)
        kvsink.kernels.append_(**append_arguments(layer, change(k), change(v)))
        states.append(layer.state())
    assert equal(states[0], states[1]) and equal(states[0], states[2])


@pytest.mark.sample(3)
@pytest.mark.parametrize(("method", "options"), SAMPLED, ids=IDS)
def test_read_and_attend_pass_opcheck(method: str, options: tuple) -> None:
    layer, k, v = filled(method, options, batch=2, lengths=(9, 4))
    k, v = k[:, :, -4:], v[:, :, -4:]
    q = torch.randn(2, 4, 4, k.shape[3], generator=torch.Generator().manual_seed(0))
    held = (layer.state(), layer.params)
    mask = torch.ones(2, 1, 4, layer.max_length, dtype=torch.bool).tril(9)
    for name, given in (
        ("read", (k, v, *held, layer.codec_text)),
        ("attend", (q, k, v, *held, mask, 0.25, False, layer.codec_text)),
        ("attend", (q, k, v, *held, None, 0.25, True, layer.codec_text)),
    ):
        assert set(torch.library.opcheck(declared(name), given).values()) == {"SUCCESS"}
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = tree_leaves(declared(name)(*given))
        real = tree_leaves(declared(name)(*given))
        assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
    spread = tree_map(strided, (q, k, v))
    assert equal(kvsink.kernels.read(*spread[1:], *held, layer.codec_text), kvsink.kernels.read(k, v, *held, layer.codec_text))
    out = [kvsink.kernels.attend(*qkv, *held, mask, 0.25, False, layer.codec_text) for qkv in ((q, k, v), spread)]
    assert equal(out[0], out[1])

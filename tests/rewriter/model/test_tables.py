"""Angles of a model by the formula of RoPE in float64, and the tables of block starts that a kernel reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kvsink.model.runtime import runtime_of
from kvsink.model.tables import by_head
from tests.graphs import rewritten
from tests.models import HEAD_DIM

THETA = 10000.0
CPU = torch.device("cpu")


def by_formula(positions: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """cos, sin float64 [P, R] of positions [P]: pair i turns by position / theta^(2 i / R)."""
    rates = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    turn = positions.double()[:, None] * rates
    return torch.cat([turn, turn], -1).cos(), torch.cat([turn, turn], -1).sin()


@pytest.mark.parametrize(("family", "channels"), [("llama", HEAD_DIM), ("phi3", HEAD_DIM // 2), ("gpt2", 0)])
def test_angles_are_those_of_the_formula(family: str, channels: int) -> None:
    runtime = runtime_of(rewritten(family, "sdpa", "rtn"))
    positions = torch.tensor([0, 1, 5, 97])
    assert runtime.rotary_channels(1) == channels
    for got, want in zip(runtime.angles(1, positions[None]), by_formula(positions, channels), strict=True):
        assert got.shape == (1, 4, channels) and got.dtype == torch.float32
        assert not channels or (got[0] - want).abs().max() <= 97 * 2.0**-23


def test_block_starts_end_in_no_number() -> None:
    """Rows 0, n, 2 n, … at least as many as asked for, kept from call to call, and one behind them that is NaN."""
    runtime = runtime_of(rewritten("llama", "sdpa", "klt"))
    block = 8
    cos, sin = runtime.start_angles(0, block, 20, CPU)
    rows = len(cos) - 1
    assert rows >= 20 and cos[-1].isnan().all() and sin[-1].isnan().all()
    for got, want in zip((cos, sin), by_formula(torch.arange(rows) * block, HEAD_DIM), strict=True):
        assert (got[:-1] - want).abs().max() <= rows * block * 2.0**-23
    assert runtime.start_angles(0, block, rows, CPU)[0] is cos and runtime.start_angles(0, block, rows + 1, CPU)[0] is not cos
    for got, want in zip(runtime.offset_angles(0, block, CPU), by_formula(torch.arange(block), HEAD_DIM), strict=True):
        assert got.shape == (block, HEAD_DIM) and (got - want).abs().max() <= block * 2.0**-23


def test_tables_come_in_the_order_of_the_codec() -> None:
    runtime = runtime_of(rewritten("llama", "sdpa", "klt"))
    codec = runtime.plans[1].codec
    assert codec is not None
    params = dict(zip(codec.param_names(), runtime.params(1, codec, 64, CPU), strict=True))
    assert {n for n in params if n not in ("start_cos", "start_sin")} <= {n.rsplit(".", 1)[1] for n in runtime.tables}
    assert all(params[n] is runtime.tables[f"layers.1.{n}"] for n in params if not n.startswith("start_"))
    given = {"k_basis": torch.zeros(1)}
    assert dict(zip(codec.param_names(), runtime.params(1, codec, 64, CPU, given), strict=True))["k_basis"] is given["k_basis"]
    assert runtime.table_nbytes() == sum(t.nbytes for t in runtime.tables.values())


def test_processes_keep_heads_of_their_own() -> None:
    """The parts of two processes beside each other are the tables of one; what has no heads all have."""
    whole = runtime_of(rewritten("llama", "sdpa", "cq"))
    parts = []
    for rank in range(2):
        part = copy.deepcopy(whole)
        part.keep(rank, 2)
        assert all((heads.query, heads.kv) == (2, 1) for heads in part.anatomy.layers)
        parts.append(part.tables)
    assert whole.tables.keys() == parts[0].keys() == parts[1].keys()
    for name, table in whole.tables.items():
        if table.shape[0] == 2:
            assert torch.equal(torch.cat([part[name] for part in parts]), table)
            assert parts[0][name].untyped_storage().nbytes() == table.nbytes // 2
        else:
            assert parts[0][name] is not None and torch.equal(parts[0][name], table)


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [("k_basis", (2, 8, 8), True), ("k_levels", (2,), False), ("start_cos", (2, 8), False), ("v_book", (1, 8, 4, 2), False)],
)
def test_tables_of_heads_are_known(name: str, shape: tuple[int, ...], answer: bool) -> None:
    assert by_head(name, torch.zeros(shape), 2) is answer

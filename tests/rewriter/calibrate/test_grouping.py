"""Groups of keys: weights against a loop over causal pairs, matchings against all of them, and codebooks that gain by both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.codebooks import learn_book
from kvsink.calibrate.design import design_key
from kvsink.calibrate.grouping import channel_weights, grouped_basis, grouped_order, matched
from kvsink.calibrate.statistics import SampleNeed
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.kernels.vector import normed_encode, vector_decode, vector_encode
from tests.models import HEAD_DIM, KV_HEADS, build, tokens


def pairings(left: list[int]) -> Iterator[list[tuple[int, int]]]:
    if not left:
        yield []
    for other in left[1:]:
        for rest in pairings([i for i in left[1:] if i != other]):
            yield [(left[0], other), *rest]


def test_matchings_are_the_least_where_all_can_be_tried() -> None:
    """Eight things have 105 matchings."""
    for seed in range(40):
        cost = torch.rand(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        cost = cost + cost.T
        found, totals = matched(cost), [sum(float(cost[p]) for p in pairs) for pairs in pairings(list(range(8)))]
        assert sorted(i for p in found for i in p) == list(range(8)) and len(totals) == 105
        assert sum(float(cost[p]) for p in found) <= min(totals) * (1 + 1e-9), seed


def test_channels_that_move_together_share_a_code() -> None:
    """Pairs (j, j + 8) turn together; pair j copies pair (j + 4) mod 8 up to noise."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(400, 2, 4, generator=g, dtype=torch.float64)
    x = torch.cat([torch.cat([base[:, i], base[:, i] + 0.01 * torch.randn(400, 4, generator=g)], -1) for i in range(2)], -1)
    order = grouped_order(x.T @ x / 400, 16, 4)
    groups = [sorted(order[i : i + 4]) for i in range(0, 16, 4)]
    assert sorted(groups) == [[j, j + 4, j + 8, j + 12] for j in range(4)]
    assert all(order[i + 1] == order[i] + 8 for i in range(0, 16, 2))  # members of a pair lie side by side


def test_channels_that_do_not_turn_are_paired_with_their_neighbours() -> None:
    order = grouped_order(torch.eye(12, dtype=torch.float64), 4, 2)
    assert sorted(zip(order[::2], order[1::2], strict=True)) == [(0, 2), (1, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    with pytest.raises(UnsupportedError, match="groups of 3 channels of 12 cannot be made by joining pairs; use codes of 2, 4, 8"):
        grouped_order(torch.eye(12, dtype=torch.float64), 4, 3)


def test_the_basis_weighs_and_moves_channels() -> None:
    rows = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(1))
    moment = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    forth, back = grouped_basis(moment, rows, 16, 8, True)
    assert (forth @ back.mT - torch.eye(16)).abs().max() <= 1e-12
    assert ((forth != 0).sum(1) == 1).all() and ((forth != 0).sum(2) == 1).all()
    wanted = (moment / moment.mean(-1, keepdim=True)).sqrt()
    assert torch.allclose(forth.sum(2), wanted) and torch.allclose(channel_weights(moment), wanted)
    plain, again = grouped_basis(None, rows, 16, 8, True)
    assert torch.equal(plain, again) and set(plain.unique().tolist()) == {0.0, 1.0}
    floor = channel_weights(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert floor[0, 1] == pytest.approx(1e-6 * float(floor[0, 0])) and bool((channel_weights(torch.zeros(1, 3)) == 1).all())


@pytest.fixture(scope="module")
def record() -> Any:
    need = {0: SampleNeed(256, fisher=True), 1: SampleNeed(256, fisher=True)}
    return calibrate(build("llama"), tokens(24, 64, seed=1), [parse_policies("none")] * 2, {0: (1,), 1: (1,)}, samples=need)


def angles(block: int) -> tuple[Tensor, Tensor]:
    return torch.ones(block, HEAD_DIM), torch.zeros(block, HEAD_DIM)


def spec(**fields: Any) -> SideSpec:
    side = kvsink.get_method("tasq").side("key", 1)  # 8 channels in 8 bits
    return replace(side, **{"weights": "none", **fields})


def planted(n: int, seed: int) -> Tensor:
    """Rows [2, n, 16] of tokens of unequal size; channels copy others up to noise, which plain groups of four do not see."""
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(2, n, 4, generator=g)
    x = torch.cat([half, half + 0.3 * torch.randn(2, n, 4, generator=g)], -1)
    return torch.cat([x, x + 0.3 * torch.randn(2, n, 8, generator=g)], -1) * torch.randn(n, 1, generator=g).exp()


def test_errors_as_queries_meet_them_are_smaller_than_of_plain_codebooks() -> None:
    """The sum over channels of m_c times the squared error, over rows that nothing was learnt from."""
    x, fresh = planted(4096, 0), planted(2048, 1)
    moment = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).exp() ** 3
    ours, plain = (SideSpec(bits=2, kind=kind, couple=4, code_bits=8) for kind in ("vector-normed", "vector"))
    forth, back = (t.float() for t in grouped_basis(moment, x, 16, 4, True))
    book, other = learn_book(x @ forth, None, ours), learn_book(x, None, plain)
    found = vector_decode(*normed_encode((fresh @ forth)[None], book, 8), book, 8)[0] @ back.mT
    without = vector_decode(*vector_encode(fresh[None], other, 8, False), other, 8)[0]
    one, two = (float(((y - fresh).double().square() * moment[:, None]).sum()) for y in (found, without))
    assert one < 0.5 * two


def test_what_is_missing_is_named(record: Any) -> None:
    with pytest.raises(CalibrationError, match="layer 0 has no query statistics in this record; calibrate with this method again"):
        design_key(spec(), 0, KV_HEADS, HEAD_DIM, replace(record, queries={}), angles)
    with pytest.raises(CalibrationError, match="layer 0 has no sample statistics"):
        design_key(spec(), 0, KV_HEADS, HEAD_DIM, replace(record, samples={}), angles)
    with pytest.raises(UnsupportedError, match="groups are of keys before RoPE that are not centred: set domain='block', block=1"):
        spec(block=64)

"""The basis of keys in which errors count as attention counts them: against rotations in float64, and its two bounds."""

from __future__ import annotations

import math

import pytest
import torch

from kvsink.calibrate.codebooks import learn_book
from kvsink.calibrate.design import _klt
from kvsink.calibrate.kmeans import assign
from kvsink.calibrate.metric import basis_of_attention, condition, damped, spread_basis, turned_moment
from kvsink.codecs import SideSpec
from kvsink.kernels.hadamard import hadamard_ref

HEADS, DIM = 2, 8


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random symmetric matrices [H, D, D] of very unequal eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for spread in (3.0, 2.0):
        turn = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=g, dtype=torch.float64))[0]
        size = torch.linspace(spread, -spread, DIM, dtype=torch.float64).exp()
        made.append((turn * size) @ turn.mT)
    return made[0], made[1]


def test_the_moment_is_that_of_queries_at_all_distances() -> None:
    """Against the mean over many distances, by matrices of rotations; the last two channels do not turn."""
    second, _ = moments()
    speed = torch.tensor([1.0, 0.37, 0.11], dtype=torch.float64)
    turn = torch.eye(DIM, dtype=torch.float64).repeat(20_000, 1, 1)
    for i, angle in enumerate((torch.arange(20_000)[:, None] * speed).unbind(1)):
        turn[:, [i, i + 3], [i, i + 3]] = angle.cos()[:, None]
        turn[:, i, i + 3], turn[:, i + 3, i] = angle.sin(), -angle.sin()
    wanted = torch.stack([(turn.mT @ m @ turn).mean(0) for m in second])
    assert (turned_moment(second, 6) - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_condition_numbers() -> None:
    """Of spectra that are known, and of a moment of fewer rows than dimensions."""
    covariance, moment = moments()
    assert condition(covariance) == pytest.approx(math.exp(6), rel=1e-6) and condition(moment) == pytest.approx(
        math.exp(4), rel=1e-6
    )
    few = torch.randn(HEADS, DIM - 1, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert condition(few.mT @ few) == math.inf


def test_without_rope_it_is_the_moment_itself() -> None:
    second, _ = moments()
    assert torch.equal(turned_moment(second, 0), second)


def test_components_are_independent_and_their_errors_count_alike() -> None:
    covariance, moment = moments()
    variance, forth, back = basis_of_attention(covariance, moment, damping=0.0)
    assert (forth.mT @ covariance @ forth - torch.diag_embed(variance)).abs().max() <= 1e-9 * variance.max()
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(DIM, dtype=torch.float64)
    assert (back.mT @ moment @ back / size - eye).abs().max() <= 1e-9
    assert (forth @ back.mT - eye).abs().max() <= 1e-9
    assert bool((variance[:, :-1] >= variance[:, 1:]).all())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_basis_loses_less(seed: int) -> None:
    """The loss at a high rate is the product over components of variance times what their errors cost."""
    covariance, moment = moments(seed)

    def loss(forth: torch.Tensor) -> torch.Tensor:
        back = forth.inverse().mT
        parts = [(t.mT @ m @ t).diagonal(dim1=-2, dim2=-1) for t, m in ((forth, covariance), (back, moment))]
        return (parts[0] * parts[1]).log().sum(-1)

    _, best, _ = basis_of_attention(covariance, moment, damping=0.0)
    assert (loss(best) - torch.logdet(covariance) - torch.logdet(moment)).abs().max() <= 1e-6
    eigen = torch.linalg.eigh(covariance)[1]
    others = [
        best @ torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(9)
    ]
    assert all(bool((loss(other) > loss(best) + 1e-3).all()) for other in (eigen, *others))


def test_damping_bounds_what_a_direction_nobody_asked_about_is_stretched_by() -> None:
    covariance = torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)
    moment = torch.zeros_like(covariance).clone()
    moment[:, 0, 0] = 1.0
    variance, forth, back = basis_of_attention(covariance, moment)
    assert all(bool(t.isfinite().all()) for t in (variance, forth, back))
    assert float(back.norm(dim=1).max() / back.norm(dim=1).min()) <= math.sqrt(1 + DIM / 0.01) + 1e-6


def test_a_model_without_queries_gets_a_basis_all_the_same() -> None:
    covariance, _ = moments()
    _variance, forth, back = basis_of_attention(covariance, torch.zeros_like(covariance))
    assert bool(forth.isfinite().all()) and (forth @ back.mT - torch.eye(DIM, dtype=torch.float64)).abs().max() <= 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_balanced_basis_is_that_of_equation_1(seed: int) -> None:
    """Built as the paper does, from a Cholesky factor and with column vectors: both forms make the same of either moment."""
    second, moment = moments(seed)
    eye = torch.eye(DIM, dtype=torch.float64)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    lower = torch.linalg.cholesky(moment + 0.01 * size * eye)
    held = second + 0.01 * second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    lam, u = torch.linalg.eigh(lower.mT @ held @ lower)
    lam, u = lam.flip(-1), u.flip(-1)
    c = (1.01 * second.diagonal(dim1=-2, dim2=-1).sum(-1) / lam.sqrt().sum(-1)).sqrt()[:, None, None]
    had = hadamard_ref(eye, DIM)
    wanted = c * had.mT @ torch.diag_embed(lam**-0.25) @ u.mT @ lower.mT
    variance, *basis = basis_of_attention(damped(second), moment)
    forth, back = spread_basis(variance, (basis[0], basis[1]), DIM, damped(second).diagonal(dim1=-2, dim2=-1).sum(-1))
    assert (forth @ back.mT - eye).abs().max() <= 1e-9
    one, two = forth.mT @ held @ forth, wanted @ held @ wanted.mT
    assert (one - two).abs().max() <= 1e-9 * two.abs().max()
    inverse = wanted.inverse()
    asked = moment + 0.01 * size * eye
    one, two = back.mT @ asked @ back, inverse.mT @ asked @ inverse
    assert (one - two).abs().max() <= 1e-9 * two.abs().max()


def test_the_balanced_basis_loses_least_of_one_step_for_all() -> None:
    """tr(T^T S T) tr(T^-1 M T^-T) is the square of the sum of the singular values of S^1/2 M^1/2; every channel has its share."""
    second, moment = moments(4)

    def loss(forth: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        parts = [(t.mT @ m @ t).diagonal(dim1=-2, dim2=-1) for t, m in ((forth, second), (back, moment))]
        return parts[0].sum(-1) * parts[1].sum(-1)

    variance, *basis = basis_of_attention(second, moment, damping=0.0)
    best = spread_basis(variance, (basis[0], basis[1]), DIM, second.diagonal(dim1=-2, dim2=-1).sum(-1))
    roots = [(v * e.sqrt()[:, None]) @ v.mT for e, v in map(torch.linalg.eigh, (second, moment))]
    assert torch.allclose(loss(*best), torch.linalg.svdvals(roots[0] @ roots[1]).sum(-1).square(), rtol=1e-8)
    for t, m in zip(best, (second, moment), strict=True):
        flat = (t.mT @ m @ t).diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(flat, flat.mean(-1, keepdim=True).expand_as(flat), rtol=1e-8)
    for i in range(9):
        other = best[0] @ torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        assert bool((loss(other, other.inverse().mT) > loss(*best) * 1.001).all())
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
    traces = [m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (second, moment)]
    assert torch.allclose(loss(turn, turn), traces[0] * traces[1]) and bool((traces[0] * traces[1] > loss(*best)).all())


def test_codebooks_in_the_metric_lose_less_of_what_attention_reads() -> None:
    """e M e^T of Gaussian rows coded in runs of four components, and taken back by the inverse of the basis; learnt and measured on
    different rows."""
    covariance, moment = moments(3)
    root = torch.linalg.cholesky(covariance)
    drawn = torch.randn(HEADS, 4000, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.einsum("hde,hne->hnd", root, drawn)
    lost = {}
    for metric in ("none", "attention"):
        spec = SideSpec(
            bits=1.25, kind="vector", couple=4, code_bits=5, transform="klt", domain="block", center=True, metric=metric
        )
        tables: dict[str, torch.Tensor] = {}
        _klt("k", spec, covariance, None if metric == "none" else moment, tables)
        basis = tables["k_basis"].double()
        z = y @ basis
        book = learn_book(z[:, :2000], None, spec)  # [H, D/4, 2^5, 4]
        runs = z[:, 2000:].unflatten(-1, (-1, 4)).transpose(1, 2).flatten(0, 1).float()
        near = assign(runs, book.flatten(0, 1))[0]
        found = book.flatten(0, 1).gather(1, near[..., None].expand(-1, -1, 4)).unflatten(0, (HEADS, -1)).transpose(1, 2).flatten(2)
        error = found.double() @ torch.linalg.inv(basis) - y[:, 2000:]
        lost[metric] = torch.einsum("hnd,hde,hne->", error, moment, error)
        assert (basis.mT.inverse() - tables.get("k_unbasis", tables["k_basis"]).double()).abs().max() <= 1e-4 * basis.abs().max()
    assert lost["attention"] < 0.6 * lost["none"]

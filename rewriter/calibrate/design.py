"""From a declaration and statistics to the codec of one layer and its tables.

Formula    klt: eigenvalues of the centred covariance, falling; the next run of 8 components to gain a bit is the one with the
           largest sum of lambda_c (D(b) - D(b + 1)), D the quantizer's distortion of a unit Gaussian; all heads share widths
           rotatekv: permutation = argsort of the mean of the rotated key over all H·D channels
Source     ours; RotateKV, arXiv 2501.16383 (reorder)
Shapes     tables as in kvsink.codecs.codec
Raises     CalibrationError when statistics are missing, UnsupportedError when the shape cannot carry the declaration
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvsink.calibrate.codebooks import Turn, learn
from kvsink.calibrate.grouping import grouped_basis
from kvsink.calibrate.metric import basis_of_attention, condition, damped, spread_basis, turned_moment
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.statistics import SampleNeed
from kvsink.codecs import SideSpec, hadamard_order
from kvsink.codecs.codec import TABLE_TOKENS
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.kernels import stages
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.kernels.quantize import SIGMA_KINDS

__all__ = ["Design", "design_key", "design_value", "gather_needs", "key_blocks", "needs_calibration", "sample_need", "water_fill"]

CPU = torch.device("cpu")
Angles = Callable[[int], tuple[Tensor, Tensor]]  # block length → offset cos, sin [n, R]


@dataclass(frozen=True)
class Design:
    """A resolved declaration and the tables it needs, names as the codec names them."""

    spec: SideSpec
    tables: dict[str, Tensor]


def needs_calibration(spec: SideSpec) -> bool:
    """Whether a side cannot be built without statistics."""
    learns = spec.packed and QUANTIZERS[spec.kind].learns(spec) > 0
    tables = spec.center or spec.reorder or spec.transform == "klt" or (spec.kind in SIGMA_KINDS and not spec.flat)
    return learns or (spec.packed and tables)


def sample_need(*sides: SideSpec) -> SampleNeed | None:
    """What the quantizers of these sides (resolved) learn from, together; None when they learn nothing."""
    need = None
    for side in sides:
        rows = QUANTIZERS[side.kind].learns(side) if side.packed else 0
        if rows:
            one = SampleNeed(rows, side.weights.startswith("fisher"), side.weights == "error")
            need = one if need is None else need | one
    return need


def gather_needs(pairs: Iterable[tuple[SideSpec, SideSpec]], heads: int, dim: int) -> tuple[tuple[int, ...], SampleNeed | None]:
    """Key block lengths and samples of one layer that serve all given pairs of sides: what `calibrate` is to be asked for."""
    blocks: set[int] = set()
    need = None
    for pair in pairs:
        key, value = (side.resolved(heads, dim) for side in pair)
        blocks |= set(key_blocks(key, value))
        one = sample_need(key, value)
        if one is not None:
            need = one if need is None else need | one
    return tuple(sorted(blocks)), need


def key_blocks(spec: SideSpec, value: SideSpec | None = None) -> tuple[int, ...]:
    """Block lengths whose key statistics the declaration needs; 0: of keys after RoPE, which also stand for what a metric of values
    asks of attention."""
    if needs_calibration(spec):
        return (spec.block if spec.domain == "block" else 0 if spec.transform == "klt" else TABLE_TOKENS,)
    return (0,) if value is not None and value.packed and value.metric != "none" else ()


def water_fill(variance: Tensor, bits: float, run: int = 8, kind: str = "lloyd") -> tuple[int, ...]:
    """Widths per run of channels for an average of `bits`; variance [H, D]. Among runs of equal variance the first is widest.

    Widths lie within one below and two above the average, and within what the quantizer `kind` has (0 only below 1.5 bits).
    """
    quantizer = QUANTIZERS[kind]
    runs = variance.double().mean(0).unflatten(0, (-1, run)).sum(-1)  # [D / 8]
    low = max(quantizer.least if bits < 1.5 else 1, int(bits) - 1)
    high = min(quantizer.most, int(bits) + 2)
    widths = [low] * len(runs)
    budget = round(bits * len(runs)) - sum(widths)
    for _ in range(budget):
        gains = [
            float(v) * (quantizer.distortion(w) - quantizer.distortion(w + 1)) if w < high else -1.0
            for v, w in zip(runs, widths, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        widths[best] += 1
    return tuple(widths)


def eigenbasis(covariance: Tensor, spec: SideSpec) -> tuple[Tensor, Tensor]:
    """Eigenvalues [H, D] and vectors [H, D, D] of a covariance, falling; for codebooks, dealt out over their runs."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1).clamp_min(0.0), vectors.flip(-1)
    if not spec.couple:
        return values, vectors
    return _dealt(values, values, spec.couple), _dealt(vectors, values, spec.couple)


def _dealt(columns: Tensor, values: Tensor, couple: int) -> Tensor:
    """The last dimension [H, .., D] in the order in which falling variances [H, D] are dealt out over runs."""
    order = torch.stack([balanced(v, couple) for v in values])
    return columns.gather(-1, order if columns.dim() == 2 else order[:, None].expand_as(columns))


def balanced(values: Tensor, couple: int) -> Tensor:
    """An order of falling variances [D] in which runs of `couple` have nearly equal products: each goes, the largest first,
    to the run with room whose product is smallest (eigenvalue allocation, Ge et al. 2013)."""
    runs: list[list[int]] = [[] for _ in range(len(values) // couple)]
    logs = values.double().clamp_min(1e-12 * float(values.max()) + 1e-30).log()
    logs = logs - logs.min() + 1.0
    for i in range(len(values)):
        min((r for r in runs if len(r) < couple), key=lambda r: float(logs[r].sum())).append(i)
    return torch.tensor([i for run in runs for i in run])


def rotated_variance(covariance: Tensor, spec: SideSpec) -> Tensor:
    """Variances [H, D] of the channels that the quantizer sees, behind a Hadamard rotation too; covariance [H, D, D] before it."""
    if spec.transform == "hadamard" and spec.kind in SIGMA_KINDS:
        if spec.heads_per_group > 1:
            raise UnsupportedError(
                f"{spec.kind} takes a deviation per channel, which a rotation across heads mixes; use heads_per_group=1"
            )
        covariance = hadamard_ref(hadamard_ref(covariance, spec.order).mT, spec.order)
    return torch.diagonal(covariance, dim1=-2, dim2=-1)


def deviations(variance: Tensor) -> Tensor:
    """sigma float32 [H, D], no channel's below 2^-10 of its head's largest: less is lost in the rounding of a covariance, and a row
    that leaves the span of the calibration rows would be all in channels of next to no deviation."""
    sigma = variance.clamp_min(0.0).sqrt()
    return torch.maximum(sigma, 2.0**-10 * sigma.amax(-1, keepdim=True)).clamp_min(1e-6).float()


def sigmas(prefix: str, spec: SideSpec, variance: Tensor) -> dict[str, Tensor]:
    """sigma [H, D], and what levels are read with where their error is not to depend on the number."""
    out = {f"{prefix}_sigma": deviations(variance)}
    if spec.unbiased:
        kept = [1.0 - QUANTIZERS[spec.kind].distortion(w) for w in spec.widths for _ in range(8)]
        out[f"{prefix}_unsigma"] = out[f"{prefix}_sigma"] / torch.tensor(kept)
    return out


def _flat(prefix: str, spec: SideSpec, heads: int, dim: int, size: float, tables: dict[str, Tensor]) -> Design:
    """A side that needs no statistics: of a flat kind with the power of two near `size` as deviation of every channel."""
    if spec.packed and spec.flat:
        power = round(math.log2(size)) - spec.exponent if 0 < size < math.inf else 0
        variance = torch.full((heads, dim), 4.0**power, dtype=torch.float64)
        spec = replace(spec, widths=water_fill(variance, spec.bits, kind=spec.kind))
        tables.update(sigmas(prefix, spec, variance))
    return Design(spec, tables)


def _need(found: object, layer: int, what: str) -> None:
    if found is None:
        raise CalibrationError(f"layer {layer} has no {what} statistics in this record; calibrate with this method again")


def _asked(record: Calibration, layer: int, spec: SideSpec, rotary: int) -> Tensor:
    """The second moment [H, D, D] of the queries that meet keys of the declaration."""
    queries = record.queries.get(layer)
    _need(queries, layer, "query")
    assert queries is not None
    if spec.domain == "block":
        moment, full = turned_moment(queries.moment(), rotary), queries.second[:, rotary:, rotary:]
    else:
        _need(queries.roped, layer, "query")
        assert queries.roped is not None
        moment = full = queries.roped
    seen, least = int(queries.count), 2 * full.shape[-1]
    if seen < least:
        raise CalibrationError(
            f"layer {layer}: {seen} queries are too few for their second moment of {full.shape[-1]} dimensions "
            f"(condition number {condition(full):.0e}); calibrate on at least {-(-record.tokens * least // max(1, seen))} tokens"
        )
    return moment


def _klt(side: str, spec: SideSpec, covariance: Tensor, moment: Tensor | None, tables: dict[str, Tensor]) -> Tensor:
    """Variances [H, D] in the calibrated basis of a side, which is put into `tables` with its way back where that is another."""
    balanced = spec.spread == "balanced"
    covariance = damped(covariance) if balanced else covariance
    if moment is None:
        variance, forth = eigenbasis(covariance, spec)
        back = forth
    elif spec.metric == "directions":
        variance, forth = eigenbasis(moment, spec)
        back = forth
    else:
        variance, forth, back = basis_of_attention(covariance, moment)
        if spec.couple:
            variance, forth, back = (_dealt(t, variance, spec.couple) for t in (variance, forth, back))
    if spec.spread != "none":
        energy = torch.diagonal(covariance, dim1=-2, dim2=-1).sum(-1) if balanced else None
        forth, back = spread_basis(variance, (forth, back), hadamard_order(forth.shape[-1]), energy)
    tables[f"{side}_basis"] = forth.float().contiguous()
    if spec.own_inverse:
        tables[f"{side}_unbasis"] = back.float().contiguous()
    return variance


def _grouped(spec: SideSpec, layer: int, record: Calibration, rotary: int, tables: dict[str, Tensor]) -> None:
    """The basis of keys in groups, put into `tables`."""
    rows = record.samples.get(layer)
    _need(rows, layer, "sample")
    assert rows is not None
    moment = None
    if spec.metric != "none":
        moment = getattr(record.queries.get(layer), "causal", None)
        _need(moment, layer, "query")
    forth, back = grouped_basis(moment, rows.keys.transpose(0, 1), rotary, spec.couple, spec.kind == "vector-normed")
    tables["k_basis"] = forth.float().contiguous()
    if spec.own_inverse:
        tables["k_unbasis"] = back.float().contiguous()


def design_key(
    spec: SideSpec,
    layer: int,
    heads: int,
    dim: int,
    record: Calibration,
    angles: Angles,
    device: torch.device = CPU,
    turn: Turn | None = None,
    size: float = 1.0,
) -> Design:
    """The key codec of one layer. `angles` gives the offset angles of a block length; codebooks are learnt on `device`; `turn`
    says where rows that are coded after RoPE may stand, and the angles there; size: of rows, for a flat kind."""
    spec = spec.resolved(heads, dim)
    tables: dict[str, Tensor] = {}
    if not spec.packed:
        return Design(spec, tables)
    if spec.domain == "block" and spec.block > 1:
        tables["offset_cos"], tables["offset_sin"] = (t.float().cpu() for t in angles(spec.block))
    if not needs_calibration(spec):
        return _flat("k", spec, heads, dim, size, tables)
    stats = record.keys.get((layer, key_blocks(spec)[0]))
    _need(stats, layer, "key")
    assert stats is not None
    stats = stats.scaled(2.0**-spec.exponent) if spec.exponent else stats
    cos, sin = (t.double().cpu() for t in angles(stats.block))
    mean = stats.mean()
    mu2, covariance = stats.centred(cos, sin)
    if spec.transform == "klt":
        moment = _asked(record, layer, spec, cos.shape[-1]) if spec.metric != "none" else None
        if spec.center:
            tables["k_mean2"] = (mu2 if spec.domain == "block" else mean).float()
        else:
            covariance = stats.second / stats.count.sum()
        variance = _klt("k", spec, covariance, moment, tables)
    else:
        variance = rotated_variance(covariance, spec)
    if spec.transform == "grouped":
        _grouped(spec, layer, record, cos.shape[-1], tables)
    if spec.center and not (spec.transform == "klt" and spec.domain == "post"):
        table = stats.block_table(cos, sin)
        tables["k_mean"] = mean.float()
        tables["k_table"] = (table + (mu2[:, None] if spec.transform == "klt" else 0.0)).float().contiguous()
    if spec.reorder:
        turned = mean[None, :, None, :]  # [1, H, 1, D]
        if spec.transform == "hadamard":
            turned = stages.hadamard_heads(turned, spec.order, spec.heads_per_group)
        order = turned.flatten().argsort(stable=True)
        tables["k_perm"], tables["k_unperm"] = order, order.argsort()
    if spec.kind in SIGMA_KINDS:
        spec = replace(spec, widths=water_fill(variance, spec.bits, kind=spec.kind))
        tables.update(sigmas("k", spec, variance))
    if QUANTIZERS[spec.kind].learns(spec):
        if spec.domain != "block" and spec.kind != "static" and spec.transform != "klt":
            raise UnsupportedError(f"{spec.kind} keys are in the block domain; set domain='block' with a block length")
        tables.update(learn("k", spec, layer, record, tables, device, turn))
    return Design(spec, tables)


def design_value(
    spec: SideSpec, layer: int, heads: int, dim: int, record: Calibration, device: torch.device = CPU, size: float = 1.0
) -> Design:
    """The value codec of one layer; the tables are in the basis of the weights as they are now. size: as of `design_key`."""
    spec = spec.resolved(heads, dim)
    if not needs_calibration(spec):
        return _flat("v", spec, heads, dim, size, {})
    stats = record.values.get(layer)
    _need(stats, layer, "value")
    assert stats is not None
    stats = stats.scaled(2.0**-spec.exponent) if spec.exponent else stats
    tables: dict[str, Tensor] = {}
    covariance = stats.covariance()
    if spec.center:
        tables["v_mean"] = stats.mean().float()
    if spec.transform == "klt":
        moment = None
        if spec.metric != "none":
            directions = spec.metric == "directions"
            moment = getattr(record.queries.get(layer), "scored" if directions else "reads", None)
            _need(moment, layer, "score" if directions else "output projection")
            covariance = covariance if spec.center else stats.second / stats.count
        variance = _klt("v", spec, covariance, moment, tables)
    else:
        variance = rotated_variance(covariance, spec)
    if spec.kind in SIGMA_KINDS:
        spec = replace(spec, widths=water_fill(variance, spec.bits, kind=spec.kind))
        tables.update(sigmas("v", spec, variance))
    if QUANTIZERS[spec.kind].learns(spec):
        tables.update(learn("v", spec, layer, record, tables, device))
    return Design(spec, tables)

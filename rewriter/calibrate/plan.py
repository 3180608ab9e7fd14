"""The automatic plan: a width for the keys and for the values of every layer, under one budget of counted bits.

Formula    D(layer, side, w) = KL to the 16-bit model when that side of that layer alone is coded with w bits, in strict reading;
           measured at two widths, log D straight between and beyond them. From the fewest bits, the step that takes away the
           most D per counted bit comes next, while the budget holds. The result replaces the best equal widths only where its
           KL on windows that were not used before is smaller
Source     ours; the greedy is that of reverse water-filling over convex curves
Shapes     ids [N, T] windows of calibration text: the first half for D, the second for the last comparison
Units      KL in nats per token; counted bits per element, as `kvsink.report` counts them
Raises     KvsinkError when the budget is below what the method can reach; the text names what it can
Cost       4 forward passes per layer over the sensitivity windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import SideSpec
from kvsink.errors import CalibrationError, KvsinkError, UnsupportedError
from kvsink.kernels.quantize import SIGMA_KINDS
from kvsink.methods import Method
from kvsink.model.decoder import Decoder
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

if TYPE_CHECKING:
    from kvsink.report import Report

__all__ = ["Curves", "Plan", "allocate", "candidates", "choose_plan", "layers_text", "planned", "sides"]

Widths = tuple[tuple[float, float], ...]  # of every layer: key and value bits; (16, 16) where a layer is left alone
Rewrite = Callable[..., "Report"]
Progress = Callable[[str, int, int], None]

WHOLE = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
TOKENS = 512  # of a window that is measured
WINDOWS = 4  # of either half at most
_SIDES = (0, 1)


@dataclass(frozen=True)
class Plan:
    """What was chosen: the text for `layers=`, the widths, and the held-out KL of this plan and of its equal-width rival."""

    layers: str
    widths: Widths
    bits: float
    kl: float
    uniform: tuple[float, float]
    uniform_kl: float

    @property
    def note(self) -> str:
        """One line for the report."""
        rival = f"equal widths {self.uniform[0]:g}/{self.uniform[1]:g} {self.uniform_kl:.4f}"
        if len(set(self.widths)) == 1 or self.kl == self.uniform_kl:
            return f"automatic plan: equal widths were kept, held-out KL of {rival}"
        return f"automatic plan: {self.bits:.3f} bits, held-out KL {self.kl:.4f} against {rival}"


@dataclass
class Curves:
    """Damage and counted bits of every (layer, side) by width; layers that are left alone have no entry."""

    damage: dict[tuple[int, int], dict[float, float]]
    cost: dict[tuple[int, int], dict[float, float]]
    fixed: float  # counted bits of the layers that are left alone, both sides
    layers: int

    def bits(self, chosen: dict[tuple[int, int], float]) -> float:
        """Counted bits per element of the whole model."""
        return (self.fixed + sum(self.cost[at][w] for at, w in chosen.items())) / (2 * self.layers)

    def total(self, chosen: dict[tuple[int, int], float]) -> float:
        """Predicted damage of the whole model: sides add up."""
        return sum(self.damage[at][w] for at, w in chosen.items())


def straight(widths: Iterable[float], low: tuple[float, float], high: tuple[float, float]) -> dict[float, float]:
    """Damage at `widths` from two measured points (width, damage): a straight line in log damage, falling by at least 2x per bit.

    >>> straight((1.0, 2.0, 3.0), (1.0, 0.16), (3.0, 0.01))
    {1.0: 0.16, 2.0: 0.04, 3.0: 0.01}
    """
    (w0, d0), (w1, d1) = low, high
    d0, d1 = max(d0, 1e-12), max(d1, 1e-12)
    fall = math.log2(d0 / d1) / (w1 - w0) if w1 > w0 else 2.0
    fall = max(fall, 1.0)
    return {w: round(d0 * 2.0 ** (-fall * (w - w0)), 15) for w in widths}


def allocate(curves: Curves, budget: float) -> dict[tuple[int, int], float]:
    """Widths per (layer, side) for at most `budget` counted bits. Raises KvsinkError naming the least that can be reached."""
    chosen = {at: min(widths) for at, widths in curves.cost.items()}
    if curves.bits(chosen) > budget + 1e-9:
        raise KvsinkError(
            f"a budget of {budget:g} bits cannot be reached: this method and protection need at least "
            f"{math.ceil(1000 * curves.bits(chosen)) / 1000:g} counted bits; raise --bits, or protect and keep fewer rows"
        )
    room = 2 * curves.layers * (budget + 1e-9) - curves.fixed - sum(curves.cost[at][w] for at, w in chosen.items())
    while True:
        best, rate = None, 0.0
        for at, w in chosen.items():
            for wider in (x for x in curves.cost[at] if x > w):
                price = curves.cost[at][wider] - curves.cost[at][w]
                gain = curves.damage[at][w] - curves.damage[at][wider]
                if price <= room and gain > rate * max(price, 1e-12):
                    best, rate = (at, wider, price), gain / max(price, 1e-12)
        if best is None:
            return chosen
        at, wider, price = best
        chosen[at], room = wider, room - price


def layers_text(widths: Widths) -> str:
    """The `layers=` text of a plan; layers that are left alone are not named."""
    return ";".join(f"{i}:key_bits={k:g},value_bits={v:g}" for i, (k, v) in enumerate(widths) if (k, v) != (16, 16))


class _Meter:
    """KL of the model as it is rewritten now to itself in 16 bit, over fixed windows, every row read back from its code."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids.to(place_of(model))
        with torch.no_grad():
            self.log_p = [self._log_probs(row[None], None) for row in self.ids]

    def _log_probs(self, rows: Tensor, cache: Any) -> Tensor:
        options = {**given_cache(self.model, cache), "use_cache": True} if cache is not None else {"use_cache": False}
        return torch.log_softmax(self.model(input_ids=rows, **options).logits.float(), -1)

    def kl(self) -> float:
        """Nats per token."""
        total = 0.0
        with torch.no_grad():
            for row, log_p in zip(self.ids, self.log_p, strict=True):
                cache = KVSinkCache.for_model(self.model, 1, max_length=len(row), strict=True)
                log_q = self._log_probs(row[None], cache)
                total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        if not math.isfinite(total):
            raise CalibrationError("the plan cannot be measured: the model's logits are not finite; try float32")
        return max(0.0, total / len(self.ids))


def _halves(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows for the sensitivity and other ones for the last comparison; a single window is cut in two."""
    if len(ids) == 1:
        ids = ids[:, : ids.shape[1] // 2 * 2].reshape(2, -1)
    if ids.shape[1] < 2:
        raise CalibrationError(f"{ids.numel()} tokens are too few for plan='auto'; give windows of at least 2 tokens")
    ids = ids[:, :TOKENS]
    half = len(ids) // 2
    return ids[:half][:WINDOWS], ids[half:][:WINDOWS]


def candidates(method: Method) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Widths worth trying for keys and for values: whole bits, and quarters up to 4 where a quantizer takes them."""

    def of(side: SideSpec, below: tuple[float, SideSpec] | None) -> tuple[float, ...]:
        quarters = [w / 4 for w in range(4, 17) if below is None or w / 4 >= below[0]]
        return tuple(sorted({*WHOLE, *quarters})) if side.kind in SIGMA_KINDS else WHOLE

    return of(method.key, method.key_below), of(method.value, method.value_below)


def sides(method: Method, heads: int, dim: int) -> list[tuple[SideSpec, SideSpec]]:
    """Both sides at every width the plan may try and the method can take: what a calibration record must serve."""
    found = []
    for which, widths in zip(("key", "value"), candidates(method), strict=True):
        for w in widths:
            try:
                side = method.side(which, w)
                side.resolved(heads, dim)
            except KvsinkError:
                continue
            found.append((side, SideSpec()) if which == "key" else (SideSpec(), side))
    return found


def _costs(
    run: Rewrite, base: tuple[float, float], budget: float, widths: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[Curves, Report]:
    """Counted bits of every layer and side at every width that the method can take, weighted by the elements that a layer holds.

    A width changes the codes of every layer by the same number of bits, so one layer is coded at each of them.
    """
    report = run(key_bits=base[0], value_bits=base[1])
    packed = [r.layer for r in report.layers if r.packed]
    whole = sum(r.elements for r in report.layers)
    share = {r.layer: r.elements * len(report.layers) / whole for r in report.layers}  # of the elements, 1 where all are alike
    fixed = sum(share[r.layer] * (r.key_bits + r.value_bits) for r in report.layers if not r.packed)
    curves = Curves({}, {(i, s): {} for i in packed for s in _SIDES}, fixed, len(report.layers))

    def cost(side: int, w: float) -> float:
        pair = (w, 16) if side == 0 else (16, w)
        row = run(layers=_alone(packed, packed[0], *pair)).layers[packed[0]]
        return row.value_bits if side else row.key_bits

    for side in _SIDES:
        at_base = cost(side, base[side])
        tried = {*widths[side], base[side]} if base[side] != 16 else {16.0}
        for w in sorted(w for w in tried if w <= max(4.0, budget + 2, base[side])):
            try:
                more = cost(side, w) - at_base
            except KvsinkError:
                continue  # a width this method has no code for
            for i in packed:
                row = report.layers[i]
                curves.cost[i, side][w] = share[i] * ((row.value_bits if side else row.key_bits) + more)
    return curves, report


def _alone(layers: Iterable[int], one: int, key_bits: float, value_bits: float) -> str:
    """The `layers=` text that codes one layer and keeps the others exact."""
    exact = [f"{j}:key_bits=16,value_bits=16,protect=none,window=0" for j in layers if j != one]
    return ";".join([*exact, f"{one}:key_bits={key_bits:g},value_bits={value_bits:g}"])


def choose_plan(
    model: nn.Module,
    run: Rewrite,
    base: tuple[float, float],
    ids: Tensor,
    budget: float | None,
    widths: tuple[tuple[float, ...], tuple[float, ...]] = (WHOLE, WHOLE),
    progress: Progress | None = None,
) -> Plan:
    """The best plan found within `budget` counted bits; None stands for the counted bits of the widths `base`.

    run: `rewrite` with everything but widths given, changing no weights. widths: those to try for keys and for values.
    The model is left as the last trial left it.
    """
    tell = progress or (lambda what, done, total: None)
    first, second = _halves(ids)
    curves, report = _costs(run, base, 6.0 if budget is None else budget, widths)
    budget = report.bits if budget is None else budget
    lowest = {at: min(c) for at, c in curves.cost.items()}
    if curves.bits(lowest) > budget + 1e-9:
        curves.damage = {at: dict.fromkeys(c, 0.0) for at, c in curves.cost.items()}
        allocate(curves, budget)  # raises, with the least that can be reached
    _narrow(curves, base, budget)
    # the model itself, before any layer is coded: run() with everything exact
    run(key_bits=16, value_bits=16, protect="none")
    meter, held_out = _Meter(model, first), _Meter(model, second)
    layers = sorted({i for i, _ in curves.cost})
    total = 2 * len(curves.cost)
    for done, (at, costs) in enumerate(curves.cost.items()):
        points = []
        for w in _probes(costs, base[at[1]]):
            run(layers=_alone(layers, at[0], *((w, 16) if at[1] == 0 else (16, w))))
            points.append((w, meter.kl()))
            tell("planning", min(total, 2 * done + len(points)), total)
        curves.damage[at] = straight(costs, points[0], points[-1])
    mine = allocate(curves, budget)
    rivals = _uniform(curves, base, budget)

    def finish(chosen: dict[tuple[int, int], float]) -> tuple[float, Widths]:
        plan = tuple((chosen[i, 0], chosen[i, 1]) if (i, 0) in chosen else (16.0, 16.0) for i in range(curves.layers))
        run(layers=layers_text(plan))
        return held_out.kl(), plan

    found = [(finish(chosen), pair, chosen) for pair, chosen in rivals]
    (kl, plan), uniform, chosen = min(found, key=lambda f: f[0][0]) if found else (finish(mine), base, mine)
    uniform_kl = kl if found else math.inf
    if found and mine != chosen:
        planned = finish(mine)
        if planned[0] < kl:
            (kl, plan), chosen = planned, mine
    tell("planning", total, total)
    return Plan(layers_text(plan), plan, curves.bits(chosen), kl, uniform, uniform_kl)


def _narrow(curves: Curves, base: tuple[float, float], budget: float) -> None:
    """Leave the widths near the one that equal widths could pay: from one bit below it to two above, and the base's own."""
    common = set.intersection(*(set(c) for c in curves.cost.values()))
    equal = [w for w in common if curves.bits(dict.fromkeys(curves.cost, w)) <= budget + 1e-9]
    middle = math.floor(max(equal, default=1.0))
    for at, costs in curves.cost.items():
        kept = {w: c for w, c in costs.items() if max(1, middle - 1) <= w <= middle + 2 or w == base[at[1]]}
        curves.cost[at] = kept or costs
    if curves.bits({at: min(c) for at, c in curves.cost.items()}) > budget + 1e-9:
        raise KvsinkError(f"a budget of {budget:g} bits leaves no width to choose; raise --bits")


def _probes(costs: dict[float, float], base: float) -> tuple[float, ...]:
    """The two widths at which damage is measured: the least, and the whole width nearest to two bits above it."""
    least = min(costs)
    rest = [w for w in costs if w > least and w == int(w)] or [w for w in costs if w > least]
    return (least, min(rest, key=lambda w: abs(w - least - 2))) if rest else (least,)


def _uniform(
    curves: Curves, base: tuple[float, float], budget: float
) -> list[tuple[tuple[float, float], dict[tuple[int, int], float]]]:
    """Equal widths in all layers that fit: the two with the least predicted damage, and the base when it fits."""
    shared = [set.intersection(*(set(c) for at, c in curves.cost.items() if at[1] == s)) for s in _SIDES]
    fitting = []
    for key, value in product(*(sorted(s) for s in shared)):
        pair = (key, value)
        chosen = {at: pair[at[1]] for at in curves.cost}
        if curves.bits(chosen) <= budget + 1e-9:
            fitting.append((pair, chosen))
    fitting.sort(key=lambda f: curves.total(f[1]))
    best = fitting[:2]
    return best + [f for f in fitting[2:] if f[0] == base]


def planned(
    decoder: Decoder,
    run: Rewrite,
    method: Method,
    base: tuple[float, float],
    ids: Tensor,
    budget: float | None,
    progress: Progress | None = None,
) -> Plan:
    """`choose_plan` over the widths that a method can take; the model is afterwards as it was."""
    if method.modality is not None:
        raise UnsupportedError(f"method {method.name} gives its layers widths by their attention pattern; use --plan uniform")
    earlier, training = decoder.runtime, decoder.model.training
    decoder.model.eval()
    try:
        return choose_plan(decoder.model, run, base, ids, budget, candidates(method), progress)
    finally:
        decoder.restore(earlier)
        decoder.model.train(training)

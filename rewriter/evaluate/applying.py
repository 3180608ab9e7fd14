"""A design goes into a model: value rotations into its weights, the runtime onto its modules, proven or taken back.

Source     ours
Raises     UnsupportedError when the model shows a fault; it is then as it was before
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvsink.calibrate.choices import Chosen, refusal
from kvsink.calibrate.design import Design
from kvsink.calibrate.record import Calibration
from kvsink.codecs import Codec
from kvsink.codecs.protect import anchors_for_layer, segments_for_layer
from kvsink.errors import UnsupportedError
from kvsink.evaluate.folding import check_fold, folded_in, online_layers
from kvsink.evaluate.selfcheck import Check, check_cache
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.model.decoder import Decoder
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan
from kvsink.report import Report, make_report

__all__ = ["apply"]


def apply(
    decoder: Decoder,
    chosen: Chosen,
    record: Calibration,
    designed: Mapping[int, tuple[Design, Design]],
    fold: bool = True,
    storage: torch.dtype | None = None,
    check: bool = True,
) -> Report:
    """Fold, attach and check. fold: put value rotations into the weights; storage: dtype these will be saved in, when it is
    narrower; check: compare with the stock model before anything is kept. A model without weights has what would be folded into
    them in `stream.folds` afterwards."""
    where, stream, notes = decoder.where, decoder.stream, chosen.notes
    orders = {i: v.spec.order for i, (_, v) in designed.items() if v.spec.transform == "hadamard" and v.spec.heads_per_group == 1}
    online, checked, logits = online_layers(decoder, orders if fold else {}, storage, check)
    if online:
        some = "" if len(online) == len(orders) else f" in layers {sorted(online)}"
        notes.append(f"value rotation runs online{some}: {online[min(online)]}")
    into = {i: order for i, order in orders.items() if fold and i not in online}
    runtime = _runtime(decoder, chosen, record, designed, frozenset(into))
    if stream is not None:
        stream.folds = [(where.attentions[i], order) for i, order in into.items()]
        stream.check_rest()
    with folded_in(decoder, into if stream is None else {}, storage) as keep:
        decoder.restore(runtime)
        try:
            if check:
                whole = check_fold(decoder, logits, storage) if logits is not None and into else None
                checked = replace(_checked(decoder, runtime, notes), fold=checked.fold, folded=whole, online=online)
        except BaseException:
            decoder.restore(None)
            raise
        keep()
    report = make_report(runtime, decoder.name, decoder.dtype, decoder.device, chosen.base.protect, record.tokens, notes)
    report.check = checked if check else Check(skipped="--no-check: nothing was compared with the stock model")
    runtime.extra = {"check": report.check.as_dict()}  # goes into a folder that the model is saved to
    return report


def _runtime(
    decoder: Decoder, chosen: Chosen, record: Calibration, designed: Mapping[int, tuple[Design, Design]], folded: frozenset[int]
) -> Runtime:
    """Plans and tables of all layers; those of the layers in `folded` are in the basis of turned weights."""
    plans: list[LayerPlan] = []
    tables: dict[str, Tensor] = {}
    for i in range(len(decoder.where.attentions)):
        if i not in designed:
            plans.append(LayerPlan(None, (), refusal(decoder.config, decoder.where, i)))
            continue
        key_design, value_design = designed[i]
        value_spec, value_tables = value_design.spec, dict(value_design.tables)
        if i in folded:
            value_spec = replace(value_spec, folded=True)
            if "v_mean" in value_tables:
                value_tables["v_mean"] = hadamard_ref(value_tables["v_mean"], value_spec.order)
        segments = segments_for_layer(chosen.policies[i], i, record.stages)
        codec = Codec(
            key_design.spec,
            value_spec,
            tuple(s.count for s in segments),
            chosen.choices[i].window,
            anchors=anchors_for_layer(chosen.policies[i]),
        )
        tables.update({f"layers.{i}.{name}": t for name, t in {**key_design.tables, **value_tables}.items()})
        plans.append(LayerPlan(codec, segments))
    device = decoder.device if decoder.stream is None else torch.device("cpu")
    return decoder.carrying(tuple(plans), {k: t.to(device) for k, t in tables.items()}, record.stages, chosen.method.name)


def _checked(decoder: Decoder, runtime: Runtime, notes: list[str]) -> Check:
    """The self-check; where attention over codes fails it, once more with keys and values handed out whole."""
    try:
        return check_cache(decoder, runtime)
    except UnsupportedError as error:
        where = runtime.anatomy
        packed = frozenset(i for i, p in enumerate(runtime.plans) if p.codec is not None)
        if decoder.stream is not None or packed <= where.apart or not runtime.asks:
            raise
        runtime.anatomy = replace(where, apart=where.apart | packed)
        try:
            found = check_cache(decoder, runtime)
        except UnsupportedError:
            raise error from None
    notes.append("attention is handed keys and values read back whole: the model computes more from them than attention alone")
    return found

"""Proof that an exported model is the torch model: checked, shape-inferred, and run beside it in onnxruntime.

Every step gives both the state of the torch cache, so that what is compared is one step: a prefill into an empty cache, a chunk,
single tokens; two rows, one of them padded on the left. A graph of flavour gqa, whose operator reads new rows from their codes,
is compared with a strict cache: one row in chunks, two rows whole.

Formula    logits: |difference| <= 1e-4 · max(1, max |logits| / 10); bytes of new codes and scales: equal, but for rows that stand
           on a threshold to float32 rounding (`kvsink.export.ties`), at most one byte in a thousand. There the torch model goes on
           with the graph's codes: a strict cache reads the new rows from them, so that one tie moves all that later layers code;
           exact rows: the same sorted scores, of which equal ones may belong to other rows (equal tokens have equal scores)
           in float64 the bound is 1e-12, and all bytes are equal
Raises     ExportError naming the first tensor that differs, and by how much
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.export.errors import ExportError
from kvsink.export.runner import OnnxGenerator
from kvsink.export.state import FIXED, STATE_OF, past_names
from kvsink.export.ties import Ties
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of

__all__ = ["TIES", "check_file", "check_run"]

TIES = 1e-3
_STEPS = (17, 9, 1, 1, 1)
_WHOLE = (26, 1, 1, 1)  # of two rows, where the operator takes a chunk behind a past for one row only
_PADDING = 3


def check_file(path: Path) -> None:
    """onnx.checker with full shape inference."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and inference raise kinds of their own
        first = str(error).strip().splitlines()[0][:200]
        raise ExportError(f"the exported graph does not pass onnx.checker ({first}); please report the model") from error


def check_run(path: Path, model: Any, ids: Tensor) -> dict[str, Any]:
    """Run the graph at `path` beside `model` on ids [2, at least 29]; returns what was compared."""
    runner = OnnxGenerator(path)
    if not runner.one_row:
        return _check_steps(runner, model, ids, _STEPS)
    one, two = _check_steps(runner, model, ids[:1], _STEPS), _check_steps(runner, model, ids, _WHOLE)
    return {name: (max if name == "largest_logit_difference" else sum)((one[name], two[name])) for name in one}


def _check_steps(runner: OnnxGenerator, model: Any, ids: Tensor, steps: Sequence[int]) -> dict[str, Any]:
    rows = len(ids)
    wide = runner.manifest["dtype"] == "float64"
    takes, given = "input_ids", ids
    if runner.embeds:
        takes, given = "inputs_embeds", model.get_input_embeddings()(ids).detach()
    cache = KVSinkCache.for_model(model, batch_size=rows, strict=runner.one_row)
    mask = torch.ones_like(ids)
    mask[1:, : _PADDING if runner.manifest.get("padding", True) else 0] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    past: Mapping[str, Any] = runner.empty(rows)
    at, worst, counted, ties = 0, 0.0, 0, 0
    for step in steps:
        new, upto = slice(at, at + step), at + step
        new_ids, seen_mask, new_positions = (t.numpy() for t in (given[:, new], mask[:, :upto], positions[:, new]))
        logits, values = runner.step(new_ids, seen_mask, new_positions, past)
        present = runner.arrays(values)
        seen = mask[:, new].bool().numpy()
        with torch.no_grad(), Ties(runtime_of(model), present, at, seen).followed() as found:
            wanted = model(
                **{takes: given[:, new]},
                attention_mask=mask[:, :upto],
                position_ids=positions[:, new],
                use_cache=True,
                **given_cache(model, cache),
            ).logits
        held = _state(cache, present, upto, runner.one_row)
        for name, there in held.items():
            _compare(name, present[name], there)
        off = float(np.abs(logits - wanted.numpy())[seen].max())
        limit = (1e-12 if wide else 1e-4) * max(1.0, float(wanted.abs().max()) / 10)
        if not off <= limit:
            raise ExportError(
                f"logits of the exported graph differ by {off:.2g} at tokens {at} to {upto - 1}, more than {limit:.2g}; "
                "nothing was written, please report the model"
            )
        worst, counted, ties = max(worst, off), counted + found.bytes, ties + found.different
        past = {name: runner.value(array) for name, array in held.items()}
        at = upto
    if ties > (0 if wide else TIES * max(counted, 1000)):
        raise ExportError(
            f"{ties} of {counted} packed bytes of the exported graph differ from the torch cache; nothing was written, please "
            "report the model"
        )
    return {"tokens": int(mask[:, :at].sum()), "largest_logit_difference": worst, "packed_bytes": counted, "different_bytes": ties}


def _state(cache: KVSinkCache, present: dict[str, Any], length: int, signed: bool) -> dict[str, Any]:
    """The torch cache by graph name; layers left alone have a window of their own there and keep what the graph says.

    signed: codes of 8 bits are int8 in the graph, less 128.
    """
    assert cache.shared.positions is not None
    out = dict(present)
    if "positions" in present:
        out["positions"] = cache.shared.positions[:, :length].numpy().copy()  # the cache goes on writing in place
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVSinkLayer):
            for name in past_names(layer.codec):
                tensor = getattr(layer, STATE_OF[name])
                held = (tensor if name in FIXED else tensor[:, :, :length]).numpy().copy()
                wide = signed and held.dtype == np.uint8 and present[f"{i}.{name}"].dtype == np.int8
                out[f"{i}.{name}"] = (held ^ 128).view(np.int8) if wide else held
    return out


def _compare(name: str, here: Any, there: Any) -> None:
    """Raise for tensors of another kind, and for scores that are not near."""
    if here.shape != there.shape or here.dtype != there.dtype:
        raise ExportError(f"present.{name} is {here.dtype} {list(here.shape)}, not {there.dtype} {list(there.shape)}")
    if name.rpartition(".")[2] == "exact_score" and not np.allclose(here, there, rtol=1e-4, atol=1e-6):
        raise ExportError(f"present.{name} is {here.tolist()}, the torch cache has {there.tolist()}")

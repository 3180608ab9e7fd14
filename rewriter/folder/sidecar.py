"""The files beside the weights of a rewritten folder: the plan as JSON, the tables as safetensors. Read and written here only.

Raises     SidecarError when a file is missing, truncated, of another version, or belongs to other weights
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvsink.codecs import Codec
from kvsink.codecs.protect import Segment, SinkStage
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.errors import KvsinkError, SidecarError
from kvsink.model.anatomy import Anatomy, Heads, anatomy
from kvsink.model.digest import DIGEST, check_digest, digest
from kvsink.model.fingerprint import fingerprint, same_model
from kvsink.model.offload import is_held
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan
from kvsink.model.turning import Turning

__all__ = ["AGAIN", "FORMAT", "SIDECAR_JSON", "SIDECAR_TENSORS", "read_sidecar", "write_sidecar"]

SIDECAR_JSON = "kvsink.json"
SIDECAR_TENSORS = "kvsink_calibration.safetensors"
FORMAT = 1
AGAIN = "run kvsink-rewrite again, on the model it was made from"
_OURS = ("format", "method", "stages", "layers", "layer_types", "apart", "frequencies", "class", DIGEST)


def write_sidecar(
    folder: Path, model: nn.Module, runtime: Runtime, extra: dict[str, Any], weight: Callable[[str], Tensor] | None = None
) -> None:
    """Write both files for a model whose weights are the ones in `folder`. weight: gives one by name, if not the model."""
    a = runtime.anatomy
    plan = {
        "format": FORMAT,
        "method": runtime.method,
        "stages": [asdict(s) for s in runtime.stages],
        "layers": [
            {
                "codec": json.loads(p.codec.text()) if p.codec is not None else None,
                "segments": [[s.source, s.count] for s in p.segments],
                "reason": p.reason,
                "heads": list(heads),
                "turning": None if turning is None else turning.as_list(),
                "absent": absent,
            }
            for p, heads, turning, absent in zip(runtime.plans, a.layers, a.turnings, a.absent, strict=True)
        ],
        "layer_types": list(a.layer_types),
        "apart": sorted(a.apart),
        "frequencies": runtime.frequencies(),
        **extra,
        "class": type(model).__name__,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in runtime.tables.items()}
    tensors["fingerprint"] = fingerprint(model, weight)
    tensors["decoder"] = fingerprint(model, weight, runtime.anatomy.base)
    plan[DIGEST] = digest(tensors, plan)
    (folder / SIDECAR_JSON).write_text(json.dumps(plan, indent=1), encoding="utf-8")
    save_file(tensors, str(folder / SIDECAR_TENSORS), metadata={"format": str(FORMAT)})


def read_sidecar(model: nn.Module, json_path: str | Path, tensors_path: str | Path) -> Runtime:
    """The runtime of a loaded model, checked against its weights and its shape."""
    again = AGAIN
    try:
        plan = json.loads(Path(json_path).read_text(encoding="utf-8"))
        found = plan["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SidecarError(f"{json_path} cannot be read ({error}); {again}") from error
    if found != FORMAT:
        raise SidecarError(f"{json_path} has format {found!r}, this version reads {FORMAT}; {again}")
    try:
        with safe_open(str(tensors_path), framework="pt") as file:
            # copies: a tensor read from a file is the file's memory and changes, or goes, with it
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
        prints = {n: tensors.pop(n) for n in ("fingerprint", "decoder") if n == "fingerprint" or n in tensors}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise SidecarError(f"{tensors_path} cannot be read ({error}); {again}") from error
    if is_held(model) and not _fits(model, prints):
        made = plan.get("class", type(model).__name__)
        raise SidecarError(
            f"{json_path} was made for other weights than the ones beside it; {again}"
            if made == type(model).__name__
            else f"{json_path} was made for a {made}, and these are not its weights; load the folder as a {made} (not as a "
            f"{type(model).__name__})"
        )
    try:
        stages = tuple(SinkStage(**s | {"channels": tuple(s["channels"])}) for s in plan["stages"])
        plans = tuple(
            LayerPlan(
                Codec.parse(json.dumps(p["codec"])) if p["codec"] is not None else None,
                tuple(Segment(str(source), int(count)) for source, count in p["segments"]),
                str(p["reason"]),
            )
            for p in plan["layers"]
        )
        runtime = Runtime(model, plans, tensors, stages, str(plan["method"]), _known(anatomy(model), plan))
    except KvsinkError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise SidecarError(f"{json_path} is damaged ({error!r}); {again}") from error
    runtime.extra = {name: value for name, value in plan.items() if name not in _OURS}
    check_runtime(runtime, json_path)
    check_digest({**tensors, **prints}, plan, f"{json_path} with {Path(tensors_path).name}", SidecarError, again)
    _check_frequencies(runtime, plan.get("frequencies", {}), json_path)
    return runtime


def _check_frequencies(runtime: Runtime, saved: dict[str, list[float]], source: str | Path) -> None:
    """Raise SidecarError where the model turns its keys by other angles than the tables were made for."""
    if not saved or (runtime.rotary is not None and any(b.is_meta for b in runtime.rotary.buffers())):
        return
    for kind, found in runtime.frequencies().items():
        held = saved.get(kind, [])
        if len(held) != len(found) or any(abs(a - b) > 0.02 * abs(b) + 1e-9 for a, b in zip(found, held, strict=True)):
            raise SidecarError(
                f"{source} was made for other RoPE angles in its {kind.replace('_', ' ')} layers than the model was loaded with "
                "(rope parameters of its config, or of the call); load it with those of its config.json as written, or rewrite the "
                "model with the new ones"
            )


def _fits(model: nn.Module, prints: dict[str, Tensor]) -> bool:
    """Whether a model has the weights that were fingerprinted: all of them, or those of the decoder, where it was loaded by a class
    without the head or the towers of the one it was made from."""
    if same_model(prints["fingerprint"], fingerprint(model)):
        return True
    return "decoder" in prints and same_model(prints["decoder"], fingerprint(model, within=anatomy(model).base))


def _known(where: Anatomy, plan: dict[str, Any]) -> Anatomy:
    """What the plan says of the model's layers; a plan of 0.1 says nothing, and its codecs took RoPE as turned in halves."""
    rows = plan["layers"]
    if "layer_types" not in plan or len(rows) != len(where.attentions):
        return where
    return replace(
        where,
        layers=tuple(Heads(*map(int, row["heads"])) for row in rows),
        turnings=tuple(None if row["turning"] is None else Turning(*row["turning"]) for row in rows),
        absent=tuple(str(row["absent"]) for row in rows),
        layer_types=tuple(map(str, plan["layer_types"])),
        apart=frozenset(map(int, plan["apart"])),
    )


def check_runtime(runtime: Runtime, source: str | Path) -> None:
    """Raise SidecarError unless plan and tables fit the model's layers, heads and head dimension."""
    a = runtime.anatomy
    if len(runtime.plans) != len(a.attentions):
        raise SidecarError(f"{source} plans {len(runtime.plans)} layers, the model has {len(a.attentions)}; it is of another model")
    for layer, plan in enumerate(runtime.plans):
        if plan.codec is None:
            continue
        c, (_, kv, key_dim, value_dim) = plan.codec, a.layers[layer]
        learnt: dict[str, tuple[int, ...]] = {
            "k_mean": (kv, key_dim),
            "k_mean2": (kv, key_dim),
            "v_mean": (kv, value_dim),
            "k_basis": (kv, key_dim, key_dim),
            "k_unbasis": (kv, key_dim, key_dim),
            "v_basis": (kv, value_dim, value_dim),
            "k_perm": (kv * key_dim,),
            "k_unperm": (kv * key_dim,),
        }
        if sum(s.count for s in plan.segments) != c.exact_rows or c.window < 0:
            raise SidecarError(f"{source}: layer {layer} has {c.exact_rows} exact rows but segments {plan.segments}")
        for side, dim in ((c.key, key_dim), (c.value, value_dim)):
            if side.packed and side.widths and 8 * len(side.widths) != dim:
                raise SidecarError(
                    f"{source}: layer {layer} codes {8 * len(side.widths)} channels, the model has {dim}; it is of another model"
                )
        for prefix, side, dim in (("k", c.key, key_dim), ("v", c.value, value_dim)):
            if side.packed:
                learnt.update(QUANTIZERS[side.kind].shapes(side, prefix, kv, dim))
        for name in c.param_names():
            if name in ("start_cos", "start_sin"):
                continue
            table = runtime.tables.get(f"layers.{layer}.{name}")
            if table is None:
                raise SidecarError(f"{source}: the table {name} of layer {layer} is missing; {AGAIN}")
            wanted = learnt.get(name)
            if name == "k_table":
                wanted = (kv, c.table_tokens, key_dim)
            if (wanted is not None and tuple(table.shape) != wanted) or (
                name.startswith("offset") and table.shape[0] != c.key.block
            ):
                raise SidecarError(f"{source}: table {name} of layer {layer} has shape {tuple(table.shape)}, expected {wanted}")
            if table.is_floating_point() and not torch.isfinite(table).all():
                raise SidecarError(f"{source}: table {name} of layer {layer} holds NaN or infinite numbers")

"""The dynamo backend: `torch.compile(model, backend="kvsink", options={"kvsink.method": "rotatekv"}, mode=…)`.

A graph that runs on a KVSinkCache says itself what each layer stores; its sites are fused to packed attention. A graph on a
stock cache gets its new keys and values coded and decoded before they are stored: the numbers of the method, no memory saved.

Options    kvsink.method, kvsink.key_bits, kvsink.value_bits, kvsink.protect (stock caches); kvsink.fuse=False keeps the plain
           operators; everything without the prefix, and `mode`, goes to Inductor
Raises     KvsinkError for an unknown option or method, or a method that needs calibration where none can be had
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvsink.codecs import Codec
from kvsink.codecs.protect import parse_policies, segments_for_layer
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.errors import CalibrationError, KvsinkError, UnknownName, UnsupportedError
from kvsink.graph.capture import note_sources
from kvsink.graph.pipeline import DEFAULT, PipelineReport, run_passes
from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import value
from kvsink.methods import get_method
from kvsink.passes.chain import SitePlan

__all__ = ["forget_reports", "kvsink_backend", "last_report", "split_options"]

_OPTIONS = ("kvsink.method", "kvsink.key_bits", "kvsink.value_bits", "kvsink.protect", "kvsink.fuse", "kvsink.inner")
_reports: list[PipelineReport] = []
_told: set[str] = set()


def _tell_once(text: str) -> None:
    """Warn once per process: a model is compiled graph by graph, and dynamo resets Python's own record of warnings."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=3)


def split_options(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options without their prefix, and the rest for Inductor."""
    ours, rest = {}, {}
    for name, given in (options or {}).items():
        if not name.startswith("kvsink."):
            rest[name] = given
        elif name in _OPTIONS:
            ours[name.removeprefix("kvsink.")] = given
        else:
            raise UnknownName("compile option", name, _OPTIONS)
    return ours, rest


def last_report() -> PipelineReport | None:
    """The report of the graph compiled last: what each pass did at each site, and why not."""
    return _reports[-1] if _reports else None


def forget_reports() -> None:
    """No graph has been compiled yet, as far as `last_report` says."""
    _reports.clear()


def kvsink_backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Rewrite one dynamo graph and hand it to Inductor (or to options["kvsink.inner"], such as "eager")."""
    ours, rest = split_options(options)
    note_sources(gm)
    plan = stock_plan(ours) if "method" in ours else None
    passes = DEFAULT if ours.get("fuse", True) else tuple(p for p in DEFAULT if p != "fuse")
    report = run_passes(gm, passes, plan)
    _reports[:] = [report]
    for reason in dict.fromkeys(r.reason for r in report.declined("attach") if _is_packed(report, r.path)):
        count = sum(r.reason == reason for r in report.declined("attach"))
        _tell_once(f"kvsink: {count} attention layers keep their own operators in the compiled graph: {reason}")
    stock = [s for s in report.sites if s.cache in ("static", "dynamic")]
    if plan is not None and stock:
        _tell_once(
            f"kvsink: {len(stock)} attention layers run on a stock {stock[0].cache} cache: the numbers are those of "
            f"{ours['method']}, but no memory is saved. Use kvsink.rewrite(model) and its own cache to save it."
        )
    inner = ours.get("inner", "inductor")
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, example_inputs)
    if inner != "inductor":
        raise KvsinkError(f"kvsink.inner={inner!r} is not one of inductor, aot_eager, eager")
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    # A decode step on a GPU is many small operators between products: those that are independent share a launch.
    combined = {"combo_kernels": True} if _is_gpu_step(report) else {}
    patches = {**combined, **(list_mode_options(mode) if mode else {}), **rest}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled


def _is_gpu_step(report: PipelineReport) -> bool:
    """Whether a graph feeds one new row per sequence to a packed cache on a GPU."""
    packed = [value(site.q) for site in report.sites if site.cache == "kvsink"]
    return bool(packed) and all(q.device.type == "cuda" and q.shape[2] == 1 for q in packed)


def _is_packed(report: PipelineReport, path: str) -> bool:
    return any(site.path == path and site.cache == "kvsink" for site in report.sites)


def stock_plan(ours: dict[str, Any]) -> Callable[[AttentionSite], SitePlan | None]:
    """What to do with sites on a stock cache: the method with what needs no calibration; a warning names what is left out."""
    method = get_method(str(ours["method"]))
    key_bits = float(ours.get("key_bits", method.key_bits))
    value_bits = float(ours.get("value_bits", method.value_bits))
    key, value_side = method.side("key", key_bits), method.side("value", value_bits)
    learnt = [s.packed and QUANTIZERS[s.kind].tables(s, "k") for s in (key, value_side)]
    if any(learnt) or key.transform == "klt" or value_side.transform == "klt":
        raise CalibrationError(
            f"method {method.name} needs calibration, which a compiled graph cannot do; call kvsink.rewrite(model, "
            f"{method.name!r}) first and compile the model then"
        )
    if Codec(key, value_side).opaque:
        raise UnsupportedError(
            f"method {method.name} codes blocks of tokens, which a stock cache cannot hold; call kvsink.rewrite(model, "
            f"{method.name!r}) and compile the model then"
        )
    dropped = [name for s in (key, value_side) for name in ("center", "reorder") if getattr(s, name)]
    if dropped:
        _tell_once(
            f"kvsink: {method.name} runs without its calibrated steps ({', '.join(sorted(set(dropped)))}); "
            "call kvsink.rewrite(model) for the whole method"
        )
    key, value_side = replace(key, center=False, reorder=False), replace(value_side, center=False, reorder=False)
    policies = parse_policies(str(ours.get("protect", method.protect)))
    if left := [str(p) for p in policies if p.kind in ("anchors", "pivots", "random", "sinks")]:
        _tell_once(f"kvsink: {'+'.join(left)} needs kvsink's own cache and is left out; call kvsink.rewrite(model) for it")
        policies = tuple(p for p in policies if str(p) not in left)

    def plan(site: AttentionSite) -> SitePlan | None:
        heads, dim = (int(n) for n in (value(site.k_rope).shape[1], value(site.k_rope).shape[3]))
        segments = tuple(s for s in segments_for_layer(policies, site.layer, ()))
        codec = Codec(key.resolved(heads, dim), value_side.resolved(heads, dim), tuple(s.count for s in segments))
        return SitePlan(codec, _tables(codec, site), segments)

    return plan


def _tables(codec: Codec, site: AttentionSite) -> dict[str, torch.Tensor]:
    missing = [n for n in codec.param_names() if n not in ("start_cos", "start_sin")]
    if missing:
        raise CalibrationError(f"{site.path}: tables {', '.join(missing)} need calibration; call kvsink.rewrite(model) first")
    return {}

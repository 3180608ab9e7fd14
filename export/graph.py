"""A rewritten model as an ONNX graph: traced with its packed past as inputs and outputs, its ops as nodes of com.kvsink.

Route      `ExportedModel` → `kvsink.export.trace` with a translation table that records one opaque node per op → function bodies
           appended (`append_functions`) or not
Names      input_ids, attention_mask, position_ids, past_key_values.N.…, logits, last_logits (lean), present.N.…
Raises     ExportError when torch cannot trace or translate the model, naming the first reason
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvsink.codecs import Codec
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.export.bodies import DOMAIN, function_proto
from kvsink.export.errors import ExportError
from kvsink.export.flavours import takes_functions
from kvsink.export.group_query import GQA_ATTENTION, GQA_LEAN, GroupQueryModel, empty_cache
from kvsink.export.past import ATTENTION, ExportedModel
from kvsink.export.state import FIXED, empty_past
from kvsink.export.tiles import TILES, TileModel, empty_tiles
from kvsink.export.trace import trace
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.kernels.quantize import SIGMA_KINDS
from kvsink.kernels.stages import back_table

__all__ = ["append_functions", "build_graph"]

PAST, PRESENT = "past_key_values", "present"
_BATCH, _LENGTH, _PAST, _SLOTS = 2, 3, 5, 11  # of the example that is traced; all of them stay dynamic
_TILED = 3 * TILE_SLOTS  # slots of an example in tiles


def build_graph(
    model: nn.Module, opset: int, tokens: int, flavour: str = "functions", lean: bool = False, embeds: bool = False
) -> Any:
    """The onnx_ir model of a rewritten causal language model on the CPU, its nodes of com.kvsink without bodies.

    lean: as the kernels for CUDA take it, see `kvsink.export.group_query` of flavour gqa, `kvsink.export.tiles` of custom. Flavour
    custom has one node for all that reads the past, where its library has a kernel for it. embeds: rows come as embeddings, not
    as ids.
    """
    grouped, tiled = flavour == "gqa", flavour == "custom" and lean
    attention = (GQA_LEAN if lean else GQA_ATTENTION) if grouped else TILES if tiled else ATTENTION
    wide = next(model.parameters()).dtype == torch.float64
    table: dict[Any, Any] = {op: _emit(name, describe) for op, (name, describe) in _nodes(wide).items()}
    table[torch.ops.kvsink_export.group_query.default] = _group_query
    table[torch.ops.kvsink_export.write_rows.default] = _tensor_scatter
    if wide:
        table[torch.ops.aten.scalar_tensor.default] = _number
    log = logging.getLogger("torch.onnx")  # tells about packages that no language model needs
    level = log.level
    with _exporting(model, attention), torch.no_grad(), warnings.catch_warnings():
        log.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        wrapper: ExportedModel | GroupQueryModel | TileModel
        if grouped:
            wrapper = GroupQueryModel(model, tokens, lean).eval()
        elif tiled:
            wrapper = TileModel(model, tokens).eval()
        else:
            wrapper = ExportedModel(model, tokens, flavour == "custom", embeds).eval()
        inputs = _example(wrapper)
        try:
            made = trace(wrapper, inputs, _shapes(inputs), opset, table, grouped or tiled)
        except Exception as error:  # torch has many kinds, none of them ours
            raise ExportError(
                f"{type(model).__name__} cannot be exported: {_reason(error)}. Its PyTorch folder works; leave --onnx out"
            ) from error
        finally:
            log.setLevel(level)
    _name(made, list(inputs["past"]), embeds, ("past", "total") if grouped else ("slots", "slots"))
    _forget(made)
    domains = (["com.microsoft"] if grouped or tiled else []) + ([] if grouped else [DOMAIN])
    made.graph.opset_imports.update(dict.fromkeys(domains, 1))
    made.ir_version = max(10, made.ir_version)  # the first that tells functions apart by overload
    return made


@contextmanager
def _exporting(model: nn.Module, attention: str) -> Iterator[None]:
    """The attention function of exported graphs, and experts by plain batched products, for the time of a `with` block.

    Attention that is not spelled as a function of transformers stays what it is, in its eager form: standard operators, and an
    additive mask, as it expects.
    """
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    attention = attention if takes_functions(model) else "eager"
    names = {"_attn_implementation": attention, "_experts_implementation": "batched_mm"}
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        for name in before:
            setattr(config, name, names[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _example(wrapper: ExportedModel | GroupQueryModel | TileModel) -> dict[str, Any]:
    dtype = next(wrapper.model.parameters()).dtype
    if isinstance(wrapper, GroupQueryModel):
        past = empty_cache(wrapper.runtime, _BATCH, _PAST, dtype)
    elif isinstance(wrapper, TileModel):
        past = empty_tiles(wrapper.runtime, _BATCH, _TILED, dtype)
    else:
        past = empty_past(wrapper.runtime, _BATCH, _SLOTS, dtype)
    ids = torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH)
    if getattr(wrapper, "rows", "") == "inputs_embeds":
        ids = wrapper.model.get_input_embeddings()(ids)  # type: ignore[operator]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _LENGTH).expand(_BATCH, -1).contiguous(),
        "past": past,
    }


def _shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    axis = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {name: {0: axis, 1: axis} for name in ("input_ids", "attention_mask", "position_ids")}
    shapes["past"] = {name: dict.fromkeys(_dynamic(name), axis) for name in inputs["past"]}
    return shapes


def _dynamic(name: str) -> tuple[int, ...]:
    """Dynamic axes of one tensor of the past."""
    if name == "positions":
        return (0, 1)
    return (0,) if name.rpartition(".")[2] in FIXED else (0, 2)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first.strip()[:200]}"


# -- nodes -----------------------------------------------------------------------------------------------------------------


def _emit(op: str, describe: Callable[..., tuple[list[Any], dict[str, Any], int]]) -> Callable[..., Any]:
    """A translator that records one node of com.kvsink; `describe` says its inputs, attributes and count of outputs."""

    def translate(*args: Any) -> Any:
        import onnx_ir as ir
        import onnxscript

        inputs, attributes, outputs = describe(*args)
        while inputs and inputs[-1] is None:
            inputs.pop()
        recorder: Any = onnxscript.evaluator.default()
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(DOMAIN, op, inputs, attrs, num_outputs=outputs, version=1)
        recorder.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    return translate


def _recorded(op: str, inputs: Sequence[Any], outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
    """Record a node of standard operators or of a domain's first version; its output, or outputs."""
    import onnx_ir as ir
    import onnxscript

    recorder: Any = onnxscript.evaluator.default()
    attrs = ir.convenience.convert_attributes(attributes)
    made = ir.Node(domain, op, list(inputs), attrs, num_outputs=outputs, version=1 if domain else None)
    recorder.nodes.append(made)
    return made.outputs[0] if outputs == 1 else made.outputs


def _constant(value: Any, dtype: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    return _recorded("Constant", [], value=ir.tensor(np.array(value, dtype=dtype)))


def _rows_of_heads(x: Any, width: int) -> Any:
    """[B, heads, S, D] → [B, S, width]."""
    return _recorded("Reshape", [_recorded("Transpose", [x], perm=[0, 2, 1, 3]), _constant([0, 0, width], "int64")])


def _number(value: Any, dtype: int = 1, **rest: Any) -> Any:
    """A constant as it is; the exporter's own translator goes through float32. dtype: of ONNX."""
    import onnx_ir as ir

    return _constant(value, ir.DataType(dtype if dtype > 0 else 1).numpy())


def _tensor_scatter(past: Any, new: Any, first: Any) -> Any:
    """Rows written into their places, in a form that onnxruntime carries out in place."""
    return _recorded("TensorScatter", [past, new, first], axis=min(2, len(past.shape) - 1))


def _group_query(
    q: Any,
    k: Any,
    v: Any,
    past_k: Any,
    past_v: Any,
    bias: Any,
    k_step: Any,
    v_step: Any,
    scale: float,
    bits: int,
    sink: Any = None,
    last: Any = None,
) -> Any:
    """Record com.microsoft::GroupQueryAttention, with the transposes and lengths it asks for, in standard operators."""
    import onnx_ir as ir

    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    lean = len(bias.shape) == 2  # the attention mask, which says how long the cache is whatever the size of its tensors
    slots = len(bias.shape) - 1
    total = _recorded("Cast", [_recorded("Shape", [bias], start=slots, end=slots + 1)], to=ir.DataType.INT32.value)  # [1]
    if last is None:
        last = _recorded("Expand", [_recorded("Sub", [total, _constant([1], "int32")]), _recorded("Shape", [q], start=0, end=1)])
    inputs = [_rows_of_heads(x, n * dim) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    inputs += [past_k, past_v, last, total]
    inputs += [None, None, None, None if lean else bias, sink]  # cos, sin and positions of a rotation that has been done
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scale), "do_rotary": 0}
    if bits < 32:
        shape = _constant([kv_heads, 1, dim], "int64")
        inputs += [*((k_step, k_step) if lean else (_recorded("Reshape", [step, shape]) for step in (k_step, v_step)))]
        kind = "PER_TENSOR" if lean else "PER_CHANNEL"
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
    while inputs[-1] is None:
        inputs.pop()
    return _recorded("GroupQueryAttention", inputs, 3, "com.microsoft", **attributes)


def _nodes(wide: bool) -> dict[Any, tuple[str, Callable[..., tuple[list[Any], dict[str, Any], int]]]]:
    ours, theirs = torch.ops.kvsink_export, torch.ops.kvsink

    def quantize(x: Any, sigma: Any, kind: str, widths: Any, group_size: int, clip: float, gain: bool) -> Any:
        return [x, sigma], _scalar(kind, widths, group_size, gain) | {"clip": float(clip)} | _kind(x), 2

    def dequantize(codes: Any, scale: Any, sigma: Any, kind: str, widths: Any, group_size: int, gain: bool) -> Any:
        scaled = scale if kind not in SIGMA_KINDS or gain else None
        return [codes, scaled, sigma], _scalar(kind, widths, group_size, gain), 1

    def encode(x: Any, params: Any, codec: str, side: str) -> Any:
        return [x, *_of_one_way(codec, side, params)], _tabled(codec, side, params) | _kind(x), 2

    def decode(codes: Any, scale: Any, params: Any, codec: str, side: str) -> Any:
        attributes = _tabled(codec, side, params)
        c = Codec.parse(codec)
        scaled = c.row_scales(c.key if side == "k" else c.value, c.row_channels(side, params))
        attributes |= {"dtype": "float64"} if wide and attributes["kind"] == "trellis" else {}  # its levels are a formula
        return [codes, scale if scaled else None, *_of_one_way(codec, side, params, back=True)], attributes, 1

    def rotate(x: Any, order: int, inverse: bool = False) -> Any:
        sizes = {"order": order, "inverse": int(inverse), "channels": x.shape[-1], "rank": len(x.shape)}
        return [x], sizes | _kind(x), 1

    def reorder(x: Any, permutation: Any) -> Any:
        return [x, permutation], {"heads": x.shape[1], "head_dim": x.shape[3]}, 1

    def select(hidden: Any, valid: Any, channels: Any, weights: Any, count: int, entries: bool) -> Any:
        sizes = {"count": count, "entries": int(entries), "width": hidden.shape[2]}
        return [hidden, valid, channels, weights], sizes, 2

    def preserve(slot: Any, score: Any, k: Any, v: Any, new_k: Any, new_v: Any, first: Any, candidates: Any, segments: Any) -> Any:
        return [slot, score, k, v, new_k, new_v, first, *candidates], {"segments": list(segments)}, 4

    def attend(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
        if mask is None:
            raise ExportError("an attention site without a mask; kvsink exports causal decoders only")
        kind = "bool" if str(mask.dtype) == "BOOL" else "float"
        sizes = {"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3]}
        sizes |= _kind(q)
        return [q, k, v, mask], {"scale": float(scale), "mask": kind, **sizes}, 1

    def attend_packed(
        q: Any, k: Any, v: Any, mask: Any, positions: Any, codes: Any, exact: Any, params: Any, scale: float, codec: str
    ) -> Any:
        c = Codec.parse(codec)
        p = c.tables(params)
        _, attributes, _ = attend(q, k, v, mask, scale)
        attributes |= {"span": c.table_tokens, "in_block": int(c.key.domain == "block")}
        starts = p.get("start_cos")
        attributes |= {"turns": starts.shape[0], "rotary": starts.shape[1]} if starts is not None else {"turns": 0, "rotary": 0}
        tables: dict[str, Any] = {}
        for side, s, held in (("k", c.key, codes[1]), ("v", c.value, codes[3])):
            found = [p[name] for name in c.table_names(side)]
            scalar = QUANTIZERS[s.kind].scalar
            own = _scalar(s.kind, s.widths, s.group_size, s.gain) if scalar else _tabled(codec, side, found)
            turned = "none" if s.folded or s.transform == "none" else s.transform
            own |= {"transform": turned, "order": s.order, "center": int(s.center)}
            attributes |= {f"{side}_{name}": value for name, value in own.items()}
            scaled = held if c.row_scales(s, 8 * s.group_size) else None
            back = back_table(p, side, "basis")  # rows are read alone: what projects them is not asked for
            tables[side] = scaled, back, found[-1] if found else None
        (k_scale, k_basis, k_params), (v_scale, v_basis, v_params) = tables["k"], tables["v"]
        inputs = [q, k, v, mask, positions, codes[0], k_scale, codes[2], v_scale, *(exact or (None, None, None))]
        inputs += [starts, p.get("start_sin"), p.get("k_table"), k_basis, k_params, p.get("v_mean"), v_basis, v_params]
        return inputs, attributes, 1

    def attend_tiles(mask: Any, q: Any, k: Any, v: Any, positions: Any, carried: Any, chosen: Any, params: Any, *rest: Any) -> Any:
        scale, codec, kernels = rest
        c = Codec.parse(codec)
        p = c.tables(params)
        p |= {f"{side}_back": back_table(p, side, "sigma") for side in "kv"}
        turned = {f"{n}_hadamard": int(s.transform == "hadamard" and not s.folded) for n, s in (("key", c.key), ("value", c.value))}
        attributes = turned | {"key_clip": float(c.key.clip), "value_clip": float(c.value.clip), "kernels": kernels}
        attributes |= {"scale": float(scale), "heads": q.shape[1], "kv_heads": k.shape[1]}
        attributes |= {"segments": list(c.segments)} if c.segments else {}
        names = ["k_table", "start_cos", "start_sin", "k_basis", "k_sigma", "v_mean", "v_sigma"]
        names += ["tile_mean", "tile_turn", "tile_basis", "tile_rows", "k_back", "v_back"]
        state = [None if 0 in x.shape else x for x in carried]
        return [mask, q, k, v, positions, *state, *(p.get(n) for n in names), *chosen], attributes, 9

    def turn(x: Any, cos: Any, sin: Any, positions: Any, block: int, start: bool) -> Any:
        sizes = {"block": block, "start": int(start), "rows": cos.shape[0]}
        return [x, cos, sin, positions], sizes | {"rotary": cos.shape[-1], "head_dim": x.shape[3]} | _kind(x), 1

    def undo_rope(x: Any, cos: Any, sin: Any) -> Any:
        return [x, cos, sin], {"rotary": cos.shape[-1], "head_dim": x.shape[3]} | _kind(x), 1

    def center_roped(x: Any, mean: Any, cos: Any, sin: Any) -> Any:
        return [x, mean, cos, sin], {"rotary": cos.shape[-1], "head_dim": x.shape[3]} | _kind(x), 1

    return {
        ours.rotate_block.default: ("RotateBlock", turn),
        ours.undo_rope.default: ("UndoRope", undo_rope),
        ours.mean_rows.default: ("MeanRows", lambda t, p: ([t, p], {"block": t.shape[1]}, 1)),
        ours.center_roped.default: ("CenterRoped", center_roped),
        theirs.quantize.default: ("QuantizeKV", quantize),
        theirs.dequantize.default: ("DequantizeKV", dequantize),
        theirs.encode.default: ("QuantizeKV", encode),
        theirs.decode.default: ("DequantizeKV", decode),
        theirs.hadamard.default: ("HadamardRotate", rotate),
        theirs.select_sinks.default: ("SelectSinks", select),
        ours.channel_reorder.default: ("ChannelReorder", reorder),
        ours.first_rows.default: ("SelectFirst", lambda p, valid, count: ([p, valid], {"count": count}, 2)),
        ours.preserve_sinks.default: ("PreserveSinks", preserve),
        ours.lay_rows.default: ("LayRows", lambda rows, new, first, exact: ([rows, new, first, *exact], {}, 1)),
        ours.attend.default: ("Attend", attend),
        ours.attend_packed.default: ("AttendPacked", attend_packed),
        ours.attend_tiles.default: ("AttendTiles", attend_tiles),
    }


def _kind(x: Any) -> dict[str, str]:
    """The attribute that says what a node computes in; float32 is left out."""
    return {"FLOAT16": {"dtype": "float16"}, "DOUBLE": {"dtype": "float64"}}.get(str(x.dtype), {})


def _scalar(kind: str, widths: Any, group_size: int, gain: bool) -> dict[str, Any]:
    return {"kind": kind, "widths": list(widths), "group_size": group_size, "gain": int(gain)}


def _of_one_way(codec: str, side: str, params: Any, back: bool = False) -> list[Any]:
    """The tables that a node of one way reads: levels without bias have a sigma for each."""
    c = Codec.parse(codec)
    unbiased = (c.key if side == "k" else c.value).unbiased
    return list(params[-1:] if back else params[:1]) if unbiased else list(params)


def _tabled(codec: str, side: str, params: Any) -> dict[str, Any]:
    c = Codec.parse(codec)
    s = c.key if side == "k" else c.value
    sizes = {"book": [int(n) for n in params[0].shape]} if params else {}
    widths = {"widths": list(s.widths)} if s.widths else {}
    return {"kind": s.kind, "code_bits": s.code_bits, "gain": int(s.gain)} | sizes | widths


BODILESS = ("AttendTiles",)
"""Nodes that no standard operators say, as codes stand in the order of one kernel; the bodies of others beside them are put in
their place, since a library of operators has kernels of the same names for the CPU."""


def append_functions(model: Any, opset: int) -> None:
    """One function per kind of node of com.kvsink; kinds of one op are told apart by their overload."""
    import onnx_ir as ir
    import onnx_ir.passes.common as inline

    kinds: dict[str, list[Any]] = {}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type in BODILESS:
            continue
        attributes = {name: attr.value for name, attr in node.attributes.items()}
        attributes = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in attributes.items()}
        given = tuple(value is not None for value in node.inputs)
        kind, known = (given, attributes), kinds.setdefault(node.op_type, [])
        if kind not in known:
            known.append(kind)
            proto = function_proto(node.op_type, str(len(known)), attributes, given, opset)
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        node.overload = str(known.index(kind) + 1)
    if any(node.op_type in BODILESS for node in model.graph):
        inline.InlinePass()(model)


def _forget(model: Any) -> None:
    """Drop the exporter's notes on every node: stack traces with the paths of this machine, larger than the graph."""
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name(model: Any, past: list[str], embeds: bool, lengths: tuple[str, str]) -> None:
    """Names and dimension names of inputs and outputs."""
    import onnx_ir as ir

    def shape(value: Any, **names: str) -> None:
        value.shape = ir.Shape([names.get(f"_{i}", d if isinstance(d, int) else None) for i, d in enumerate(value.shape)])

    rows = "inputs_embeds" if embeds else "input_ids"
    heads = (rows, "sequence"), ("attention_mask", "total"), ("position_ids", "sequence")
    for value, (name, second) in zip(model.graph.inputs, heads, strict=False):
        value.name = name
        shape(value, _0="batch", _1=second)
    logits = ("logits", "last_logits")[: len(model.graph.outputs) - len(past)]
    for value, name in zip(model.graph.outputs, logits, strict=False):
        value.name = name
        shape(value, **({"_0": "batch"} if name == "last_logits" else {"_0": "batch", "_1": "sequence"}))
    presents = model.graph.outputs[len(logits) :]
    for values, prefix, length in ((model.graph.inputs[3:], PAST, lengths[0]), (presents, PRESENT, lengths[1])):
        if len(values) != len(past):
            raise ExportError(f"the graph has {len(values)} {prefix} tensors, {len(past)} were expected")
        for value, name in zip(values, past, strict=True):
            value.name = f"{prefix}.{name}"
            shape(value, **{f"_{axis}": "batch" if axis == 0 else length for axis in _dynamic(name)})

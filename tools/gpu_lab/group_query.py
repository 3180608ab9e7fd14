"""What com.microsoft::GroupQueryAttention attends to on each provider of onnxruntime: new rows as they came, or their codes.

One node, 8 query heads, 2 key-value heads of 128 channels, float16, one step of 1 for all channels. Every piece of a text is
compared with both readings (float64), and the codes with those of the CPU provider: past and present in one tensor or in two.

    python tools/gpu_lab/group_query.py rows.jsonl        # needs onnxruntime-gpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvsink.export.session import load_cuda

D, KV, HEADS, ROOM = 128, 2, 8, 64
PLANS = ((33, 1, 1, 1), (20, 1, 10, 1), (1, 1, 1, 1))
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def session(bits: int, provider: str) -> Any:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    half, kind, width = TensorProto.FLOAT16, *((TensorProto.UINT8, D // 2) if bits == 4 else (TensorProto.INT8, D))
    rows = {"q": HEADS * D, "k": KV * D, "v": KV * D}
    info = helper.make_tensor_value_info
    inputs = [info(n, half, ["B", "S", size]) for n, size in rows.items()]
    inputs += [info(n, kind, ["B", KV, "past", width]) for n in ("past_k", "past_v")]
    inputs += [info("last", TensorProto.INT32, ["B"]), info("total", TensorProto.INT32, [1])]
    outputs = [info("out", half, ["B", "S", HEADS * D]), *(info(n, kind, ["B", KV, "all", width]) for n in ("new_k", "new_v"))]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "total", *[""] * 5, "step", "step"],
        ["out", "new_k", "new_v"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV,
        scale=D**-0.5,
        do_rotary=0,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        kv_cache_bit_width=bits,
    )
    graph = helper.make_graph([node], "one", inputs, outputs, [helper.make_tensor("step", TensorProto.FLOAT, [1], [1.0])])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=[PROVIDERS[provider]])


def pieces(
    run: Any, bits: int, provider: str, plan: tuple[int, ...], text: dict[str, Any], in_place: bool
) -> tuple[list[Any], Any]:
    """Outputs of the pieces of a text, and the codes of keys at the end."""
    import onnxruntime as ort

    dtype, width = (np.uint8, D // 2) if bits == 4 else (np.int8, D)
    start = np.zeros((1, KV, ROOM if in_place else 0, width), dtype)
    past = [ort.OrtValue.ortvalue_from_shape_and_type(list(start.shape), dtype, provider, 0) for _ in range(2)]
    if in_place:
        past = [ort.OrtValue.ortvalue_from_numpy(start.copy(), provider, 0) for _ in range(2)]
    outputs, first = [], 0
    for n in plan:
        binding = run.io_binding()
        for name, x in text.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(x[:, first : first + n]))
        first += n
        binding.bind_cpu_input("last", np.array([first - 1], np.int32))
        binding.bind_cpu_input("total", np.array([first], np.int32))
        binding.bind_output("out")
        for name, value in zip("kv", past, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", value)
            if in_place:
                binding.bind_ortvalue_output(f"new_{name}", value)
            else:
                binding.bind_output(f"new_{name}", provider, 0)
        run.run_with_iobinding(binding)
        out, *present = binding.get_outputs()
        outputs.append(out.numpy().copy())
        past = past if in_place else present
    return outputs, past[0].numpy()[:, :, :first].copy()


def attention(q: Any, k: Any, v: Any, first: int) -> Any:
    """Causal attention of rows first … of a text, in float64."""
    n, total = q.shape[1], k.shape[1]
    q, k, v = (x.astype(np.float64).reshape(x.shape[1], -1, D) for x in (q, k, v))
    k, v = (x.repeat(HEADS // KV, axis=1) for x in (k, v))
    logits = np.einsum("shd,nhd->hsn", q, k) * D**-0.5
    logits = np.where(np.arange(total) <= first + np.arange(n)[:, None], logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hsn,nhd->shd", p / p.sum(-1, keepdims=True), v).reshape(1, n, -1)


def off(a: Any, b: Any) -> float:
    return float(f"{np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b):.2e}")


def main(out: Path) -> None:
    import onnxruntime as ort

    load_cuda(ort)
    rng = np.random.default_rng(0)
    total = max(sum(plan) for plan in PLANS)
    sizes, spread = {"q": HEADS * D, "k": KV * D, "v": KV * D}, {"q": 0.3, "k": 3.0, "v": 3.0}
    text = {n: (spread[n] * rng.standard_normal((1, total, size))).astype(np.float16) for n, size in sizes.items()}
    with out.open("a") as file:
        for bits in (8, 4):
            top = 2 ** (bits - 1)
            coded = {n: np.clip(np.round(text[n].astype(np.float32)), -top, top - 1).astype(np.float16) for n in "kv"}
            for plan in PLANS:
                stored = {}
                for provider, in_place in (("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)):
                    run = session(bits, provider)
                    outputs, stored[provider, in_place] = pieces(run, bits, provider, plan, text, in_place)
                    row: dict[str, Any] = {
                        "onnxruntime": ort.__version__,
                        "bits": bits,
                        "provider": provider,
                        "in_place": in_place,
                        "pieces": plan,
                        "codes_of_the_cpu": float((stored[provider, in_place] == stored["cpu", True]).mean().round(4)),
                        "off_rows_as_they_came": [],
                        "off_codes": [],
                    }
                    first = 0
                    for n, got in zip(plan, outputs, strict=True):
                        now, all_ = slice(first, first + n), slice(0, first + n)
                        for name, exact in (("off_rows_as_they_came", True), ("off_codes", False)):
                            k, v = (coded[x][:, all_].copy() for x in "kv")
                            if exact:
                                k[:, now], v[:, now] = text["k"][:, now], text["v"][:, now]
                            row[name].append(off(got, attention(text["q"][:, now], k, v, first)))
                        first += n
                    print(row, flush=True)
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

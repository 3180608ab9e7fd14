"""The node of flavour custom for CUDA in onnxruntime, beside the torch cache, the float32 definition and torch models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import onnxruntime as ort

from kvsink import KVSinkCache
from kvsink.codecs import STATE_NAMES
from kvsink.export import ExportError, OnnxGenerator, onnx, tiles
from kvsink.export.bodies import DOMAIN, OPSET
from kvsink.export.graph import _nodes
from kvsink.export.session import load_cuda
from kvsink.export.state import STATE_OF
from kvsink.kernels.append import append
from kvsink.kernels.append_attend import append_attend
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.backends import LayerState
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of
from kvsink.tools import build_ort_ops
from tests.export.test_tiles import KINDS, TOKENS, model_of

on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="needs onnxruntime-gpu",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds as ONNX, and one library for them."""
    made = tmp_path_factory.mktemp("tiles")
    for kind in KINDS:
        onnx(model_of(kind), made / f"{kind}.onnx", "custom", dtype="float16")
    build_ort_ops.build(made / "ops.so", [made / f"{kind}.onnx" for kind in KINDS])
    load_cuda(ort)
    return made


class Nodes:
    """One layer's nodes in onnxruntime, beside the ops of the torch cache, on rows that both are given."""

    def __init__(self, library: Path, kind: str, batch: int) -> None:
        model = model_of(kind)
        self.library, self.traced, runtime = library, tiles.TileModel(model, TOKENS), runtime_of(model)
        self.codec, self.params, self.kernels = self.traced.layers[0]
        self.heads, self.kv_heads, self.dim, *_ = KINDS[kind]
        self.room = {"room": 1} if kind in ("mean", "many") else {}  # its prompts attend head by head
        self.batch, self.scale = batch, self.dim**-0.5
        past = tiles.empty_tiles(runtime, batch, TOKENS, torch.float16)
        self.past = {STATE_OF[n.removeprefix("0.")]: t for n, t in past.items()}
        layout = self.codec.layout(batch, self.kv_heads, self.dim, self.dim, TOKENS, torch.float16)
        layout |= {"positions": ((batch, TOKENS), torch.int32, 0), "real": ((batch, TOKENS), torch.bool, 1)}
        self.state = LayerState(*(torch.full(layout[n][0], layout[n][2], dtype=layout[n][1], device="cuda") for n in STATE_NAMES))
        self.on_gpu = [p.cuda().expand(batch, -1).contiguous() if n.startswith("origin") else p.cuda()
                       for n, p in zip(self.codec.param_names(), self.params, strict=True)]  # fmt: skip

    def node(self, *given: Any) -> list[Any]:
        """The node run by itself, as the translation of the exporter writes it."""
        from onnx import helper

        name, describe = _nodes(False)[torch.ops.kvsink_export.attend_tiles.default]
        inputs, attributes, count = describe(*given)
        while inputs and inputs[-1] is None:
            inputs.pop()
        feeds = {f"x{i}": x.contiguous().numpy() for i, x in enumerate(inputs) if x is not None}
        kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in feeds.items()}
        values = [helper.make_tensor_value_info(n, kinds[n], [None] * a.ndim) for n, a in feeds.items()]
        outputs = [f"y{i}" for i in range(count) if i == 0 or inputs[4 + i] is not None]
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
        made = helper.make_node(name, names, [f"y{i}" for i in range(count)], domain=DOMAIN, **attributes, **self.room)
        graph = helper.make_graph([made], "one", values, [helper.make_empty_tensor_value_info(n) for n in outputs])
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(self.library))
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = ort.InferenceSession(proto, options, providers=["CUDAExecutionProvider"])
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    def carried(self) -> list[Tensor]:
        empty = torch.empty(self.batch, self.kv_heads, 0, dtype=torch.float16)
        return [self.past.get(n, empty) for n in STATE_OF.values()]

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Queries, keys, values and candidates of rows from a slot on."""
        g = torch.Generator().manual_seed(100 + first)
        q = torch.randn(self.batch, self.heads, count, self.dim, generator=g).half()
        k, v = (torch.randn(self.batch, self.kv_heads, count, self.dim, generator=g).half() for _ in range(2))
        chosen: list[Tensor] = []
        for capacity in self.codec.segments:
            score = torch.randn(self.batch, count, generator=g).topk(min(capacity, count), dim=1)
            chosen += [score.values, score.indices]
        return q, k, v, chosen


def exact_rows(state: dict[str, Tensor], segments: tuple[int, ...]) -> list[Any]:
    """What every segment holds, whatever the order of its places: slots (a repeat names its row too), scores, keys and values."""
    found, at = [], 0
    for capacity in segments:
        for b in range(state["exact_slot"].shape[0]):
            rows = []
            for e in range(at, at + capacity):
                slot = int(state["exact_slot"][b, e])
                if slot != -1:
                    slot = -slot - 2 if slot < 0 else slot
                    rows.append(
                        (slot, float(state["exact_score"][b, e]), *(state[n][b, :, e].tolist() for n in ("exact_k", "exact_v")))
                    )
            found.append(sorted(rows))
        at += capacity
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
class TestNodes:
    pytestmark = on_cuda

    def test_nodes_leave_what_the_ops_of_the_torch_cache_leave(self, folder: Path, kind: str, batch: int) -> None:
        """Rows of a prompt and single ones; codes and exact rows byte for byte, attention near its float32 definition."""
        n = Nodes(folder / "ops.so", kind, batch)
        text, st = n.codec.text(), n.state
        pieces = [(102, 40)] if batch == 1 else [(102 + i, 1) for i in range(40)]  # the runtime's attention takes one row in pieces
        for first, count in ((0, 100), (100, 1), (101, 1), *pieces, *((i, 1) for i in range(142, 150))):
            q, k, v, chosen = n.rows(first, count)
            mask = torch.ones(batch, first + count, dtype=torch.int64)
            st.length.fill_(first)
            before = [t.float().cpu() if t.dtype == torch.float16 and t.shape[-1] == n.dim else t.cpu() for t in st]
            positions = torch.arange(first, first + count)[None].expand(batch, -1)
            out, *left = n.node(mask, q, k, v, positions, n.carried(), chosen, n.params, n.scale, text, n.kernels)
            exact = attend_ref(q.float(), k.float(), v.float(), before, n.params, None, n.scale, True, text)
            exact = exact.transpose(1, 2).reshape(out.shape)
            assert (out.float() - exact).abs().max() <= 4e-3 * max(1.0, float(exact.abs().max())), first
            given, on_gpu = [x.cuda() for x in (q, k, v)], [c.cuda() for c in chosen]
            if count == 1:
                wanted = append_attend(*given, positions.cuda(), on_gpu, st, n.on_gpu, None, n.scale, True, text)
                assert torch.equal(out, wanted.cpu().transpose(1, 2).reshape(out.shape)), first
            else:
                none = torch.empty(1, count, 0, device="cuda", dtype=torch.float16)
                append(given[1], given[2], positions.cuda(), none, none, on_gpu, st, n.on_gpu, text, True)
            n.past = dict(zip(n.past, left, strict=True))
            held = {name: t.cpu() for name, t in zip(STATE_NAMES, st, strict=True)}
            for name in n.past:
                if not name.startswith("exact"):
                    assert torch.equal(n.past[name], held[name]), (name, first)
            assert exact_rows(n.past, n.codec.segments) == exact_rows(held, n.codec.segments), first


@pytest.mark.parametrize("kind", ["trellis", "even"])
class TestRunner:
    pytestmark = on_cuda

    def test_a_text_in_pieces_is_the_torch_models(self, folder: Path, kind: str) -> None:
        """Logits of a prompt, of a piece behind it, which onnxruntime's own attention reads, and of single tokens."""
        model = model_of(kind)
        runner = OnnxGenerator(folder / f"{kind}.onnx", ("CUDAExecutionProvider",), library=folder / "ops.so")
        ids = np.random.default_rng(3).integers(0, 97, (1, 330))
        cache, past = KVSinkCache.for_model(model, 1, 384, tiles=True), runner.empty(1)
        for a, b in ((0, 200), (200, 300), *((i, i + 1) for i in range(300, 330))):
            logits, past = runner.step(ids[:, a:b], np.ones((1, b)), np.arange(a, b)[None], past)
            with torch.no_grad():
                wanted = model(input_ids=torch.from_numpy(ids[:, a:b]), **given_cache(model, cache), use_cache=True).logits
            assert np.abs(logits - wanted.numpy()).max() <= 2e-2 * float(wanted.abs().max())
        assert past["0.key"].shape()[2] == 384 and runner.bits_per_element(past) < 9
        with pytest.raises(ExportError, match="have the positions 330 to 330"):
            runner.step(ids[:, :1], np.ones((1, 331)), np.zeros((1, 1), dtype=np.int64), past)
        quick = OnnxGenerator(
            folder / f"{kind}.onnx", (("CUDAExecutionProvider", {"enable_cuda_graph": "1"}),), library=folder / "ops.so"
        )
        texts = [list(range(5, 45)), list(range(50, 90))]
        for _ in range(2):  # a new cache is a new graph
            assert quick.generate(texts, 24, eos_token_id=-1) == runner.generate(texts, 24, eos_token_id=-1)
            here, there = quick.arrays(quick.past), runner.arrays(runner.past)
            assert here.keys() == there.keys() and all(np.array_equal(here[n], there[n]) for n in here)
        two = runner.generate([[5, 6, 7, 8], [9, 10, 11, 12]], 8, eos_token_id=-1)
        assert two == [runner.generate([row], 8, eos_token_id=-1)[0] for row in ([5, 6, 7, 8], [9, 10, 11, 12])]
